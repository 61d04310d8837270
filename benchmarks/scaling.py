"""How time and memory grow with questions per picture, visual tokens and samples.

Every point and method runs in a process of its own on a random LLaVA: processor time per answer,
the most memory that was resident, and how far that is above what the first 64 answers took.
Answers all have the same length, so that methods and points differ in nothing else. The tokenizer
knows bytes only, so LLaVA's system sentence is some 150 tokens long; in VoCo's order of the prompt,
which ETC has here, it stands behind the picture, and the engine runs it once for each picture.

Run ``python benchmarks/scaling.py``; it exits with 1 when ten times the samples take over 10 %
more memory.
"""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _bench import arguments, random_llava, report
from PIL import Image

from etcbench.backbones import load_backbone
from etcbench.doc import Doc, Picture
from etcbench.engine import Settings, answers
from etcbench.run import load_compressor
from etcbench.task import Task

MODEL = {"patch": 4, "layers": 4, "hidden_size": 128, "intermediate_size": 384}
LIMIT = 0.10
CACHE_MIB = 16
METHODS = {"full": None, "etc": 1}
NEVER = 10**9  # the id of no token
# side in pixels (visual tokens = (side / 4) squared), questions per picture, samples
POINTS = {
    "questions per picture": [(32, count, 960) for count in (1, 2, 4, 8, 16, 40)],
    "visual tokens": [(side, 4, 240) for side in (16, 32, 48, 64, 96)],
    "samples": [(32, 4, count) for count in (1000, 10_000)],
}


class Echo(Task):
    """A task whose prompt is its question."""

    name = "echo"
    max_new_tokens = 4

    def render(self, doc: Doc, style: str) -> str:
        """Ask the question as it is."""
        return str(doc.fields["question"])


def docs(side: int, questions: int, samples: int) -> Iterator[Doc]:
    """Ask about one made-up picture after another, none of which comes again."""
    for number in range(samples):
        shown, turn = divmod(number, questions)
        if turn == 0:
            pixels = torch.full((side, side, 3), shown % 256, dtype=torch.uint8)
            pixels[:2, :4, 0] = torch.tensor(list(shown.to_bytes(8, "big"))).view(2, 4)
            stream = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(stream, "PNG")
            picture = Picture(stream.getvalue())
        yield Doc(str(number), str(shown), (picture,), {"question": f"{turn} {number}?"}, None)


def child(model: str, name: str, side: int, questions: int, samples: int) -> None:
    """Answer and print milliseconds per answer and MiB of memory."""
    torch.set_num_threads(1)
    backbone = load_backbone(model, device="cpu")
    # an end token that a random model happens to choose would make some answers shorter
    backbone.model.generation_config.eos_token_id = NEVER
    settings = Settings(batch_size=32, cache_mib=CACHE_MIB)
    budget = METHODS[name]
    method: Any = load_compressor(name, budget, backbone, untrained=budget is not None)
    for _ in answers(backbone, method.compressor, Echo(), docs(side, questions, 64), settings):
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    stream = docs(side, questions, samples)
    for batch in answers(backbone, method.compressor, Echo(), stream, settings):
        if errors := [answer.error for answer in batch if answer.error is not None]:
            raise SystemExit(f"{name}: {errors[0]}")
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"ms_per_answer": round(1e3 * seconds / samples, 3)}
    mib = {"resident_mib": peak >> 10, "growth_mib": (peak - before) >> 10}
    print(json.dumps({"method": name, **figures, **mib}))


def main() -> int:
    if "--child" in sys.argv:
        numbers = sys.argv[sys.argv.index("--child") + 1 :]
        child(numbers[0], numbers[1], *map(int, numbers[2:]))
        return 0
    chosen = arguments(__doc__, rounds=1)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for axis, points in POINTS.items():
            result[axis] = []
            for side, questions, samples in points:
                path = random_llava(Path(folder) / str(side), side=side, **MODEL)
                point = {
                    "visual_tokens": (side // 4) ** 2,
                    "questions_per_picture": questions,
                    "samples": samples,
                }
                for name in METHODS:
                    numbers = [str(number) for number in (path, name, side, questions, samples)]
                    command = [sys.executable, __file__, "--child", *numbers]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        raise SystemExit(done.stderr)
                    result[axis].append({**point, **json.loads(done.stdout)})
    few, many = (
        {e["method"]: e["resident_mib"] for e in result["samples"] if e["samples"] == count}
        for count in (1000, 10_000)
    )
    growth = {name: round(many[name] / few[name] - 1, 4) for name in few}
    result["memory_of_ten_times_the_samples"] = growth
    report("scaling", result, chosen)
    return int(max(growth.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
