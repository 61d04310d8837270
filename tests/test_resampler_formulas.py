"""QueCC, LLaMA-VID and MQT-LLaVA against their equations, written out a second time.

Spec abstractive 3.1, 3.2, 4.1 and 5.1, on both backbones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from etcbench.baselines.mqt_llava import sine_cosine
from packed import BACKBONES
from tiny import picture

from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.compressor import Budget, Compressor, ModelSpec
from etcbench.states import VisionStates

LLAVA_7B = ModelSpec(
    "llava-1.5-7b", "llava", 32, 4096, 32, 32, 128, 11008, 576, (24, 24), 24, 1024, 16, True
)


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return BACKBONES[request.param](tmp_path_factory.mktemp(request.param))


def built(
    backbone: Backbone, name: str, tokens: int, **options: Any
) -> tuple[Compressor, VisionStates]:
    """A method, and what the tower makes of a picture of 6 x 6 tokens."""
    torch.manual_seed(1)
    kind = registry.load("baselines", name)
    with torch.no_grad():
        vision = backbone.encode(backbone.preprocess([picture(0)], ["x"]))
    return kind.from_budget(Budget(tokens), backbone.spec, **options), vision


@torch.no_grad()
def test_quecc_attends_from_each_window_to_itself(backbone: Backbone) -> None:
    method, vision = built(backbone, "quecc", 9, kernel=2)
    module: Any = method.module
    features = vision.patches[0]
    sources = torch.randn(1, 36, module.k_proj[0].in_features)
    question = torch.randn(1, backbone.spec.hidden)
    found = module(features, sources, question, vision, [(3, 3)])[0]
    query = module.q_proj(features + module.text_projection(question)[:, None])
    down = module.q_downsample(query.mT.unflatten(-1, (6, 6)))
    key, value = module.k_proj(sources), module.v_proj(sources)
    attention, heads = module.clip_attn, module.clip_attn.num_heads
    for row in range(3):
        for column in range(3):
            places = [(2 * row + y) * 6 + 2 * column + x for y in range(2) for x in range(2)]
            parts = (down[0, :, row, column][None], key[0, places], value[0, places])
            projected = [
                F.linear(part, weight, bias).unflatten(-1, (heads, -1)).transpose(0, 1)
                for part, weight, bias in zip(
                    parts,
                    attention.in_proj_weight.chunk(3),
                    attention.in_proj_bias.chunk(3),
                    strict=True,
                )
            ]
            q, k, v = projected
            seen = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
            expected = attention.out_proj(seen.transpose(0, 1).flatten(1))[0]
            assert torch.allclose(found[3 * row + column], expected, atol=1e-5)


def test_quecc_reads_the_published_layers() -> None:
    """Hidden states 12, 16, 22 and 23 of CLIP-L; 23 is the layer that LLaVA reads (spec 3.1)."""
    with torch.device("meta"):
        method: Any = registry.load("baselines", "quecc").from_budget(Budget(4), LLAVA_7B)
    assert method.numbers == [12, 16, 22, 23]


@torch.no_grad()
def test_the_context_token_is_what_the_queries_look_at(backbone: Backbone) -> None:
    """Spec 4.1, steps 2 and 4 to 6: CLS is read, and not looked for; values are raw features."""
    sizes = {"queries": 3, "width": 24, "depth": 2, "heads": 2}
    method, vision = built(backbone, "llama-vid", 2, **sizes)
    module: Any = method.module
    calls: list[tuple[Any, torch.Tensor]] = []
    handle = module.qformer.register_forward_hook(lambda _, given, out: calls.append((given, out)))
    pixels = backbone.preprocess([picture(0)], ["x"])
    made = backbone.visual(pixels, method, [(0, "what is it?")])
    handle.remove()
    ((given, found),) = calls
    assert torch.allclose(given[3], module.ln_vision(vision.features), atol=1e-5)
    assert given[3].shape[1] == 36 + vision.has_cls
    patches = vision.patches[0][0]
    scores = module.W_q(found[0]) @ module.W_k(patches).T / patches.shape[-1] ** 0.5
    looked = (scores.softmax(-1) @ patches).mean(0)
    assert torch.allclose(made.embeds[0, 0], module.W_v(looked), atol=1e-5)


@pytest.mark.parametrize("keys", ["position", "content"])
@torch.no_grad()
def test_mqt_is_one_attention_and_a_projection(backbone: Backbone, keys: str) -> None:
    """Spec 5.1: positions at the queries and, resized, as keys; no residual, MLP or norm behind."""
    method, vision = built(backbone, "mqt-llava", 5, queries=16, keys=keys)
    module: Any = method.module
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    table = module.pos_embed.T.unflatten(1, (4, 4))[None]
    places = F.interpolate(table, (6, 6), mode="bicubic", align_corners=False)[0].flatten(1).T
    features = vision.patches[0]
    key = places[None] if module.content is None else places[None] + module.content(features)
    out, _ = module.attn(
        module.ln_q(module.query[:5] + module.pos_embed[:5])[None],
        module.ln_k(key),
        module.ln_v(features),
    )
    made = backbone.visual(backbone.preprocess([picture(0)], ["x"]), method)
    assert torch.allclose(made.embeds, out @ module.proj, atol=1e-5)


def test_positions_encode_the_column_then_the_row() -> None:
    table = sine_cosine(4, 16).view(4, 4, 16)
    angles = 10000.0 ** -(torch.arange(4) / 4)
    for row, column in ((0, 3), (2, 1)):
        parts = [turn(place * angles) for place in (column, row) for turn in (torch.sin, torch.cos)]
        assert torch.allclose(table[row, column], torch.cat(parts), atol=1e-6)
