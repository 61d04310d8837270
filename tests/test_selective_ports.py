"""Selective methods at the spec's sizes, with few tokens left, by preset and by option.

Tables of spec selective 1.3, 3.4, 5.4, 6.5, 7.3 and 10.1 on runs of both backbones: thin random
models of 32 and 28 layers on pictures of 576 tokens.
"""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_invariants import BACKBONES, Row, ask, prefix_of
from test_selective import LLAVA, MICRO, QWEN, build
from tiny import picture, tiny_llava, tiny_qwen3_vl

from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.catalog import methods
from etcbench.compressor import Budget, Compressor
from etcbench.decoder import Decoder, KVState
from etcbench.efficiency.closed_form import Request, close
from etcbench.efficiency.methods import sized
from etcbench.efficiency.shapes import Shape
from etcbench.errors import BudgetError, UsageError
from etcbench.options import typed_options
from etcbench.presets import NAMED
from etcbench.run import load_compressor
from etcbench.selection import Kind
from etcbench.sweep import Sweep

ROOT = Path(__file__).parents[1]
# Visual tokens from each layer on, by hand from the spec's tables.
TABLES: dict[str, list[tuple[str, str | None, dict[str, Any], dict[int, int]]]] = {
    "llava": [
        ("fastv", "192", {}, {0: 576, 2: 166}),
        ("fastv", "64", {}, {0: 576, 2: 30}),
        ("fastv", None, {"ratio": 0.75, "layer": 3}, {0: 576, 3: 144}),
        ("sparsevlm", "192", {}, {0: 576, 3: 309, 7: 204, 16: 113}),
        ("sparsevlm", "64", {}, {0: 576, 3: 82, 7: 32, 16: 18}),
        ("sparsevlm", "128", {"version": "2.0"}, {0: 576, 3: 238, 7: 108, 16: 60}),
        ("pdrop", "270", {}, {0: 576, 8: 288, 16: 144, 24: 72}),
        ("pdrop", "64", {}, {0: 576, 2: 66, 6: 30, 16: 17}),
        ("lightkv", None, {"layers": "12-18-24"}, {0: 576, 13: 288, 19: 145, 25: 73}),
        ("lightkv", "192", {}, {0: 576, 4: 288, 10: 145, 17: 73}),
        ("twigvlm", "64", {"decoding": "greedy"}, {0: 576, 2: 41, 24: 0}),
        ("twigvlm-pp", "128", {"decoding": "greedy"}, {0: 576, 2: 134, 24: 0}),
        ("visionzip", "64", {}, {0: 64}),
        ("explainc", "128", {"scores": "attention"}, {0: 128}),
    ],
    # 28 layers; the budgets are 1/3, 2/9 and 1/9 of the tokens (10.1, 1.10).
    "qwen3_vl": [
        ("fastv", "192", {}, {0: 576, 2: 162}),
        ("fastv", "64", {}, {0: 576, 2: 25}),
        ("sparsevlm", "192", {}, {0: 576, 3: 309, 6: 204, 14: 113}),
        ("sparsevlm", "64", {"version": "2.0"}, {0: 576, 3: 66, 6: 34, 14: 20}),
        ("pdrop", "128", {}, {0: 576, 2: 303, 5: 110, 14: 36}),
        ("lightkv", "192", {}, {0: 576, 4: 288, 8: 145, 15: 73}),
        ("lightkv", "64", {}, {0: 576, 1: 288, 2: 145, 3: 73, 4: 37, 20: 19}),
        ("twigvlm", "64", {"decoding": "greedy"}, {0: 576, 2: 34, 21: 0}),
        ("visionzip", "64", {}, {0: 64}),
        ("explainc", "64", {"scores": "attention"}, {0: 64}),
    ],
}
SIZED = [(family, *row) for family, rows in TABLES.items() for row in rows]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    path = tmp_path_factory.mktemp("deep")
    qwen = tiny_qwen3_vl(path / "qwen", layers=28)
    qwen.processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 96 * 96}
    return {"llava": tiny_llava(path / "llava", layers=32, side=96), "qwen3_vl": qwen}


def prefilled(backbone: Backbone, method: Compressor) -> KVState:
    prompt = backbone.prompt("why?", 1)
    pixels = backbone.preprocess([picture(0, (96, 96))], ["x"])
    visual = backbone.visual(pixels, method, [(0, "why?")])
    prefix = backbone.assemble([prompt], [visual], None)
    return Decoder(backbone, method).whole(prefix, [prompt.after])[0]


