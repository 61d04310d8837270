"""Selective methods: the spec's tables, hand-made cases, and how positions go on at decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_invariants import BACKBONES, ask, close, prefix_of
from tiny import picture, reference_inputs, tiny_llava
from torch import Tensor

from etcbench import registry
from etcbench.attention import LayerAttention
from etcbench.backbones import Backbone
from etcbench.compressor import Budget, Compressor, ModelSpec
from etcbench.decoder import Decoder
from etcbench.errors import BudgetError, UsageError
from etcbench.presets import PRESETS, Preset, presets_of, resolved
from etcbench.selection import Kind, Layout, Selection
from etcbench.states import LayerState

LLAVA = ModelSpec(
    "llava-1.5-7b", "llava", 32, 4096, 32, 32, 128, 11008, 576, (24, 24), 24, 1024, 16, True
)
QWEN = replace(LLAVA, name="qwen", family="qwen3_vl", layers=28, heads=16, has_cls=False, planes=3)
MICRO = replace(LLAVA, name="micro", layers=8, heads=4, visual_tokens=64, grid=(8, 8))


def build(name: str, tokens: str | None, spec: ModelSpec, **options: Any) -> Any:
    budget = None if tokens is None else Budget.parse(tokens)
    return registry.load("baselines", name).from_budget(budget, spec, **options)


def steps(method: Compressor, spec: ModelSpec) -> list[tuple[int, int]]:
    """(first layer, tokens) wherever the number changes."""
    assert spec.visual_tokens is not None
    table = method.schedule(spec.visual_tokens, spec.layers)
    assert len(table) == spec.layers
    return [(i, n) for i, n in enumerate(table) if i == 0 or n != table[i - 1]]


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return BACKBONES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_have_the_tabulated_average(preset: Preset) -> None:
    """Spec 10.1 and 3.4."""
    tokens = None if preset.tokens is None else str(preset.tokens)
    method = build(preset.method, tokens, LLAVA, **preset.options)
    table = method.schedule(576, 32)
    assert sum(table) / 32 == pytest.approx(preset.input_average, abs=0.06)
    assert preset in presets_of(preset.method)
    assert preset.command().startswith(f"--method {preset.method}")


@pytest.mark.parametrize(
    ("name", "tokens", "options", "terms"),
    [
        ("fastv", None, {"ratio": 0.5}, 2.007),
        ("fastv", "192", {}, 1.253),
        ("fastv", "128", {}, 0.836),
        ("fastv", "64", {}, 0.421),
        ("fastv", "kept:144", {"layer": 3}, 1.208),
        ("pdrop", "270", {}, 1.777),
        ("pdrop", None, {"layers": "8-16-24", "ratios": "0.5-0.25-0.125"}, 1.777),
        ("pdrop", "192", {}, 1.250),
        ("sparsevlm", "192", {}, 1.353),
        ("sparsevlm", "64", {}, 0.541),
        ("sparsevlm", "128", {"version": "2.0"}, 0.945),
        ("lightkv", None, {"layers": "12-18-24", "first_short_layer": "listed"}, 2.08),
        ("lightkv", None, {"layers": "12-18-24"}, 2.19),
        ("lightkv", "64", {}, 0.433),
        ("full", None, {}, 3.817),
        ("visionzip", "64", {}, 0.416),
        ("explainc", "192", {}, 1.253),
        ("explainc", "128", {}, 0.833),
        ("explainc", "64", {"scores": "attention"}, 0.416),
    ],
)
def test_visual_work_is_that_of_the_spec(
    name: str, tokens: str | None, options: dict[str, Any], terms: float
) -> None:
    """Spec 1.4 and 10.1: tera-MAC of the visual tokens."""
    table = build(name, tokens, LLAVA, **options).schedule(576, 32)
    d, m = LLAVA.hidden, LLAVA.mlp
    work = sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in table)
    assert work / 1e12 == pytest.approx(terms, abs=0.006 if terms > 2.05 else 0.001)


@pytest.mark.parametrize(
    ("name", "tokens", "options", "expected"),
    [
        ("sparsevlm", "192", {}, [(0, 576), (3, 309), (7, 204), (16, 113)]),
        ("sparsevlm", "128", {}, [(0, 576), (3, 312), (7, 117), (16, 39)]),
        ("sparsevlm", "96", {}, [(0, 576), (3, 249), (7, 55), (16, 27)]),
        ("sparsevlm", "64", {}, [(0, 576), (3, 82), (7, 32), (16, 18)]),
        ("sparsevlm", "64", {"version": "2.0"}, [(0, 576), (3, 66), (7, 34), (16, 20)]),
        ("pdrop", "270", {}, [(0, 576), (8, 288), (16, 144), (24, 72)]),
        ("pdrop", "kept:72", {}, [(0, 576), (8, 288), (16, 144), (24, 72)]),
        ("lightkv", "192", {}, [(0, 576), (4, 288), (10, 145), (17, 73)]),
        ("lightkv", "64", {}, [(0, 576), (1, 288), (2, 145), (3, 73), (4, 37)]),
        ("fastv", "64", {"layer": 3}, [(0, 576), (3, 11)]),
        ("fastv", "kept:30", {}, [(0, 576), (2, 30)]),
    ],
)
def test_counts_at_llavas_size(
    name: str, tokens: str, options: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    """Spec 1.3, 3.4, 5.4, 6.5."""
    method = build(name, tokens, LLAVA, **options)
    assert steps(method, LLAVA) == expected
    assert method.shared_layers == expected[1][0]


def test_counts_on_other_shapes() -> None:
    """Spec 10.1: layers and lists scale; a shallow decoder gets the true average."""
    assert [n for n, _ in steps(build("pdrop", "192", QWEN), QWEN)] == [0, 2, 5, 14]
    assert [n for n, _ in steps(build("sparsevlm", "64", QWEN), QWEN)] == [0, 3, 6, 14]
    assert [n for n, _ in steps(build("lightkv", "128", QWEN), QWEN)] == [0, 2, 3, 8]
    for name in ("pdrop", "sparsevlm", "lightkv", "fastv"):
        for tokens in (21, 32, 48):
            table = build(name, str(tokens), MICRO).schedule(64, 8)
            assert sum(table) / 8 == pytest.approx(tokens, abs=1)
            assert table == sorted(table, reverse=True)
    # Where the picture decides over the tokens, one is left of it even above the budget.
    assert build("fastv", "20", replace(QWEN, visual_tokens=None)).schedule(576, 28)[-1] == 1


def test_listed_layers_stand_at_the_same_share_of_the_depth() -> None:
    """Spec 6.5 and 10.1, `lightkv-55`: no layer behind which nothing could be shorter."""
    for spec, layers in ((LLAVA, "12-18-24"), (QWEN, "11-16-21"), (MICRO, "3-5-6")):
        assert resolved("lightkv-55", None, spec, {})[2] == {"layers": layers}
        assert build("lightkv", None, spec, layers=layers).places[-1] < spec.layers
    assert resolved("lightkv-55", None, replace(MICRO, layers=4), {})[2] == {"layers": "2"}
    table = build("lightkv", None, QWEN, layers="11-16-21").schedule(576, 28)
    assert sum(table) / 28 / 576 == pytest.approx(331.2 / 576, abs=0.02)
    with pytest.raises(UsageError, match="fixes layers=3-5-6"):
        resolved("lightkv-55", None, MICRO, {"layers": "12-18-24"})


def test_budgets_that_cannot_be_served_say_which_can() -> None:
    for name, tokens, says in (
        ("pdrop", "8", "9 to 64"),
        ("sparsevlm", "7", "10 to 64"),
        ("fastv", "16", "17 to 64"),
        ("lightkv", "9", "nearest is 18"),
        ("lightkv", "kept:2", "nearest is kept:9 of 64, 32, 17, 9"),
    ):
        with pytest.raises(BudgetError, match=says):
            build(name, tokens, MICRO)
    small = replace(QWEN, visual_tokens=35)
    with pytest.raises(BudgetError, match="3 to 35"):
        build("fastv", "2", small)
    assert build("fastv", "3", small).kept(35) == 1
    with pytest.raises(BudgetError, match="64, 128, 192, 576"):
        build("sparsevlm", "100", LLAVA, version="1.0")
    with pytest.raises(BudgetError, match="kept:2 and up"):  # one kept, one recycled
        build("sparsevlm", "kept:1", MICRO)
    for name, options in (("pdrop", {}), ("sparsevlm", {"version": "2.0"}), ("fastv", {})):
        for left in (1, 2, 4):
            assert steps(build(name, f"kept:{left}", MICRO, **options), MICRO)[-1][1] == left


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("fastv", {"ratio": 1.0}, "share dropped"),
        ("pdrop", {"layers": "8-16", "ratios": "0.5"}, "one per layer"),
        ("pdrop", {"layers": "8-x", "ratios": "0.5-0.2"}, "list like"),
        ("pdrop", {"layers": "8-40", "ratios": "0.5-0.2"}, "increase from 1 to 31"),
        ("lightkv", {"layers": "12-18", "windows": "4"}, "one for each"),
        ("lightkv", {"layers": "12", "ratios": "0.7"}, "within 0 and 0.5"),
    ],
)
def test_wrong_lists_are_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build(name, None, LLAVA, **options)
    if name != "pdrop" or len(options["layers"]) == len(options["ratios"]):
        with pytest.raises(UsageError, match=r"leave out --tokens|" + says):
            build(name, "192", LLAVA, **options)


@torch.inference_mode()
def test_rows_equal_eager_attention(
    backbone: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Spec 10.2 group 2: this layer's rows, and the next layer's from the stage output."""
    eager = BACKBONES[backbone.spec.family](tmp_path_factory.mktemp("rows"), attention="eager")
    inputs = reference_inputs(eager, "what is it?", 0)
    expected = eager.model(**inputs, output_attentions=True).attentions
    seen: list[LayerState] = []

    class Watch(Compressor):
        def select_hidden(self, state: LayerState) -> None:
            seen.append(state)

    ask(backbone, Watch())
    rows = torch.tensor([[3, 50, inputs["input_ids"].shape[1] - 1]])
    for layer, state in enumerate(seen):
        assert close(state.attention.weights(rows), expected[layer][:, :, rows[0]], 1e-5)
        if layer + 1 < len(expected):
            found = state.next_attention.weights(rows)
            assert close(found, expected[layer + 1][:, :, rows[0]], 1e-5)


