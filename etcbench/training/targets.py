"""What a method learns from, computed once and trained on many times.

A method with a `training_example` is not trained on pictures and turns but on what the finished
model makes of them, e.g. how much each answer relies on each visual token. That costs far more
than a training step of the method, so it is computed once, in front of the stage, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from etcbench.attention import LayerAttention
from etcbench.backbones.base import Backbone, Prompt, Stream, Visual
from etcbench.compressor import Compressor
from etcbench.console import progress
from etcbench.decoder import Decoder
from etcbench.errors import UsageError
from etcbench.packing import PackedBatch, Packer, Shares
from etcbench.relevance import prompt_relevance
from etcbench.states import PromptState, RelevanceRule
from etcbench.training.model import CompressionModel
from etcbench.training.stage import Stage

PICTURES = 32  # pictures at a time while targets are computed


@dataclass
class ExampleBatch:
    """A batch of what a method noted.

    Attributes
    ----------
    examples : dict of str to Tensor, each of shape (batch, ...)
        What `Compressor.training_example` gave.
    shares : Shares
        What part of a step's mean the batch stands for.
    """

    examples: dict[str, Tensor]
    shares: Shares = field(default_factory=Shares)

    @property
    def pictures(self) -> int:
        """Examples; each shows one picture."""
        return len(next(iter(self.examples.values())))

    @property
    def samples(self) -> int:
        """Examples, too."""
        return self.pictures

    @property
    def answers(self) -> float:
        """Weight of the batch in a step: its examples."""
        return float(self.pictures)

    @property
    def tokens(self) -> int:
        """Positions of the language model's input: it does not run."""
        return 0