@torch.inference_mode()
@pytest.mark.parametrize(("family", "name", "tokens", "options", "table"), SIZED)
def test_caches_at_the_sizes_of_the_spec(
    deep: dict[str, Backbone],
    family: str,
    name: str,
    tokens: str | None,
    options: dict[str, Any],
    table: dict[int, int],
) -> None:
    """Groups 3, 6, 7 and 9: layer l holds N - M + n_l rows, and only text behind FinalWipe."""
    backbone = deep[family]
    prompt = backbone.prompt("why?", 1)
    text = sum(map(len, prompt.chunks)) + len(prompt.bridge) + len(prompt.after)
    kv = prefilled(backbone, build(name, tokens, backbone.spec, **options))
    expected, left = [], 0
    for layer in range(backbone.spec.layers):
        left = table.get(layer, left)
        expected.append(left)
    assert [entry.keys.shape[2] - text for entry in kv.entries] == expected
    layouts = [layout for layout in kv.layouts if layout is not None]
    assert [int(layout.is_kind(Kind.VISUAL).sum()) for layout in layouts] == expected
    if name == "lightkv":
        first = layouts[list(table)[1]]
        places = first.place[first.is_kind(Kind.VISUAL)].tolist()
        assert places == [place for place in range(576) if place % 24 % 2 == 1]


@pytest.mark.parametrize(
    ("name", "averages", "rounding"),
    [
        ("fastv", (192.0, 128.0, 64.0), 0.5),
        ("pdrop", (192.6, 127.0, 66.4), 0.05),
        # The spec's shares are those of exact halves; here 288 tokens leave 145, these 73.
        ("lightkv", (0.335 * 576, 0.223 * 576, 0.112 * 576), 1.1),
        ("twigvlm", (192.0, 128.0, 64.0), 0.5),
    ],
)
def test_averages_on_28_layers(
    name: str, averages: tuple[float, float, float], rounding: float
) -> None:
    """Spec 10.1 and 6.5."""
    for tokens, average in zip(("192", "128", "64"), averages, strict=True):
        table = build(name, tokens, QWEN).schedule(576, 28)
        assert sum(table) / 28 == pytest.approx(average, abs=rounding)


def test_sparsevlm_s_two_averages() -> None:
    """Spec 1.3 and 3.4: a budget's name is what leaves the layers, not what enters them."""
    llava = Shape.named("llava-hf/llava-1.5-7b-hf")
    shapes = {spec.name: replace(llava, spec=spec) for spec in (LLAVA, QWEN)}
    for spec, version, rows in (
        (LLAVA, "1.5", {192: 192.03, 128: 128.63, 96: 96.94, 64: 64.81}),
        (LLAVA, "2.0", {192: 192.44, 128: 128.00, 96: 96.81, 64: 64.44}),
        (QWEN, "2.0", {192: 193.6, 128: 129.6, 64: 68.6}),
    ):
        for tokens, average in rows.items():
            method = build("sparsevlm", str(tokens), spec, version=version)
            form = close(shapes[spec.name], method, Request((24, 24), 35, 0, 25))
            assert form.output_average == pytest.approx(average, abs=0.051)


# Few tokens --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return BACKBONES[request.param](tmp_path_factory.mktemp(request.param))


FEW = [
    ("fastv", {}),
    ("pdrop", {}),
    ("sparsevlm", {"version": "2.0"}),
    ("sparsevlm", {}),
    ("lightkv", {}),
    ("visionzip", {}),
    ("explainc", {"scores": "attention"}),
    ("twigvlm", {}),
    ("twigvlm-pp", {}),
]


@torch.inference_mode()
@pytest.mark.parametrize("left", [1, 2, 4])
@pytest.mark.parametrize(("name", "options"), FEW)
def test_few_tokens_are_left_or_it_is_said_why_not(
    backbone: Backbone, name: str, options: dict[str, Any], left: int
) -> None:
    """What is left in front of the last layers, or the budget that there is."""
    nearest = {
        # Recycling adds a merged token to the one that a stage keeps.
        ("sparsevlm", 1): ("kept:2 and up", 2),
        # Four windows of 9 tokens lose 4 each, one of 20 loses 10; more layers there are not.
        ("lightkv", 1): ("nearest is kept:10", 10),
        ("lightkv", 2): ("nearest is kept:10", 10),
        ("lightkv", 4): ("nearest is kept:10", 10),
    }
    said = nearest.get((name, left)) if options.get("version") != "2.0" else None
    kind = registry.load("baselines", name)
    # Half of how many, LightKV learns from the picture.
    if said is not None and (name != "lightkv" or backbone.spec.visual_tokens is not None):
        with pytest.raises(BudgetError, match=said[0]):
            kind.from_budget(Budget(left, "kept"), backbone.spec, **options)
        return
    method = kind.from_budget(Budget(left, "kept"), backbone.spec, **options)
    kv, logits = ask(backbone, method)
    counts = [int(count[0]) for count in kv.entered if count is not None]
    wiped = counts[:-1] if name.startswith("twig") else counts
    assert wiped[-1] == (left if said is None else said[1])
    assert torch.isfinite(logits).all()