@torch.inference_mode()
def test_rotary_response(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Spec 3.7: figures for a head of 128 and base 10000."""
    wide = tiny_llava(
        tmp_path_factory.mktemp("wide"),
        layers=1,
        kv_heads=1,
        hidden_size=128,
        num_attention_heads=1,
    )
    prefix = wide.text([[5] * 1801], Kind.PREFIX)
    found = LayerAttention(wide, 0, prefix, None).rotary_response(torch.tensor([[1800]]))[0, 0]
    response = found.flip(0)
    assert float(response[0]) == pytest.approx(11.31, abs=0.01)
    assert float(response[600]) == pytest.approx(2.35, abs=0.01)
    assert float(response[:700].min()) == pytest.approx(1.19, abs=0.01)
    assert int((response < 0).nonzero()[0, 0]) == 1707


# Method, options, and behind what a generated token stands where survivors are renumbered: the
# whole prompt or the layer's own tokens; None where they are not (spec 1.7).
DECODED: list[tuple[str, dict[str, Any], str | None]] = [
    ("fastv", {}, None),
    ("sparsevlm", {"version": "2.0"}, None),
    ("twigvlm", {"decoding": "greedy"}, None),
    ("twigvlm-pp", {"decoding": "greedy"}, None),
    ("pdrop", {}, "layer"),
    ("sparsevlm", {}, "layer"),
    ("sparsevlm", {"version": "1.0"}, "layer"),
    ("lightkv", {}, "prompt"),
    ("lightkv", {"guidance": "uniform"}, "prompt"),
]


class Replay(Compressor):
    """Repeats the selections of an earlier run on a prompt that is longer at its end."""

    def follow(self, method: Compressor) -> Replay:
        self.method, self.seen, self.longer = method, dict[int, Selection | None](), 0
        return self

    @property
    def numbering(self) -> Any:
        return self.method.numbering

    @property
    def branch(self) -> Any:
        return self.method.branch

    def mark(self, embeds: Tensor, layout: Layout) -> Tensor | None:
        return self.method.mark(embeds, layout)

    def select_hidden(self, state: LayerState) -> Selection | None:
        if not self.longer:
            self.seen[state.layer] = self.method.select_hidden(state)
        selection = self.seen[state.layer]
        if selection is None or not self.longer:
            return selection
        new = torch.arange(state.layout.tokens - self.longer, state.layout.tokens)[None]
        own = selection.own
        if own is not None:
            own = torch.cat([own, torch.ones(new.shape)], 1)
        return Selection(torch.cat([selection.index, new], 1), own, selection.extra)


@torch.inference_mode()
@pytest.mark.parametrize("positions", ["auto", "keep", "reindex"])
@pytest.mark.parametrize(("name", "options", "behind"), DECODED)
def test_decoding_goes_on_where_the_method_says(
    backbone: Backbone, name: str, options: dict[str, Any], behind: str | None, positions: str
) -> None:
    """Spec 10.2 groups 4 and 10: positions, and prefilling the answer instead of decoding it."""
    if behind is None and positions != "auto":
        return  # a method that always keeps positions
    if behind is not None:
        options = {**options, "positions": positions}
    method = build(
        name, "12" if options.get("version") == "1.0" else "20", backbone.spec, **options
    )
    kv, _ = ask(backbone, method)
    lengths = [layout.tokens for layout in kv.layouts if layout is not None]
    assert len(set(lengths)) > 1
    whole, _ = ask(backbone, Compressor())
    start = int(whole.next_position[0])
    assert (start == lengths[0]) == (backbone.planes == 1)  # M-RoPE counts a picture by its sides
    answer = [7, 99, 41]
    decoder = Decoder(backbone, method)
    for token in answer:
        logits = decoder.step(kv, torch.tensor([token]))
    anew = positions == "reindex" or (positions == "auto" and backbone.planes == 1)
    for layout, length in zip(kv.layouts, lengths, strict=True):
        assert layout is not None
        own = anew and behind == "layer" and length < lengths[0]
        first = torch.arange(3) + (length if own else start)
        assert torch.equal(layout.positions[:, 0, -3:], first.expand(backbone.planes, 3))
    frozen = Replay().follow(method)
    prefix, prompt = prefix_of(backbone, method)
    Decoder(backbone, frozen).whole(prefix, [prompt.after])
    frozen.longer = len(answer)
    _, expected = Decoder(backbone, frozen).whole(prefix, [[*prompt.after, *answer]])
    gap = anew and behind == "prompt"  # LightKV's, which is faithful (6.4)
    assert close(logits, expected) != gap


@torch.inference_mode()
@pytest.mark.parametrize("name", ["fastv", "pdrop", "sparsevlm", "lightkv"])
def test_the_budget_is_per_picture(backbone: Backbone, name: str) -> None:
    method = build(name, "20", backbone.spec)
    prompt = backbone.prompt("two?", 2)
    visual = [
        backbone.visual(backbone.preprocess([picture(seed)], [str(seed)]), method)
        for seed in (0, 1)
    ]
    prefix = backbone.assemble([prompt], visual, None)
    kv, _ = Decoder(backbone, method).whole(prefix, [prompt.after])
    counts = [int(count[0]) for count in kv.entered if count is not None]
    once = method.schedule(36, backbone.spec.layers)
    # the counts are solved for both pictures at once and round differently
    assert counts == pytest.approx([2 * n for n in once], abs=2)


@torch.inference_mode()
def test_lightkv_guidance(backbone: Backbone) -> None:
    """Noise hardly changes the mean, the prompt does."""

    def logits(question: str = "what is it?", **options: Any) -> Tensor:
        return ask(backbone, build("lightkv", "20", backbone.spec, **options), question)[1]

    uniform = logits(guidance="uniform")
    noisy, guided = logits(guidance="random"), logits()
    assert not torch.equal(noisy, uniform)
    assert (noisy - uniform).norm() < (guided - uniform).norm()
    assert torch.equal(noisy, logits(guidance="random"))
    assert not torch.equal(noisy, logits(guidance="random", seed=1))
