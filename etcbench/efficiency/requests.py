"""What a measurement asks: a question on a picture, and its size in tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from etcbench.backbones import Backbone, Pixels, Prompt
from etcbench.backbones.stream import Stream, Visual
from etcbench.compressor import Compressor
from etcbench.decoder import Decoder
from etcbench.efficiency.closed_form import Request
from etcbench.kv import KVState, Shared
from etcbench.speculative import decode

QUESTION = "Is there a dog next to the red bicycle in the picture?"
PICTURE = (768, 768)  # width and height in pixels: 576 tokens on Qwen3-VL as on LLaVA
TEXT = (35, 25)  # LLaVA-1.5's prompt in front of the picture, and about 60 text tokens in all
NEW_TOKENS = 16


@dataclass(frozen=True)
class Workload:
    """The request that is measured.

    Attributes
    ----------
    picture : tuple of int
        Width and height of a picture of noise; what a method costs does not depend on what it
        shows.
    question : str
        The question on it.
    text : tuple of int
        Text tokens in front of the picture and behind it, for models without a tokenizer.
    new_tokens : int
        Tokens to generate.
    """

    picture: tuple[int, int] = PICTURE
    question: str = QUESTION
    text: tuple[int, int] = TEXT
    new_tokens: int = NEW_TOKENS

    def estimated(self, method: Compressor, grid: tuple[int, int]) -> Request:
        """Size without a tokenizer: the prompt that the method's layout makes of `text`."""
        before, after = self.text
        if not method.uses_image:
            return Request(grid, 0, 0, before + after)
        if method.prompt_layout == "standard":
            return Request(grid, before, 0, after)
        # BOS, picture, a line break, learned tokens, everything else (spec abstractive 2.2).
        return Request(grid, 1, 1, before + after - 1)


class Trial:
    """One method on a workload, step by step, for a batch of pictures.

    Parameters
    ----------
    backbone : Backbone
        The model.
    method : Compressor
        The method; ``wrap`` may put something in its place.
    workload : Workload
        What is asked.
    batch : int
        Different pictures, each with the same question.
    wrap : callable, optional
        Given the method, returns what the engine is to run in its place.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Compressor,
        workload: Workload,
        batch: int = 1,
        wrap: Callable[[Compressor], Compressor] | None = None,
    ) -> None:
        self.backbone, self.workload, self.batch = backbone, workload, batch
        if method.module is not None:
            method.attach(backbone)
            method.module.to(backbone.device)
        self.method = method if wrap is None else wrap(method)
        self.decoder = Decoder(backbone, self.method)
        shown = int(method.uses_image)
        self.prompt: Prompt = backbone.prompt(workload.question, shown, method.prompt_layout)

    @property
    def question_tokens(self) -> int:
        """Tokens of the bare question."""
        tokenizer = self.backbone.processor.tokenizer
        return len(tokenizer(self.workload.question)["input_ids"])

    @cached_property
    def pixels(self) -> Pixels:
        """The pictures, preprocessed."""
        width, height = self.workload.picture
        pictures, keys = [], []
        for number in range(self.batch):
            generator = torch.Generator().manual_seed(number)
            noise = torch.randint(0, 256, (height, width, 3), generator=generator)
            pictures.append(Image.fromarray(noise.byte().numpy()))
            keys.append(f"noise {number}")
        return self.backbone.preprocess(pictures, keys)

    @property
    def grid(self) -> tuple[int, int]:
        """Raster of the first uncompressed picture."""
        rows, columns = self.pixels.grid[0].tolist()
        return int(rows), int(columns)

    def visual(self) -> list[Visual]:
        """Encode the pictures, with what the method does in front of the decoder."""
        if not self.prompt.chunks:
            return []
        asked = [(number, self.workload.question) for number in range(self.batch)]
        return [self.backbone.visual(self.pixels, self.method, asked)]

    def prefix(self) -> Stream:
        """Encode the pictures and lay out the prefix."""
        return self.layout(self.visual())

    def layout(self, visual: list[Visual]) -> Stream:
        """Put text, visual and learned tokens in order."""
        learned = self.method.learned_tokens()
        return self.backbone.assemble([self.prompt] * self.batch, visual, learned)

    def prefill(self, prefix: Stream) -> tuple[KVState, Tensor]:
        """Prefill everything in a single pass."""
        return self.decoder.whole(prefix, [self.prompt.after] * self.batch)

    def share(self, prefix: Stream) -> Shared:
        """Prefill what serves every question on a picture."""
        return self.decoder.share(prefix)

    def ask(self, shared: Shared) -> tuple[KVState, Tensor]:
        """Prefill a question behind what is shared, of which the original stays."""
        rows = torch.arange(self.batch, device=self.backbone.device)
        return self.decoder.question(shared.rows(rows), [self.prompt.after] * self.batch)

    def generate(self, kv: KVState, logits: Tensor) -> int:
        """Generate the workload's tokens; returns how many there are, the prefill's included.

        Decoding goes on behind the end token, so that its length does not depend on the answer.
        """
        decode(self.decoder, kv, logits, self.workload.new_tokens, stops=False)
        return self.workload.new_tokens


def request_of(
    prompt: Prompt, grid: tuple[int, int], kv: KVState, question: int | None = None
) -> Request:
    """Read the sizes of a request from its prompt and from the first row of what was cached.

    Parameters
    ----------
    prompt : Prompt
        With one picture, or none.
    grid : tuple of int
        Raster of the uncompressed picture.
    kv : KVState
        After prefill.
    question : int, optional
        Tokens of the bare question.
    """
    entered = tuple(int(count[0]) for count in kv.entered if count is not None)
    return Request(
        grid=grid,
        before=sum(map(len, prompt.chunks)),
        bridge=len(prompt.bridge) if prompt.chunks else 0,
        after=len(prompt.after),
        entered=entered,
        question=question,
        marked=None if kv.marks is None else int(kv.marks[0].sum()),
    )