class Examples(Dataset[dict[str, Tensor]]):
    """Examples in a new random order in every pass.

    Parameters
    ----------
    examples : dict of str to Tensor, each of shape (examples, ...)
        All of them.
    length : int
        How many are drawn.
    seed : int
        Of the order.
    """

    def __init__(self, examples: dict[str, Tensor], length: int, seed: int) -> None:
        self.examples = examples
        count = len(next(iter(examples.values())))
        generator = torch.Generator().manual_seed(seed)
        passes = [torch.randperm(count, generator=generator) for _ in range(-(-length // count))]
        self.order = torch.cat(passes)[:length].tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[self.order[index]] for name, values in self.examples.items()}


def stack(samples: Sequence[dict[str, Tensor]]) -> dict[str, ExampleBatch]:
    """Stack examples; the Trainer wants a dictionary of the model's arguments."""
    names = samples[0]
    return {"batch": ExampleBatch({n: torch.stack([s[n] for s in samples]) for n in names})}


def computed(
    model: CompressionModel,
    stage: Stage,
    samples: Dataset[Any],
    packer: Packer,
    folder: Path,
    seed: int,
) -> Examples:
    """Make the data of a stage that trains on examples; they are computed or read by one process.

    Raises
    ------
    UsageError
        See `compute_examples`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with PartialState(cpu=device.type == "cpu").main_process_first():
        model.backbone.model.to(device)
        file = folder / "examples.safetensors"
        found = compute_examples(model.backbone, model.method, samples, packer, file)
    count = len(next(iter(found.values())))
    return Examples(found, stage.length(count) * stage.batch_size, seed)


def compute_examples(
    backbone: Backbone,
    compressor: Compressor,
    samples: Dataset[Any],
    packer: Packer,
    file: Path,
) -> dict[str, Tensor]:
    """Compute what the method notes on turns that the model answers as they say; or read it.

    Parameters
    ----------
    backbone, compressor : Backbone, Compressor
        The finished model; the method.
    samples : sequence of dict
        ``picture`` and ``turns``. Samples without a picture are left out; each turn is a prompt
        of its own.
    packer : Packer
        Makes batches of them.
    file : Path
        Where the result is kept; read if it is there.

    Returns
    -------
    dict of str to Tensor
        Tensors of shape (examples, ..., tokens), padded to the most tokens.

    Raises
    ------
    UsageError
        If the method notes nothing, or the model answers no turn as the data do.
    """
    if file.exists():
        return load_file(file)
    found: dict[str, list[Tensor]] = {}
    total: Any = samples
    with progress("computing targets", len(total)) as advance:
        for begin in range(0, len(total), PICTURES):
            part = [total[i] for i in range(begin, min(begin + PICTURES, len(total)))]
            for name, values in _noted(backbone, compressor, _prompts(part, packer)).items():
                found.setdefault(name, []).append(values.cpu())
            advance(len(part))
    if not found:
        raise UsageError(f"{backbone.spec.name} answers no turn of the training data as it says")
    examples = {name: _joined(parts) for name, parts in found.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    save_file(examples, unfinished)
    unfinished.rename(file)
    return examples


def _prompts(samples: Sequence[dict[str, Any]], packer: Packer) -> PackedBatch | None:
    single = [
        {**sample, "turns": [turn]}
        for sample in samples
        if sample["picture"] is not None
        for turn in sample["turns"]
    ]
    return packer(single)["batch"] if single else None


def _noted(
    backbone: Backbone, compressor: Compressor, batch: PackedBatch | None
) -> dict[str, Tensor]:
    """Let the method note what it wants of the rows that the model answers as the data do."""
    if batch is None or batch.pixels is None:
        return {}
    asked, replies = _parts(batch)
    decoder = Decoder(backbone, Compressor())
    with torch.no_grad():
        visual = backbone.visual(batch.pixels, compressor)
        right = _answered(decoder, batch.prompts, visual, asked, replies)
    if not right:
        return {}
    chosen = torch.tensor(right, device=backbone.device)
    prompts, visual = [batch.prompts[row] for row in right], visual.rows(chosen)
    with torch.no_grad():
        prefix = backbone.assemble(prompts, [visual], None)
        text = backbone.continue_text([asked[row] for row in right], prefix.next_position)
        stream, start = Stream.cat([prefix, text]), text.layout.next_position()
    answers = [replies[row][:-1] for row in right]

    def relevance(rule: RelevanceRule) -> Tensor:
        return prompt_relevance(decoder, stream, start, answers, rule)

    attention = LayerAttention(backbone, 0, stream, None)
    with torch.no_grad():
        noted = compressor.training_example(PromptState(stream.layout, attention, relevance))
    if noted is None:
        raise UsageError(f"{compressor.name()} notes no examples; leave out precompute")
    return noted


def _parts(batch: PackedBatch) -> tuple[list[list[int]], list[list[int]]]:
    """Split the text of single turns into question and answer, the end token included."""
    wanted = batch.labels >= 0
    first = wanted.int().argmax(1).tolist()
    asked = [ids[: begin + 1] for ids, begin in zip(batch.text, first, strict=True)]
    replies = [row[mask].tolist() for row, mask in zip(batch.labels, wanted, strict=True)]
    return asked, replies


def _answered(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    visual: Visual,
    asked: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
) -> list[int]:
    """Find the rows whose greedy answer is the given one: every token of it comes out on top."""
    backbone = decoder.backbone
    prefix = backbone.assemble(prompts, [visual], None)
    whole = [[*ask, *reply[:-1]] for ask, reply in zip(asked, replies, strict=True)]
    text = backbone.continue_text(whole, prefix.next_position)
    out = decoder.run(Stream.cat([prefix, text]), None, 0, decoder.layers, select=False)
    right = []
    for row, (ask, reply) in enumerate(zip(asked, replies, strict=True)):
        begin = prefix.layout.tokens + len(ask) - 1
        logits = backbone.logits(out.hidden[row, begin : begin + len(reply)])
        if logits.argmax(-1).tolist() == reply:
            right.append(row)
    return right


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Join along the first dimension, padding the last one."""
    width = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in parts]).contiguous()
