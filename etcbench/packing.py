"""Training samples as packed sequences: one picture, several independent turns.

A sample is ``[prefix, picture, (learned tokens), turn_1, ..., turn_K]``. Every turn continues from
the picture at the same position and sees no other turn, so K questions cost one picture, and each
is trained exactly as it is asked at evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from etcbench.backbones.base import Backbone, Pixels, Prompt
from etcbench.compressor import PromptLayout

EOS_WEIGHT = 0.1


@dataclass
class PackedBatch:
    """A batch of packed samples on the CPU.

    Attributes
    ----------
    prompts : list of Prompt
        What stands around the picture, one per row; rows without a picture come last.
    pixels : Pixels or None
        The pictures of the first rows.
    text : list of list of int
        Token ids of all turns, one after the other.
    labels : Tensor, long, shape (batch, text tokens)
        Token that each text position must predict; -100 where there is none.
    weights : Tensor, float, shape (batch, text tokens)
        Share of each prediction in the loss; sums to 1 over the batch.
    turns : Tensor, long, shape (batch, text tokens)
        Number of the turn; -1 for padding.
    offsets : Tensor, long, shape (batch, text tokens)
        Position within the turn.
    instruction : Tensor, bool, shape (batch, text tokens)
        Tokens of the question itself: no template, no answer.
    shown : Tensor or None, long, shape (pictures, visual tokens)
        First token of the name of what each visual token shows, where the data says so; -100
        behind a smaller picture.
    """

    prompts: list[Prompt]
    pixels: Pixels | None
    text: list[list[int]]
    labels: Tensor
    weights: Tensor
    turns: Tensor
    offsets: Tensor
    instruction: Tensor
    shown: Tensor | None = None


@dataclass
class Packer:
    """Collates samples ``{"picture": image or None, "turns": [(question, answer), ...]}``.

    Parameters
    ----------
    backbone : Backbone
        Template, tokenizer and preprocessing.
    layout : {"standard", "image_first"}
        Order of the prompt's parts.
    """

    backbone: Backbone
    layout: PromptLayout = "standard"

    def __post_init__(self) -> None:
        tokenizer = self.backbone.processor.tokenizer
        self._eos = int(tokenizer.eos_token_id)
        self._template = {
            pictures: self.backbone.prompt("", pictures, self.layout).after for pictures in (0, 1)
        }

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, PackedBatch]:
        """Collate; the Trainer wants a dictionary of the model's arguments."""
        ordered = sorted(samples, key=lambda sample: sample["picture"] is None)
        rows = [self._row(sample) for sample in ordered]
        shown = [Image.fromarray(s["picture"]) for s in ordered if s["picture"] is not None]
        keys = [str(number) for number in range(len(shown))]
        pixels = self.backbone.preprocess(shown, keys) if shown else None
        # A multiple of 8 keeps the CPU's matrix kernels on their fast path.
        width = -(-max(len(row["ids"]) for row in rows) // 8) * 8
        weights = _pad([row["weights"] for row in rows], width, 0.0)
        return {
            "batch": PackedBatch(
                prompts=[row["prompt"] for row in rows],
                pixels=pixels,
                text=[row["ids"] + [0] * (width - len(row["ids"])) for row in rows],
                labels=_pad([row["labels"] for row in rows], width, -100),
                weights=weights / weights.sum(),
                turns=_pad([row["turns"] for row in rows], width, -1),
                offsets=_pad([row["offsets"] for row in rows], width, 0),
                instruction=_pad([row["instruction"] for row in rows], width, False),
                shown=self._names([s for s in ordered if s["picture"] is not None]),
            )
        }

    def _row(self, sample: dict[str, Any]) -> dict[str, Any]:
        pictures = 0 if sample["picture"] is None else 1
        row: dict[str, Any] = {
            name: [] for name in ("ids", "labels", "weights", "turns", "offsets", "instruction")
        }
        prompt = Prompt((), (), ())
        for number, (question, answer) in enumerate(sample["turns"]):
            prompt = self.backbone.prompt(question, pictures, self.layout)
            reply = [*self._answer_ids(answer), self._eos]
            asked = len(prompt.after)
            length = asked + len(reply) - 1  # the end token is predicted, never read
            row["ids"] += [*prompt.after, *reply[:-1]]
            row["labels"] += [-100] * (asked - 1) + reply
            # Every turn counts the same however long its answer is; the end token, which is easy,
            # counts little. A token mean would leave yes and no untrained (spec
            # micro-feasibility 6).
            weights = [1.0] * (len(reply) - 1) + [EOS_WEIGHT]
            row["weights"] += [0.0] * (asked - 1) + [w / sum(weights) for w in weights]
            row["turns"] += [number] * length
            row["offsets"] += range(length)
            row["instruction"] += _between(prompt.after, self._template[pictures])
            row["instruction"] += [False] * (len(reply) - 1)
        return {**row, "prompt": prompt}

    def _names(self, samples: Sequence[dict[str, Any]]) -> Tensor | None:
        if not samples or "patch_names" not in samples[0]:
            return None
        names = {name for sample in samples for name in sample["patch_names"]}
        first = {name: self._answer_ids(name)[0] for name in names}
        rows = [[first[name] for name in sample["patch_names"]] for sample in samples]
        return _pad(rows, max(map(len, rows)), -100)

    def _answer_ids(self, answer: str) -> list[int]:
        tokenizer = self.backbone.processor.tokenizer
        return list(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"])


def _between(ids: Sequence[int], template: Sequence[int]) -> list[bool]:
    """Mark what is left of a prompt after its template's head and tail."""
    shared = min(len(ids), len(template))
    head = next((i for i in range(shared) if ids[i] != template[i]), shared)
    tail = next((i for i in range(shared - head) if ids[-1 - i] != template[-1 - i]), shared - head)
    return [head <= i < len(ids) - tail for i in range(len(ids))]


def _pad(rows: Sequence[Sequence[Any]], width: int, fill: Any) -> Tensor:
    padded = [[*row, *[fill] * (width - len(row))] for row in rows]
    return torch.tensor(padded)
