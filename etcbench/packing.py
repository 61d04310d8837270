"""Training samples as sequences: one picture, and turns of question and answer behind it.

A sample is ``[prefix, picture, (learned tokens), turn_1, ..., turn_K]``. Independent turns each
continue from the picture at the same position and see no other turn, so K questions cost one
picture, and each is trained exactly as it is asked at evaluation. The turns of a conversation
follow one another and see those before, unless each has visual tokens of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from etcbench.backbones.base import Backbone, Pixels, Prompt
from etcbench.compressor import PromptLayout
from etcbench.errors import UsageError

EOS_WEIGHT = 0.1


@dataclass(frozen=True)
class Shares:
    """Factors of a batch's own means in the loss of a step that several batches make up.

    Attributes
    ----------
    answers : float or Tensor
        Of what is averaged over answers, as cross-entropy is.
    samples : float or Tensor
        Of what is averaged over samples, as ETC's auxiliary loss is; 0 for a placeholder.
    pictures : float or Tensor
        Of what is averaged over pictures.
    """

    answers: float | Tensor = 1.0
    samples: float | Tensor = 1.0
    pictures: float | Tensor = 1.0


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
    pictures : int
        Samples with a picture; a placeholder does not count.
    answers : float
        Sum of the weights before they were scaled to 1.
    tokens : int
        Positions of the language model's input that are not padding.
    shares : Shares
        What part of a step's mean the batch stands for; 1 where the batch is the whole step.
    questions : list of list of str
        What each row asks its picture, for methods that make visual tokens for a question: every
        turn, or the first of turns that follow one another.
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
    pictures: int = 0
    answers: float = 1.0
    tokens: int = 0
    shares: Shares = field(default_factory=Shares)
    questions: list[list[str]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Rows that are samples; a placeholder is none."""
        placeholder = self.pixels is not None and not self.pictures
        return len(self.prompts) - placeholder


