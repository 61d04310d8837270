"""TwigVLM and TwigVLM++: the spec's numbers, its formulas by hand, released weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_invariants import BACKBONES, Row, ask, close, prefix_of
from test_selective import LLAVA, MICRO, QWEN, build
from tiny import tiny_llava
from torch import Tensor

from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.checkpoints import load_method
from etcbench.compressor import Budget, Compressor
from etcbench.costs import layer_macs
from etcbench.decoder import Decoder
from etcbench.errors import BudgetError, UsageError
from etcbench.selection import Kind, Selection
from etcbench.states import LayerState
from etcbench.twig import PruningHead, visual_places


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return BACKBONES[request.param](tmp_path_factory.mktemp(request.param))


# Counts (spec 1.3, 7.3, 10.1) --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["twigvlm", "twigvlm-pp"])
def test_counts_of_the_spec(name: str) -> None:
    """R = 227/134/41; no picture from layer 24 on; 1.616/1.196/0.779 tera-MAC with the twig."""
    expected = {192: (227, 1.616), 128: (134, 1.196), 64: (41, 0.779)}
    for tokens, (kept, work) in expected.items():
        table = build(name, str(tokens), LLAVA).schedule(576, 32)
        assert table == [576] * 2 + [kept] * 22 + [0] * 8
        macs = sum(layer_macs(LLAVA, n, n) for n in [*table, *[576] * 3])
        assert macs / 1e12 == pytest.approx(work, abs=0.0006)
    method = build(name, "kept:41", LLAVA)
    assert method.schedule(576, 32) == build(name, "64", LLAVA).schedule(576, 32)
    assert (method.first, method.grown, method.shared_layers) == (2, 3, 2)


def test_counts_on_other_shapes() -> None:
    """Spec 7.3: 0.386/0.222/0.0585 of the tokens on 28 layers, K_f = 21."""
    for tokens, share in ((192, 0.386), (128, 0.222), (64, 0.0585)):
        method = build("twigvlm", str(tokens), QWEN)
        assert (method.first, method.grown, method.wiped) == (2, 3, 21)
        assert method.counts(576)[0] / 576 == pytest.approx(share, abs=1.5 / 576)
    shallow = build("twigvlm-pp", "21", MICRO)
    assert (shallow.first, shallow.grown, shallow.wiped, shallow.teacher) == (1, 1, 6, 5)
    assert build("twigvlm-pp", "64", LLAVA).teacher == 19
    assert shallow.schedule(64, 8) == [64] + [21] * 5 + [0] * 2
    assert build("twigvlm-pp", "64", LLAVA).reward_counts(576) == [41, 72, 103, 134, 165, 196, 227]


def test_wrong_options_and_budgets_say_what_is_right() -> None:
    with pytest.raises(BudgetError, match="37 to 432, 576, or kept:1"):
        build("twigvlm", "36", LLAVA)
    assert build("twigvlm", "37", LLAVA).counts(576) == (2, 0)
    with pytest.raises(BudgetError, match="37 to 432"):
        build("twigvlm", "433", LLAVA)
    for option, value, says in (
        ("depth", 31, "2 to 32"),
        ("layer", 0, "2 to 32"),
        ("wipe_layer", 2, "3 to 32"),
        ("query", "some", "last, text"),
        ("decoding", "beam", "speculative"),
        ("confidence", 1.5, "probability"),
    ):
        with pytest.raises(UsageError, match=says):
            build("twigvlm", "64", LLAVA, **{option: value})
    for option, value, says in (("query", "text", "one query"), ("nodes", 0, "at least 1")):
        with pytest.raises(UsageError, match=says):
            build("twigvlm-pp", "64", LLAVA, **{option: value})


@pytest.mark.parametrize("left", [1, 2, 4])
def test_few_tokens(backbone: Backbone, left: int) -> None:
    for name in ("twigvlm", "twigvlm-pp"):
        kind = registry.load("baselines", name)
        method = kind.from_budget(Budget(left, "kept"), backbone.spec)
        kv, _ = ask(backbone, method)
        assert [int(count[0]) for count in kv.entered if count is not None] == [36, left, left, 0]


# Scores (spec 7.2, 7.6) --------------------------------------------------------------------------


class Watched:
    """Keeps what the method is shown behind layer K - 1."""

    def __init__(self, method: Any) -> None:
        self.method, self.states = method, []
        self.select = method.select_hidden
        method.select_hidden = self.see

    def see(self, state: LayerState) -> Selection | None:
        self.states.append(state)
        chosen: Selection | None = self.select(state)
        return chosen


@torch.inference_mode()
def test_an_untrained_twig_votes_as_the_layers_that_it_copies(backbone: Backbone) -> None:
    """Spec 7.9: twig-init is the ablation that ranks by base layer K + T - 1 (full sequence)."""
    method = Row("twigvlm", 20, {"depth": 2}).build(backbone)
    seen = Watched(method)
    ask(backbone, method)
    state = seen.states[0]
    found = method.scores(state)
    plain = Decoder(backbone, Compressor())
    prefix, prompt = prefix_of(backbone, method)
    text = backbone.continue_text([prompt.after], prefix.next_position)
    stream = plain.run(type(prefix).cat([prefix, text]), None, 0, 2)
    row = stream.layout.last_valid()[:, None]
    expected = plain.attention(2, stream).weights(row).mean(1)[:, 0]
    assert close(found, expected, 1e-5)
    assert method.query == "last"
    text_rows = Row("twigvlm", 20, {"depth": 2, "query": "text"}).build(backbone)
    text_rows.attach(backbone)
    rows = torch.arange(stream.layout.tokens)[None]
    every = plain.attention(2, stream).weights(rows).mean(1)[0]
    behind = stream.layout.is_kind(Kind.SUFFIX)[0]
    assert close(text_rows.scores(state)[0], every[behind].mean(0), 1e-5)


@torch.inference_mode()
def test_the_pruning_head_is_the_formula(backbone: Backbone) -> None:
    """Spec 7.6, written out for every head and token; the best R of it stay."""
    method = Row("twigvlm-pp", 20).build(backbone)
    seen = Watched(method)
    kv, _ = ask(backbone, method)
    state, layer = seen.states[0], method.branch.layers[-1]
    spec, layout = backbone.spec, state.layout
    hidden = state.hidden
    for inner in method.branch.layers[:-1]:
        raise AssertionError(inner)  # one layer on the tiny models: its input is the twig's
    rotary = backbone.rotary(hidden, layout.positions)
    normed = layer.input_layernorm(hidden)
    query, key = (project(layer, normed, rotary) for project in (backbone.queries, backbone.keys))
    head = method.parts["pruning_head"]
    gate_q, gate_k = (
        (normed @ part.weight.T).relu() * (normed @ part.weight.T).sigmoid()
        for part in (head.query, head.key)
    )
    size, last = spec.head_dim, int(layout.last_valid()[0])
    places = visual_places(layout)[0]
    shares = torch.zeros(len(places))
    for h in range(spec.heads):
        g = h // (spec.heads // spec.kv_heads)
        q = query[0, h, last] * gate_q[0, last, h * size : (h + 1) * size]
        k = key[0, g, places] * gate_k[0, places, g * size : (g + 1) * size]
        shares += (k @ q / size**0.5).softmax(-1) / spec.heads
    found = head(state.branch, layout.last_valid()[:, None], layout)[0, 0]
    assert close(found, shares, 1e-5)
    assert torch.isclose(found.sum(), torch.tensor(1.0))
    assert close(method.scores(state)[0, places], shares, 1e-5)
    kept = kv.layouts[method.first]
    assert kept is not None
    best = layout.place[0, places[shares.topk(method.counts(36)[0]).indices]]
    mine = kept.place[kept.is_kind(Kind.VISUAL)]
    assert set(mine.tolist()) == set(best.tolist())


@torch.inference_mode()
def test_a_picture_counts_for_itself(backbone: Backbone) -> None:
    """Several pictures share R; a budget of all tokens leaves FinalWipe out (spec 10.2.1)."""
    method = Row("twigvlm", 20).build(backbone)
    assert method.counts(72, 2) == (44, 0)
    assert Row("twigvlm", 36).build(backbone).schedule(36, 4) == [36] * 4


# Released weights (spec 7.9) ---------------------------------------------------------------------

LLAMA_LAYER = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm",
    "post_attention_layernorm",
)  # fmt: skip


def released(backbone: Backbone, name: str, depth: int = 1) -> dict[str, Tensor]:
    """Exactly the keys of the published files, with shapes of the tiny model."""
    method = Row(name, 20, {"depth": depth}).build(backbone)
    method.attach(backbone)
    own = method.module.state_dict()
    keys = {
        f"model.layers.{t}.{part}.weight": f"twig.layers.{t}.{part}.weight"
        for t in range(depth)
        for part in LLAMA_LAYER
    }
    keys |= {"model.norm.weight": "twig.norm.weight", "lm_head.weight": "twig.head.weight"}
    if name == "twigvlm-pp":
        for side, part in (("q", "query"), ("k", "key")):
            gate = f"leaf_attention_module.{side}_gate.weight"
            keys[gate] = f"pruning_head.{part}.weight"
    assert set(keys.values()) == set(own)
    torch.manual_seed(7)
    return {theirs: torch.randn_like(own[ours]) for theirs, ours in keys.items()}


@pytest.mark.parametrize("name", ["twigvlm", "twigvlm-pp"])
def test_released_weights_load_by_their_names(tmp_path: Path, name: str) -> None:
    backbone = tiny_llava(tmp_path / "model")
    state = released(backbone, name, 2)
    folder = tmp_path / "released"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    method, _ = load_method(
        name, Budget(20), backbone, checkpoint=str(folder), options={"depth": 2}
    )
    loaded: Any = method.module
    own = loaded.state_dict()
    for key, value in state.items():
        ours = key.replace("model.", "twig.").replace("lm_head", "twig.head")
        ours = ours.replace("leaf_attention_module.q_gate", "pruning_head.query")
        assert torch.equal(
            own[ours.replace("leaf_attention_module.k_gate", "pruning_head.key")], value
        )
    for gone in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        save_file({k: v for k, v in state.items() if k != gone}, folder / "model.safetensors")
        with pytest.raises(UsageError, match=gone):
            load_method(name, Budget(20), backbone, checkpoint=str(folder), options={"depth": 2})
    surplus = {**state, "model.layers.2.mlp.up_proj.weight": state["lm_head.weight"].clone()}
    save_file(surplus, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"model.layers.2.mlp.up_proj.weight"):
        load_method(name, Budget(20), backbone, checkpoint=str(folder), options={"depth": 2})
    save_file({**state, "vision.weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"vision.weight"):
        load_method(name, Budget(20), backbone, checkpoint=str(folder), options={"depth": 2})


def test_the_gate() -> None:
    head = PruningHead(MICRO)
    x = torch.randn(2, MICRO.hidden)
    product = x @ head.key.weight.T
    assert torch.allclose(head.key(x), product.relu() * product.sigmoid())
    assert head.key.weight.shape == (MICRO.kv_heads * MICRO.head_dim, MICRO.hidden)
