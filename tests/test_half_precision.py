"""Attention rows in half precision against the model's own eager attention (spec selective 1.5)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import untouched_inputs
from torch import Tensor

from etcbench.backbones import Backbone, load_backbone
from etcbench.compressor import Compressor, top_mask
from etcbench.decoder import Decoder
from etcbench.loading import LoadedTask, load_task
from etcbench.selection import Kind, Selection
from etcbench.states import LayerState

# Largest difference of a weight; bfloat16 has eight times the rounding error of float16.
LIMITS = {"float16": 2e-3, "bfloat16": 16e-3}
PICTURES = 12


class Watching(Compressor):
    """Keeps everything and notes the last prompt token's attention behind each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Tensor] = []
        self.visual = torch.empty(0)

    def select_hidden(self, state: LayerState) -> Selection | None:
        last = state.layout.last_valid()[:, None]
        self.rows.append(state.attention.weights(last).mean(1)[0, 0])
        self.visual = state.layout.is_kind(Kind.VISUAL)[0]
        return None


@pytest.fixture(scope="module")
def task() -> LoadedTask:
    """Questions of the micro world."""
    return load_task("vqav2", "micro")


@pytest.fixture(
    scope="module",
    params=[(model, dtype) for model in ("micro-llava", "micro-qwen3vl") for dtype in LIMITS],
    ids="-".join,
)
def models(request: pytest.FixtureRequest) -> Iterator[tuple[Backbone, Backbone, float]]:
    model, dtype = request.param
    sdpa, eager = (
        load_backbone(model, device="cpu", dtype=dtype, attention=attention)
        for attention in ("sdpa", "eager")
    )
    yield sdpa, eager, LIMITS[dtype]


@torch.inference_mode()
def test_rows_are_those_of_eager_attention(
    models: tuple[Backbone, Backbone, float], task: LoadedTask
) -> None:
    sdpa, eager, limit = models
    shared = chosen = 0
    docs = {doc.pictures[0].key: doc for doc in task.docs}
    for doc in list(docs.values())[:PICTURES]:
        watching = Watching()
        question = task.task.prompt(doc)
        prompt = sdpa.prompt(question, 1)
        pixels = sdpa.preprocess([doc.pictures[0].open()], [doc.pictures[0].key])
        visual = [sdpa.visual(pixels, watching, [(0, question)])]
        prefix = sdpa.assemble([prompt], visual, watching.learned_tokens())
        Decoder(sdpa, watching).whole(prefix, [prompt.after])
        count = int(watching.visual.sum())
        inputs = {
            name: value.to(eager.model.dtype) if value.is_floating_point() else value
            for name, value in untouched_inputs(eager, question, pixels).items()
        }
        own = eager.model(**inputs, output_attentions=True).attentions
        assert len(own) == len(watching.rows) == sdpa.spec.layers
        for row, weights in zip(watching.rows, own, strict=True):
            expected = weights[0, :, -1].float().mean(0)
            torch.testing.assert_close(row.float(), expected, atol=limit, rtol=0)
            best = [
                top_mask(scores[None], watching.visual[None], count // 3)[0]
                for scores in (row.float(), expected)
            ]
            shared += int((best[0] & best[1]).sum())
            chosen += count // 3
    if limit == LIMITS["float16"]:
        assert shared >= 0.99 * chosen
