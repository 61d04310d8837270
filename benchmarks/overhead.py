"""What the engine adds to a bare batched ``generate``: same batches, same prompts, no reuse.

Both open the pictures, preprocess, tokenize, generate greedily and detokenize; ``generate`` gets
its batch from the processor, padded on the left. The engine runs ``full`` with reuse off and
opens no picture ahead.

Run ``python benchmarks/overhead.py``; it exits with 1 when the engine takes over 5 % longer, by
processor time, or answers differ.
"""

from __future__ import annotations

import sys

import torch
from _bench import alternate, arguments, ratio, report, spread

from etcbench.backbones import load_backbone
from etcbench.doc import Doc
from etcbench.engine import Settings, answers
from etcbench.loading import load_task
from etcbench.run import load_compressor
from etcbench.waves import Question, waves

LIMIT = 0.05
NEW_TOKENS = 16


def main() -> int:
    chosen = arguments(__doc__, batch=16, limit=128)
    model = load_backbone("micro-llava", device="cpu", image="processor")
    task = load_task("vqav2", "micro", limit=chosen.limit)
    method = load_compressor("full", None, model).compressor
    docs = list(task.docs)
    settings = Settings(chosen.batch, "lmms", NEW_TOKENS, reuse=False, workers=0)
    model.processor.tokenizer.padding_side = "left"
    model.model.generation_config.pad_token_id = model.processor.tokenizer.pad_token_id
    found: dict[str, dict[str, str]] = {"engine": {}, "generate": {}}

    def question(doc: Doc) -> Question:
        text = task.task.prompt(doc, "lmms")
        return Question(doc, text, model.prompt(text, 1), doc.pictures)

    batches = [list(w) for w in waves([question(doc) for doc in docs], lambda: chosen.batch)]

    def engine() -> None:
        for batch in answers(model, method, task.task, docs, settings):
            found["engine"].update((a.doc.id, a.response or "") for a in batch)

    @torch.inference_mode()
    def generate() -> None:
        for batch in batches:
            texts, images = [], []
            for asked in batch:
                content = [{"type": "image"}, {"type": "text", "text": asked.text}]
                messages = [{"role": "user", "content": content}]
                texts.append(
                    model.processor.apply_chat_template(messages, add_generation_prompt=True)
                )
                images.append(asked.doc.pictures[0].open())
            inputs = model.processor(images=images, text=texts, padding=True, return_tensors="pt")
            out = model.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            decoded = model.processor.batch_decode(new, skip_special_tokens=True)
            for asked, text in zip(batch, decoded, strict=True):
                found["generate"][asked.doc.id] = text.strip()

    times = alternate({"engine": engine, "generate": generate}, chosen.rounds)
    slower = ratio(times["engine"], times["generate"])
    identical = found["engine"] == found["generate"]
    result = {
        "engine_over_generate": slower,
        "overhead": round(slower["cpu"]["median"] - 1, 4),
        "identical_answers": identical,
        "answers_per_second": {
            name: {clock: spread([len(docs) / s for s in seconds]) for clock, seconds in t.items()}
            for name, t in times.items()
        },
        "batch": chosen.batch,
        "rows": len(docs),
    }
    report("overhead", result, chosen)
    return int(not identical or result["overhead"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
