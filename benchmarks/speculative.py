"""Long answers with and without drafts: the same text, and how much faster.

Timed is decoding alone, behind the prefill, one answer at a time. Bases:

* ``micro``, the embedded model with its trained twigs: its own answers of 32 tokens and more, up to
  its end token, to the prompts of `etcbench.recipes.own_answers` on benchmark pictures;
* ``wide``, random weights of 24 layers whose later layers are damped and that keeps every visual
  token, so that a twig that is a copy of early layers agrees with the model about as often as a
  trained one (57 % in the paper); answers of a fixed length. It shows what drafts save on a deeper
  model, not what a twig can learn.

Run ``python benchmarks/speculative.py --json``.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _bench import alternate, arguments, random_llava, ratio, report, spread
from PIL.Image import Image

from etcbench.backbones import Backbone, load_backbone
from etcbench.compressor import Compressor
from etcbench.decoder import Decoder
from etcbench.errors import MissingCheckpointError
from etcbench.loading import load_task
from etcbench.recipes.own_answers import PROMPTS
from etcbench.run import load_compressor
from etcbench.speculative import Decoded, decode

NARROW = {"width": 3, "children": 3, "nodes": 12}
# On a CPU 60 nodes cost much more than one token; chain and narrow tree are for that.
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("twigvlm", {}), ("twigvlm-pp", {"drafts": "chain"}),
    ("twigvlm-pp", NARROW), ("twigvlm-pp", {}),
)  # fmt: skip
WIDE = {"layers": 24, "hidden_size": 256, "intermediate_size": 704, "kv_heads": 8,
        "num_attention_heads": 8, "side": 96, "patch": 12}  # fmt: skip
DAMPING = 0.1  # factor of what the layers behind the twig's add
LIMIT = 128  # tokens of an answer
Question = tuple[Image, str]


def bases() -> Iterator[tuple[str, Backbone, dict[str, Any]]]:
    """Name, model, and how its methods are loaded."""
    yield "micro", load_backbone("micro-llava", device="cpu"), {"tokens": 21}
    with tempfile.TemporaryDirectory() as folder:
        model = load_backbone(str(random_llava(Path(folder), **WIDE)), device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.0 if "embed" in name or "lm_head" in name else 0.05)
        for layer in model.decoder_layers[5:]:
            layer.self_attn.o_proj.weight.mul_(DAMPING)
            layer.mlp.down_proj.weight.mul_(DAMPING)
    yield "wide", model, {"tokens": model.spec.visual_tokens, "untrained": True}


def prefilled(model: Backbone, method: Compressor, asked: list[Question]) -> Callable[[], Any]:
    """Prefill questions together; each call gives a fresh copy of the cache."""
    prompts = [model.prompt(text, 1) for _, text in asked]
    names = [str(number) for number in range(len(asked))]
    pixels = model.preprocess([picture for picture, _ in asked], names)
    decoder = Decoder(model, method)
    prefix = model.assemble(prompts, [model.visual(pixels, method)], method.learned_tokens())
    kv, logits = decoder.whole(prefix, [prompt.after for prompt in prompts])
    return lambda: (decoder, kv.rows(torch.arange(len(asked))), logits)


def held_out(count: int) -> list[Image]:
    """Pictures of a micro benchmark, each once; no training scene is among them."""
    docs = load_task("mme", data="micro").docs
    pictures = {doc.pictures[0].key: doc.pictures[0] for doc in docs}
    return [picture.open() for picture in list(pictures.values())[:count]]


def long_answers(model: Backbone, method: Compressor, chosen: Any) -> list[Question]:
    """Find questions that get a long answer: every prompt is asked about every picture."""
    found: list[Question] = []
    for prompt in PROMPTS:
        asked = [(picture, prompt) for picture in held_out(chosen.pictures)]
        said = zip(asked, decode(*prefilled(model, method, asked)(), LIMIT), strict=True)
        found += [one for one, row in said if chosen.shortest <= len(row.tokens) < LIMIT]
    share = max(len(found) / chosen.answers, 1)
    return [found[int(number * share)] for number in range(min(len(found), chosen.answers))]


@torch.inference_mode()
def measure(model: Backbone, name: str, chosen: Any, how: dict[str, Any]) -> dict[str, Any]:
    """Compare both ways of decoding."""
    tokens = how.pop("tokens")
    drafting = load_compressor(name, tokens, model, **how).compressor
    plain = copy.copy(drafting)
    plain.decoding = "greedy"  # type: ignore[attr-defined]
    trained = "untrained" not in how
    asked = long_answers(model, plain, chosen) if trained else [(held_out(1)[0], PROMPTS[0])]
    limit = LIMIT if trained else chosen.length
    said: dict[str, list[Decoded]] = {}

    def case(label: str, method: Compressor) -> Callable[[], None]:
        ready = [prefilled(model, method, [question]) for question in asked]

        def run() -> None:
            said[label] = [decode(*fresh(), limit, stops=trained)[0] for fresh in ready]

        return run

    cases = {"greedy": case("greedy", plain), "drafts": case("drafts", drafting)}
    times = alternate(cases, chosen.rounds)
    texts = [[row.tokens for row in said[label]] for label in ("greedy", "drafts")]
    drafts = [row.drafts for row in said["drafts"] if row.drafts is not None]
    drafted, accepted, passes = (
        sum(getattr(d, part) for d in drafts) for part in ("drafted", "accepted", "verifications")
    )
    return {
        "method": name,
        "tokens": tokens,
        "identical": texts[0] == texts[1],
        "length": spread([len(row) for row in texts[0]]),
        "speedup": ratio(times["greedy"], times["drafts"]),
        "acceptance": round(accepted / drafted, 4),
        "tokens_per_verification": round((accepted + passes) / passes, 3),
    }


def main() -> None:
    """Measure every base and method that has its weights."""
    chosen = arguments(__doc__, shortest=32, answers=24, pictures=120, length=64)
    rows, absent = [], []
    for base, model, how in bases():
        for name, drafts in CASES:
            try:
                found = measure(model, name, chosen, {**how, **drafts})
                rows.append({"base": base, "options": drafts, **found})
            except MissingCheckpointError as error:
                absent.append(f"{base} {name}: {error}")
    report("speculative", {"rows": rows, "absent": absent}, chosen)


if __name__ == "__main__":
    main()
