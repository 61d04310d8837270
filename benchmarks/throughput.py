"""End to end on micro VQAv2: etcbench against lmms-eval's llava_hf and a plain generate loop.

All read the same rows and the same checkpoint in float32 and must give the same answers. Timed is
what lies between a loaded model with its rows and the answers; the ratios are of whole passes over
the rows, each timed right behind an untimed one of the same kind. ``ratio_to_no_reuse`` is that of
VoCo at one token, whose questions see nothing else of the picture.

Run ``python benchmarks/throughput.py --json``; it needs the extra ``lmms``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from _bench import MICRO, alternate, arguments, matmul_rate, ratio, report, spread
from torch.utils.flop_counter import FlopCounterMode

from etcbench.backbones import Backbone, load_backbone
from etcbench.checkpoints import installed
from etcbench.decoder import Decoder
from etcbench.engine import Settings, answers
from etcbench.loading import LoadedTask, load_task
from etcbench.run import load_compressor

LMMS_TASKS = MICRO.parents[3] / "tests" / "lmms_tasks"
BATCH = 256


def etcbench_pass(
    model: Backbone, task: LoadedTask, method: Any, found: dict[str, str], **how: Any
) -> Callable[[], None]:
    """Answer all rows with our engine."""
    settings = Settings(**{"batch_size": BATCH, "style": "lmms", **how})

    def run() -> None:
        with installed(method, model):
            for batch in answers(model, method, task.task, task.docs, settings):
                found.update((a.doc.id, a.response or f"error: {a.error}") for a in batch)

    return run


def generate_pass(model: Backbone, task: LoadedTask, found: dict[str, str]) -> Callable[[], None]:
    """Answer row by row with the processor and ``generate``, as a script would."""

    @torch.inference_mode()
    def run() -> None:
        for doc in task.docs:
            question = task.task.prompt(doc, "lmms")
            content = [{"type": "image"}, {"type": "text", "text": question}]
            asked = [{"role": "user", "content": content}]
            text = model.processor.apply_chat_template(asked, add_generation_prompt=True)
            pictures = [doc.pictures[0].open()]
            inputs = model.processor(images=pictures, text=[text], return_tensors="pt")
            out = model.model.generate(**inputs, max_new_tokens=16, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            found[doc.id] = model.processor.tokenizer.decode(new, skip_special_tokens=True).strip()

    return run


def lmms_pass(task: LoadedTask, found: dict[str, str]) -> Callable[[], None]:
    """Answer with lmms-eval's llava_hf, batch size 1."""
    os.environ.setdefault("LMMS_EVAL_DATASETS_CACHE", tempfile.mkdtemp())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lmms_eval.models.simple.llava_hf import LlavaHf
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=str(LMMS_TASKS), include_defaults=False)
    theirs = get_task_dict(["micro_vqav2"], manager, "simple")["micro_vqav2"]
    theirs.build_all_requests(limit=len(task.docs), rank=0, world_size=1)
    asked = theirs.instances
    model = LlavaHf(str(MICRO), device="cpu", device_map="cpu", dtype="float32")
    model.task_dict = {"micro_vqav2": {theirs.config.test_split: theirs.test_docs()}}
    ids = [doc.id for doc in task.docs]

    def run() -> None:
        # it empties the settings it is given
        fresh = [replace(r, arguments=(r.args[0], dict(r.args[1]), *r.args[2:])) for r in asked]
        for request, response in zip(asked, model.generate_until(fresh), strict=True):
            found[ids[request.doc_id]] = response.strip()

    return run


@torch.inference_mode()
def prefill_rate(model: Backbone, task: LoadedTask, method: Any) -> float:
    """Achieved FLOP/s of a prefill of ``BATCH`` prompts (tower not included), processor time."""
    pixels = model.preprocess([task.docs[0].pictures[0].open()] * BATCH, ["x"] * BATCH)
    prompts = [model.prompt(task.task.prompt(task.docs[0], "lmms"), 1)] * BATCH
    prefix = model.assemble(prompts, [model.visual(pixels, method)], None)

    def prefill() -> None:
        Decoder(model, method).whole(prefix, [p.after for p in prompts])

    with FlopCounterMode(display=False) as counter:
        prefill()
    times = alternate({"prefill": prefill}, 5)["prefill"]["cpu"]
    return counter.get_total_flops() / min(times)


def main() -> int:
    chosen = arguments(__doc__, limit=0)
    model = load_backbone("micro-llava", device="cpu", image="processor")
    task = load_task("vqav2", "micro", limit=chosen.limit or None)
    full, voco = (load_compressor(*m, model).compressor for m in (("full", None), ("voco", 1)))
    names = ("etcbench", "lmms", "loop", "apart", "voco", "voco apart")
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    cases = {
        "etcbench": etcbench_pass(model, task, full, found["etcbench"]),
        "etcbench_no_reuse": etcbench_pass(model, task, full, found["apart"], reuse=False),
        "voco_1": etcbench_pass(model, task, voco, found["voco"]),
        "voco_1_no_reuse": etcbench_pass(model, task, voco, found["voco apart"], reuse=False),
        "lmms_llava_hf": lmms_pass(task, found["lmms"]),
        "generate_loop": generate_pass(model, task, found["loop"]),
    }
    times = alternate(cases, chosen.rounds, settle=True)
    rows, ours, rate = len(task.docs), times["etcbench"], matmul_rate()
    result = {
        "ratio_to_lmms_eval": ratio(times["lmms_llava_hf"], ours),
        "ratio_to_generate": ratio(times["generate_loop"], ours),
        "ratio_to_no_reuse": ratio(times["voco_1_no_reuse"], times["voco_1"]),
        "ratio_to_no_reuse_uncompressed": ratio(times["etcbench_no_reuse"], ours),
        "identical_answers": all(
            found[name] == found[names[4 * name.startswith("voco")]] for name in names
        ),
        "matmul_fraction": round(prefill_rate(model, task, full) / rate, 3),
        "matmul_gflops": round(rate / 1e9, 1),
        "answers_per_second": {
            name: {clock: spread([rows / s for s in seconds]) for clock, seconds in clocks.items()}
            for name, clocks in times.items()
        },
        "rows": rows,
        "pictures": len({doc.pictures[0].key for doc in task.docs}),
        "batch": BATCH,
        "data": "micro VQAv2, micro-llava, float32: comparable with nothing else",
    }
    report("throughput", result, chosen)
    return int(not result["identical_answers"])


if __name__ == "__main__":
    sys.exit(main())