@dataclass
class Packer:
    """Collates samples ``{"picture": image or None, "turns": [(question, answer), ...]}``.

    Parameters
    ----------
    backbone : Backbone
        Template, tokenizer and preprocessing.
    layout : {"standard", "image_first"}
        Order of the prompt's parts.
    conversation : bool
        Whether the turns of a sample continue one another, each seeing those before it, and every
        answer token counts the same; otherwise they are independent, and every turn counts the
        same.
    separate : bool
        Whether the turns of a conversation are nevertheless independent, for methods that make
        visual tokens for each; every answer token still counts the same.
    captions : bool
        Whether a sample is a picture and its caption, ended by a line break, and nothing else, as
        in LLaVA's first stage; the question is for methods that read it apart. A caption behind
        the bare picture has no token in front that could predict its first; that one is only read.
    max_length : int or None
        Tokens of prompt, picture and text at which a conversation is cut; the uncompressed picture
        counts, so that every method reads the same text.
    placeholder : bool
        Whether a batch of text only gets an empty picture that no loss counts. Processes that
        train together must run the same modules.
    """

    backbone: Backbone
    layout: PromptLayout = "standard"
    conversation: bool = False
    separate: bool = False
    captions: bool = False
    max_length: int | None = None
    placeholder: bool = False

    def __post_init__(self) -> None:
        tokenizer = self.backbone.processor.tokenizer
        self._eos = int(tokenizer.eos_token_id)
        self._template = {
            pictures: self.backbone.prompt("", pictures, self.layout).after for pictures in (0, 1)
        }
        self._chained = self.conversation and not self.separate
        self._next = self.backbone.continuation("", self.layout) if self._chained else ()
        # Where the template ends in a line break the answer follows without a space.
        end = tokenizer.decode(list(self._template[0][-1:]))
        self._space = "" if self.conversation and end.isspace() else " "

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, PackedBatch]:
        """Collate; the Trainer wants a dictionary of the model's arguments."""
        ordered = sorted(samples, key=lambda sample: sample["picture"] is None)
        real = sum(sample["picture"] is not None for sample in ordered)
        if self.placeholder and not real:
            ordered.insert(0, {"picture": Image.new("RGB", (64, 64)), "turns": [("", None)]})
        shown = [_image(s["picture"]) for s in ordered if s["picture"] is not None]
        keys = [str(number) for number in range(len(shown))]
        pixels = self.backbone.preprocess(shown, keys) if shown else None
        visual = [] if pixels is None else pixels.grid.prod(-1).tolist()
        visual += [0] * (len(ordered) - len(visual))
        rows = [self._row(s, count) for s, count in zip(ordered, visual, strict=True)]
        # A multiple of 8 keeps the CPU's matrix kernels on their fast path.
        width = -(-max(len(row["ids"]) for row in rows) // 8) * 8
        weights = _pad([row["weights"] for row in rows], width, 0.0)
        answers = float(weights.sum())
        return {
            "batch": PackedBatch(
                prompts=[row["prompt"] for row in rows],
                pixels=pixels,
                text=[row["ids"] + [0] * (width - len(row["ids"])) for row in rows],
                labels=_pad([row["labels"] for row in rows], width, -100),
                weights=weights / (answers or 1.0),
                turns=_pad([row["turns"] for row in rows], width, -1),
                offsets=_pad([row["offsets"] for row in rows], width, 0),
                instruction=_pad([row["instruction"] for row in rows], width, False),
                shown=self._names([s for s in ordered if s["picture"] is not None]),
                pictures=real,
                answers=answers,
                questions=[row["asked"] for row in rows],
                tokens=sum(_before(row["prompt"]) + len(row["ids"]) for row in rows) + sum(visual),
            )
        }

    def _row(self, sample: dict[str, Any], visual: int) -> dict[str, Any]:
        pictures = 0 if sample["picture"] is None else 1
        row: dict[str, Any] = {
            name: [] for name in ("ids", "labels", "weights", "turns", "offsets", "instruction")
        }
        prompt = Prompt((), (), ())
        # Without a picture nothing of a method's own order is left, as at evaluation.
        layout: PromptLayout = self.layout if pictures else "standard"
        for number, (question, answer) in enumerate(sample["turns"]):
            if number and self._chained:
                asked, template = self.backbone.continuation(question, layout), self._next
            else:
                prompt = self.backbone.prompt(question, pictures, layout)
                asked, template = prompt.after, self._template[pictures]
            reply = []
            if answer is not None:
                reply = [*self._answer_ids(answer, self._space, layout), self._eos]
            if self.captions and answer is not None:
                prompt, reply = self._caption(sample)
                asked = template = prompt.after
            self._extend(row, number, asked, reply)
            row["instruction"] += _between(asked, template)
            row["instruction"] += [False] * (len(row["ids"]) - len(row["instruction"]))
        if self._chained:
            row["offsets"] = list(range(len(row["ids"])))
            row["turns"] = [0] * len(row["ids"])
        if self.conversation and self.max_length is not None:
            room = max(self.max_length - visual - _before(prompt), 1)
            row = {name: values[:room] for name, values in row.items()}
        left = max(row["turns"], default=-1) + 1  # turns that the cut has left something of
        return {**row, "prompt": prompt, "asked": [q for q, _ in sample["turns"][:left]]}

    def _caption(self, sample: dict[str, Any]) -> tuple[Prompt, list[int]]:
        """Put a caption behind its picture, whose own markers stay."""
        if sample["picture"] is None or len(sample["turns"]) != 1:
            raise UsageError(
                "with captions each sample is a picture and one answer; leave captions out for "
                "conversations and text"
            )
        ((_, caption),) = sample["turns"]
        tokenizer = self.backbone.processor.tokenizer
        special, whole = set(tokenizer.all_special_ids), self.backbone.prompt("a", 1)
        marker = tuple(takewhile(special.__contains__, reversed(whole.chunks[0])))[::-1]
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        after = tuple(takewhile(special.__contains__, whole.after))
        reply = tokenizer(f"{caption}\n", add_special_tokens=False)["input_ids"]
        return Prompt(((*start, *marker),), (), after), list(reply)

    def _extend(
        self, row: dict[str, Any], number: int, asked: Sequence[int], reply: Sequence[int]
    ) -> None:
        """Append a turn; each position is labelled with the token that it must predict."""
        if self._chained and number:
            row["ids"].append(self._eos)  # the end of the answer before, which the next turn reads
            row["labels"].append(-100)
            row["weights"].append(0.0)
            row["instruction"].append(False)
        read = reply[:-1]  # the end token is predicted, and read only by a following turn
        wanted = reply if asked else reply[1:]
        row["ids"] += [*asked, *read]
        row["labels"] += [-100] * (len(asked) - 1) + ([*wanted] or [-100])
        row["weights"] += [0.0] * (len(asked) - 1) + (self._weights(len(wanted)) or [0.0])
        row["turns"] += [number] * (len(asked) + len(read))
        row["offsets"] += range(len(asked) + len(read))

    def _weights(self, reply: int) -> list[float]:
        """Weights of an answer's tokens, the end token being the last."""
        if self.conversation or not reply:
            return [1.0] * reply
        # Every turn counts the same however long its answer is; the end token, which is easy,
        # counts little. A token mean would leave yes and no untrained (spec micro-feasibility 6).
        weights = [1.0] * (reply - 1) + [EOS_WEIGHT]
        return [weight / sum(weights) for weight in weights]

    def _names(self, samples: Sequence[dict[str, Any]]) -> Tensor | None:
        if not samples or "patch_names" not in samples[0]:
            return None
        names = {name for sample in samples for name in sample["patch_names"]}
        first = {name: self._answer_ids(name)[0] for name in names}
        rows = [[first[name] for name in sample["patch_names"]] for sample in samples]
        return _pad(rows, max(map(len, rows)), -100)

    def _answer_ids(
        self, answer: str, space: str = " ", layout: PromptLayout = "standard"
    ) -> list[int]:
        if layout == "image_first":
            answer = answer.replace("\n", "")  # VoCo's normalisation, spec abstractive 2.2
        tokenizer = self.backbone.processor.tokenizer
        return list(tokenizer(f"{space}{answer}", add_special_tokens=False)["input_ids"])


def _image(picture: Any) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def _before(prompt: Prompt) -> int:
    """Count the text tokens around the picture, in front of the question."""
    return sum(map(len, prompt.chunks)) + len(prompt.bridge)


def _between(ids: Sequence[int], template: Sequence[int]) -> list[bool]:
    """Mark what is left of a prompt after its template's head and tail."""
    shared = min(len(ids), len(template))
    head = next((i for i in range(shared) if ids[i] != template[i]), shared)
    tail = next((i for i in range(shared - head) if ids[-1 - i] != template[-1 - i]), shared - head)
    return [head <= i < len(ids) - tail for i in range(len(ids))]


def _pad(rows: Sequence[Sequence[Any]], width: int, fill: Any) -> Tensor:
    padded = [[*row, *[fill] * (width - len(row))] for row in rows]
    return torch.tensor(padded)