# Options and presets -----------------------------------------------------------------------------

# Every alternative of the decision register (11) and of the methods, as on a command line.
OPTIONS: list[tuple[str, str | None, dict[str, str]]] = [
    ("fastv", "192", {"query": "all"}),
    ("fastv", "192", {"layer": "3"}),
    ("fastv", None, {"ratio": "0.5"}),
    *[("sparsevlm", "192", {"version": version}) for version in ("1.0", "1.5", "2.0")],
    ("sparsevlm", "192", {"merging": "sum"}),
    ("sparsevlm", "192", {"version": "2.0", "heads": "16"}),
    ("visionzip", "192", {"contextual": "20"}),
    ("visionzip", "192", {"projector": "tuned"}),
    ("pdrop", None, {"layers": "8-16-24", "ratios": "0.5-0.25-0.125"}),
    ("pdrop", "192", {"score": "last"}),
    *[("lightkv", "192", {"guidance": guidance}) for guidance in ("prompt", "random", "uniform")],
    *[("lightkv", "192", {"softmax_axis": axis}) for axis in ("query", "key")],
    *[("lightkv", "192", {"geometry": geometry}) for geometry in ("faithful", "true")],
    *[
        ("lightkv", None, {"layers": "12-18-24", "first_short_layer": first})
        for first in ("next", "listed")
    ],
    *[
        (name, "64", {"positions": positions})
        for name in ("pdrop", "sparsevlm", "lightkv")
        for positions in ("auto", "keep", "reindex")
    ],
    ("twigvlm", "64", {"query": "text"}),
    ("twigvlm", "64", {"layer": "3", "depth": "4", "wipe_layer": "32", "decoding": "greedy"}),
    ("twigvlm-pp", "21", {"reinforced_attention": "1.0", "rollouts": "8"}),
    ("explainc", "64", {"heads": "each", "kernel": "5", "activation": "gelu"}),
    ("explainc", "64", {"positions": "contiguous", "target": "probability"}),
]


@pytest.mark.parametrize(("name", "tokens", "texts"), OPTIONS)
def test_options_are_there(name: str, tokens: str | None, texts: dict[str, str]) -> None:
    kind = registry.load("baselines", name)
    spec = MICRO if name == "twigvlm-pp" else LLAVA
    method = build(name, tokens, spec, **typed_options({name: kind}, texts)[name])
    assert {key: str(getattr(method, key)) for key in texts} == texts


def test_the_defaults_are_those_of_the_register() -> None:
    """Spec 11, number by number."""

    def defaults(name: str) -> dict[str, Any]:
        return {f.name: f.default for f in fields(registry.load("baselines", name))}

    expected: dict[str, dict[str, Any]] = {
        "fastv": {"query": "last", "layer": 2},
        "sparsevlm": {"version": "1.5", "merging": "mean"},
        "visionzip": {"projector": "original"},
        "pdrop": {"score": "next", "layers": None},
        "lightkv": {
            "first_short_layer": "next",
            "guidance": "prompt",
            "softmax_axis": "query",
            "geometry": "faithful",
        },
        "twigvlm": {"query": "last", "draft_length": 5, "confidence": 0.6},
        "twigvlm-pp": {
            "reinforced_attention": 0.0,
            "rollouts": 32,
            "prediction_weight": 0.1,
            "attention_weight": 1.0,
            "width": 10,
            "children": 10,
            "tree_depth": 4,
            "nodes": 60,
        },
        "explainc": {
            "heads": "mean",
            "depth": 5,
            "kernel": 3,
            "activation": "relu",
            "positions": "keep",
            "target": "logit",
        },
    }
    for name, values in expected.items():
        assert values.items() <= defaults(name).items()
    voting = {
        spec.name: build("sparsevlm", "64", spec, version="2.0").voting for spec in (LLAVA, QWEN)
    }
    assert voting == {"llava-1.5-7b": 14, "qwen": 8}
    twig = build("twigvlm", "64", QWEN)
    assert (twig.first, twig.grown, twig.wiped) == (2, 3, 21)


@pytest.mark.parametrize("name", NAMED)
def test_presets_are_asked_for_by_their_name(name: str) -> None:
    """Spec 10.1: on LLaVA-1.5 as tabulated; the same fraction of another picture's tokens."""
    preset = NAMED[name]
    if preset.method != "twigvlm-pp":  # its gates are large; the counts are TwigVLM's
        table = sized(name, None, LLAVA).schedule(576, 32)
        assert sum(table) / 32 == pytest.approx(preset.input_average, abs=0.06)
    if preset.tokens is not None:
        assert preset.budget(MICRO) == Budget(round(preset.tokens / 9))
        assert preset.budget(QWEN) == Budget(preset.tokens)


