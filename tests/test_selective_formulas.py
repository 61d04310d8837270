"""Every selective method against its rule as the spec writes it, on both backbones.

What is left at each layer, where it stands and the logits behind the prompt (spec selective 10.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F
from test_invariants import BACKBONES, Row, ask, close
from test_selective import LLAVA, build
from tiny import picture
from torch import Tensor

from etcbench.backbones import Backbone
from etcbench.errors import UsageError
from etcbench.selection import Kind, top_mask
from etcbench.states import VisionStates

QUESTION = "Is the cat near the dog?"


@pytest.fixture(scope="module", params=BACKBONES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Backbone, plain.Plain]:
    backbone = BACKBONES[request.param](tmp_path_factory.mktemp(request.param))
    with torch.inference_mode():
        return backbone, plain.Plain(backbone, QUESTION)


def stages(method: Any) -> dict[int, int]:
    found = method.stages(36)
    return dict(zip(found.first_short, found.counts, strict=True))


# Method, budget, options, its rule, whether 1-D positions are renumbered.
Made = Callable[[plain.Plain, Any], plain.Rule]
CASES: list[tuple[str, int | None, dict[str, Any], Made, bool]] = [
    ("fastv", None, {"ratio": 0.6}, lambda *_: plain.fastv(2, 14), False),
    (
        "fastv",
        None,
        {"ratio": 0.5, "layer": 1, "query": "all"},
        lambda *_: plain.fastv(1, 18, everyone=True),
        False,
    ),
    (
        "pdrop",
        None,
        {"layers": "1-3", "ratios": "0.5-0.2"},
        lambda *_: plain.pdrop({1: 18, 3: 7}),
        True,
    ),
    (
        "pdrop",
        None,
        {"layers": "1-3", "ratios": "0.5-0.2", "score": "last"},
        lambda *_: plain.pdrop({1: 18, 3: 7}, raw=True),
        True,
    ),
    ("sparsevlm", 11, {}, lambda _, m: plain.sparsevlm(stages(m), "1.5", 2), True),
    (
        "sparsevlm",
        11,
        {"merging": "sum"},
        lambda _, m: plain.sparsevlm(stages(m), "1.5", 2, summed=True),
        True,
    ),
    ("sparsevlm", 20, {"version": "2.0"}, lambda _, m: plain.sparsevlm(stages(m), "2.0", 2), False),
    # Windows of 9, then 32 tokens on a raster of 6 x 6 whose windows hold 9, 9, 8 and 6.
    (
        "lightkv",
        None,
        {"layers": "0-2", "windows": "2-2", "ratios": "0.12-0.5"},
        lambda *_: plain.lightkv({1: (2, 0.12), 3: (2, 0.5)}, "query"),
        True,
    ),
    (
        "lightkv",
        None,
        {
            "layers": "1",
            "windows": "2",
            "ratios": "0.5",
            "softmax_axis": "key",
            "first_short_layer": "listed",
        },
        lambda *_: plain.lightkv({1: (2, 0.5)}, "key"),
        True,
    ),
    (
        "lightkv",
        None,
        {"layers": "1", "windows": "2", "ratios": "0.5", "guidance": "uniform"},
        lambda *_: plain.lightkv({2: (2, 0.5)}, None),
        True,
    ),
    (
        "lightkv",
        None,
        {"layers": "0-2", "windows": "2-2", "ratios": "0.12-0.5", "geometry": "true"},
        lambda p, _: plain.lightkv({1: (2, 0.12), 3: (2, 0.5)}, "query", p),
        True,
    ),
    (
        "twigvlm",
        20,
        {"depth": 2, "wipe_layer": 3},
        lambda p, m: plain.twig(p, m, 22, gated=False),
        False,
    ),
    (
        "twigvlm-pp",
        20,
        {"depth": 2, "wipe_layer": 3},
        lambda p, m: plain.twig(p, m, 22, gated=True),
        False,
    ),
    ("explainc", 9, {"scores": "attention"}, lambda *_: plain.explainc(9), False),
]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "tokens", "options", "made", "renumbers"),
    CASES,
    ids=[str(Row(name, tokens, options)) for name, tokens, options, _, _ in CASES],
)
def test_a_method_is_its_rule(
    pair: tuple[Backbone, plain.Plain],
    name: str,
    tokens: int | None,
    options: dict[str, Any],
    made: Made,
    renumbers: bool,
) -> None:
    backbone, reference = pair
    if options.get("geometry") == "true" and backbone.spec.grid is None:
        with pytest.raises(UsageError, match="no fixed raster"):
            Row(name, tokens, options).build(backbone)
        return
    for positions in ("auto", "reindex") if renumbers else ("auto",):
        chosen = {**options, "positions": positions} if renumbers else options
        method = Row(name, tokens, chosen).build(backbone)
        kv, logits = ask(backbone, method, QUESTION)
        rule = made(reference, method)
        # Auto keeps M-RoPE's positions (1.10).
        anew = renumbers and (backbone.planes == 1 or positions == "reindex")
        if name == "explainc":
            expected = reference.run(lambda seen: None, first=rule)
        else:
            expected = reference.run(rule, anew)
        for layer, layout in enumerate(kv.layouts):
            assert layout is not None
            visual = layout.is_kind(Kind.VISUAL)
            assert layout.place[visual].tolist() == reference.places[layer]
            assert torch.equal(layout.positions[:, 0], reference.positions[layer])
        assert len({tuple(places) for places in reference.places}) > (name != "explainc")
        assert close(logits[0], expected, 5e-4)


# VisionZip ---------------------------------------------------------------------------------------


def zipped(
    score: list[float], key: Tensor, features: Tensor, dominant: int, contextual: int, cls: bool
) -> tuple[list[int], Tensor, list[bool]]:
    """4.2 item by item: sources of the slots, their features, and which took nothing in."""
    first = int(cls)
    patches = range(first, len(features))
    chosen = sorted(sorted(patches, key=lambda j: -score[j])[: dominant - first])
    rest = [j for j in patches if j not in chosen]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    members: dict[int, list[int]] = {target: [] for target in targets}
    unit = F.normalize(key, dim=-1)
    for source in rest:
        if source not in targets:
            members[max(targets, key=lambda t: float(unit[t] @ unit[source]))].append(source)
    kept = [*range(first), *chosen]
    rows = [features[j] for j in kept]
    for target, sources in members.items():
        mean = sum((features[j] for j in sources), torch.zeros_like(features[0]))
        rows.append(features[target] + mean / max(len(sources), 1))
    empty = [False] * len(kept) + [not sources for sources in members.values()]
    return [*kept, *targets], torch.stack(rows), empty


@torch.inference_mode()
@pytest.mark.parametrize(("tokens", "contextual"), [(9, None), (30, 6)])
def test_visionzip_on_clip_is_its_rule(tmp_path: Any, tokens: int, contextual: int | None) -> None:
    """Spec 4.1, 4.2, and group 8: CLS first; a target without sources is the raw feature."""
    backbone = BACKBONES["llava"](tmp_path)
    eager = BACKBONES["llava"](tmp_path, attention="eager")
    method: Any = Row("visionzip", tokens, {"contextual": contextual}).build(backbone)
    pixels = backbone.preprocess([picture(0)], ["x"])
    tower = eager.model.model.vision_tower
    out = tower(pixels.tensors["pixel_values"], output_attentions=True, output_hidden_states=True)
    layer = tower.encoder.layers[-2]
    key = layer.self_attn.k_proj(layer.layer_norm1(out.hidden_states[-3]))[0]
    own, features, empty = zipped(
        out.attentions[-2][0, :, 0].sum(0).tolist(),
        key.unflatten(-1, (2, -1)).mean(1),
        out.hidden_states[-2][0],
        *method.split(36),
        cls=True,
    )
    visual = backbone.visual(pixels, method)
    assert visual.place[0].tolist() == [36, *(j - 1 for j in own[1:])]
    expected = backbone.model.model.multi_modal_projector(features)
    assert close(visual.embeds[0], expected)
    if tokens == 30:
        assert any(empty)


@torch.inference_mode()
def test_visionzip_on_qwen_is_its_rule(tmp_path: Any) -> None:
    """Spec 4.8: by attention received; contextual tokens stand at their own place."""
    backbone = BACKBONES["qwen3_vl"](tmp_path)
    method: Any = Row("visionzip", 12).build(backbone)
    pixels = backbone.preprocess([picture(0)], ["x"])
    vision = backbone.encode(pixels)
    received = vision.attention_rows(torch.arange(36))[0].mean(0).sum(0)
    own, features, _ = zipped(
        received.tolist(),
        vision.attention_keys()[0],
        vision.features[0],
        *method.split(36),
        cls=False,
    )
    visual = backbone.visual(pixels, method)
    order = sorted(range(len(own)), key=lambda slot: own[slot])
    assert visual.place[0].tolist() == sorted(own)
    assert close(visual.embeds[0], features[order])


@pytest.mark.parametrize(
    ("tokens", "split", "step"), [(64, (54, 10), 52), (128, (108, 20), 23), (192, (162, 30), 13)]
)
def test_visionzip_at_llavas_size(tokens: int, split: tuple[int, int], step: int) -> None:
    """Spec 4.3 and group 8, hand-made: the first patches dominate, one target takes all."""
    method = build("visionzip", str(tokens), LLAVA)
    assert method.split(576) == split
    rows = torch.arange(577, 0, -1.0).expand(1, 16, 1, 577)
    keys = torch.zeros(1, 577, 2)
    keys[..., 0] = 1.0  # all alike: of equal likenesses the first target is taken
    vision = VisionStates(
        torch.arange(577.0)[None, :, None],
        torch.tensor([[24, 24]]),
        ["x"],
        True,
        lambda _: rows,
        lambda: keys,
    )
    selection = method.select_vision(vision)
    dominant, contextual = split
    own = selection.index[0].tolist()
    targets = [dominant + step * number for number in range(contextual)]
    assert own == [*range(dominant), *targets] and len(own) == tokens
    values = selection.apply(vision.features)[0, :, 0].tolist()
    sources = [j for j in range(dominant, 577) if j not in targets]
    assert values[dominant] == pytest.approx(dominant + sum(sources) / len(sources))
    assert values[:dominant] + values[dominant + 1 :] == own[:dominant] + own[dominant + 1 :]


# Ties --------------------------------------------------------------------------------------------


def test_equal_scores_are_taken_in_order_and_rounding_does_not_decide() -> None:
    """The tie rule of all methods (`top_mask`): noise of the last bits changes no kept set."""
    scores = torch.tensor([[0.25, 0.5, 0.25, 0.125, 0.5, 0.25]])
    eligible = torch.ones(1, 6, dtype=torch.bool)
    expected = [True, True, False, False, True, False]
    assert top_mask(scores, eligible, 3)[0].tolist() == expected
    noise = torch.tensor([[-1.0, 1, 1, 0, -1, 1]]) * 2**-26
    assert top_mask(scores + noise, eligible, 3)[0].tolist() == expected
    assert top_mask(scores + noise * 2**8, eligible, 3)[0].tolist() != expected
    few = torch.tensor([[True, False, False, True, False, False]])
    assert top_mask(scores, few, 3)[0].tolist() == few[0].tolist()
    assert top_mask(scores.expand(2, 6), eligible, torch.tensor([0, 1])).sum(1).tolist() == [0, 1]