def test_a_preset_is_its_method(backbone: Backbone) -> None:
    """On the tiny models 192 of 576 are 12 of 36; where pictures differ, a third of each."""
    fixed = backbone.spec.visual_tokens is not None
    found = load_compressor("pdrop-192", None, backbone)
    same = load_compressor("pdrop", 12 if fixed else "1/3", backbone)
    assert found.options == same.options and found.compressor.budget == same.compressor.budget
    assert found.compressor.name() == "pdrop"
    sweep = Sweep(["sparsevlm20-192", "fastv", "full"], (), [Budget(20), Budget(30)])
    assert [(name, str(budget)) for name, budget in sweep.variants()] == [
        ("sparsevlm20-192", "None"),
        ("fastv", "20"),
        ("fastv", "30"),
        ("full", "None"),
    ]
    assert sweep.build("sparsevlm20-192", None, backbone).options["version"] == "2.0"
    with pytest.raises(UsageError, match=r"pdrop-192: .* leave out --tokens"):
        Sweep(["pdrop-192", "full"], (), [Budget(20)]).variants()
    wrong: list[tuple[str, int | None, dict[str, Any], str]] = [
        ("pdrop-192", 64, {}, "leave out --tokens"),
        ("sparsevlm20-64", None, {"version": "1.5"}, "fixes version=2.0"),
        ("fastv-193", None, {}, "fastv-192"),
    ]
    for name, tokens, options, says in wrong:
        with pytest.raises(UsageError, match=says):
            load_compressor(name, tokens, backbone, **options)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fastv", {"ratio": 0.0}),
        ("pdrop", {"layers": "1-3", "ratios": "1.0-1.0"}),
        ("lightkv", {"layers": "0-2", "ratios": "0.0-0.0"}),
        ("twigvlm", {"wipe_layer": 4}),
    ],
)
def test_dropping_nothing_changes_nothing(
    backbone: Backbone, name: str, options: dict[str, Any]
) -> None:
    """Group 1 with the machinery at work: R = 0, ratios of one, rho = 0, R = M without a wipe."""
    budget = None if name != "twigvlm" else 36
    kv, found = ask(backbone, Row(name, budget, options).build(backbone))
    _, expected = ask(backbone, Compressor())
    assert torch.allclose(found, expected, atol=2e-4, rtol=2e-4)
    assert {int(count[0]) for count in kv.entered if count is not None} == {36}


@torch.inference_mode()
def test_visionzip_decodes_behind_the_shorter_prompt(backbone: Backbone) -> None:
    """Groups 4 and 10: contiguous (1.7); M-RoPE's positions stay those of the picture (4.8)."""
    method = Row("visionzip", 9).build(backbone)
    kv, logits = ask(backbone, method)
    full, _ = ask(backbone, Compressor())
    assert len(kv.layouts) == len(kv.entries) and kv.layouts[0] is not None
    shorter = kv.layouts[0].tokens
    assert shorter == full.entries[0].keys.shape[2] - 27
    first = shorter if backbone.planes == 1 else int(full.next_position[0])
    tokens = [7, 99]
    decoder = Decoder(backbone, method)
    for number, token in enumerate(tokens):
        logits = decoder.step(kv, torch.tensor([token]))
        for layout in kv.layouts:
            assert layout is not None
            assert layout.positions[:, 0, -1].tolist() == [first + number] * backbone.planes
    prefix, prompt = prefix_of(backbone, method)
    _, expected = decoder.whole(prefix, [[*prompt.after, *tokens]])
    assert torch.allclose(logits, expected, atol=2e-4, rtol=2e-4)


def test_presets_say_who_stated_them() -> None:
    listed = {row[0]: row[5] for row in methods().rows}
    assert "pdrop-official (published)" in listed["pdrop"]
    for name in ("pdrop-192", "pdrop-128", "pdrop-64"):
        assert f"{name} (unofficial)" in listed["pdrop"]
    assert "lightkv-64 (extrapolated)" in listed["lightkv"]
    assert "twigpp-64 (published)" in listed["twigvlm-pp"]
    # The split of 64 is the authors', those of 192 and 128 are a toolkit's (4.3).
    assert "visionzip-192 (unofficial)" in listed["visionzip"]
    assert "visionzip-64 (published)" in listed["visionzip"]


@pytest.mark.parametrize("file", sorted(ROOT.glob("baselines/*.py")), ids=lambda file: file.stem)
def test_a_method_is_one_short_file_of_plain_torch(file: Path) -> None:
    """Under 200 lines; nothing of transformers, of the backbones or of what runs a method."""
    text = file.read_text()
    assert len(text.splitlines()) < 200
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            above = ("backbones", "engine", "run", "decoder", "sweep", "cli", "training", "task")
            assert name.partition(".")[0] != "transformers"
            assert not name.startswith(tuple(f"etcbench.{part}" for part in above))
