"""What must hold for every method on every backbone; a new method is one row in METHODS.

All on tiny random models in fp32 (design section 3).
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import picture, reference_inputs, tiny_llava, tiny_qwen3_vl
from torch import Tensor

import etcbench.engine
from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.compressor import Budget, Compressor
from etcbench.decoder import Decoder, KVState
from etcbench.doc import Doc, Picture
from etcbench.engine import Settings, answers
from etcbench.selection import Kind, Layout
from etcbench.task import Task

BACKBONES: dict[str, Callable[..., Backbone]] = {"llava": tiny_llava, "qwen3_vl": tiny_qwen3_vl}
TOKENS = 36  # visual tokens of a 24x24 picture on the tiny models


@dataclass(frozen=True)
class Row:
    """A method, a budget in its middle range, and how it is made to keep everything."""

    name: str
    tokens: int | None
    options: dict[str, Any] = field(default_factory=dict)
    keeps_all: int | None = TOKENS
    equals_full: bool = True  # at `keeps_all`; the others have a variant of their own below
    positions: str = "contiguous"  # of the survivors on a backbone with 1-D positions; or "keep"

    def build(self, backbone: Backbone, tokens: int | None = None) -> Compressor:
        torch.manual_seed(1)
        budget = tokens or self.tokens
        kind = registry.load("baselines", self.name)
        method: Compressor = kind.from_budget(
            None if budget is None else Budget(budget), backbone.spec, **self.options
        )
        return method

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


QFORMER = {"queries": 3, "width": 24, "depth": 3, "heads": 2}
METHODS = [
    Row("full", None, keeps_all=None),
    Row("blind", None, keeps_all=None, equals_full=False),
    Row("random", 9),
    Row("pool", 9),
    Row("downsample", 9),
    Row("fastv", 20, positions="keep"),
    Row("fastv", 20, {"layer": 1, "query": "all"}, positions="keep"),
    Row("visionzip", 10, equals_full=False),
    Row("visionzip", 5, {"contextual": 0}, equals_full=False),
    Row("voco", 2, equals_full=False, positions="keep"),
    Row("voco", 3, {"keep_prefix": False, "keep_bos": True}, equals_full=False, positions="keep"),
    Row("voco", 2, {"keep_prefix": True}, equals_full=False, positions="keep"),
    Row("etc", 1, equals_full=False, positions="keep"),
    Row("etc", 4, {"prompt": "standard", "keep_prefix": True}, equals_full=False, positions="keep"),
    Row(
        "fastv",
        None,
        {"layer": 1, "ratio": 0.5},
        keeps_all=None,
        equals_full=False,
        positions="keep",
    ),
    Row("pdrop", 20),
    Row("pdrop", None, {"layers": "1-3", "ratios": "0.5-0.25"}, keeps_all=None, equals_full=False),
    Row("sparsevlm", 20),
    Row("sparsevlm", 20, {"version": "2.0"}, positions="keep"),
    Row("sparsevlm", 12, {"version": "1.0"}),
    Row("lightkv", 20),
    Row("lightkv", 20, {"guidance": "random"}),
    Row("lightkv", 20, {"guidance": "uniform"}),
    Row("lightkv", 20, {"softmax_axis": "key"}),
    Row("explainc", 9, positions="keep"),
    # Contiguous positions are no M-RoPE positions even where nothing is dropped.
    Row("explainc", 9, {"heads": "each", "positions": "contiguous"}, equals_full=False),
    Row("explainc", 9, {"scores": "attention"}, positions="keep"),
    Row("twigvlm", 20, positions="keep"),
    Row(
        "twigvlm",
        20,
        {"depth": 2, "query": "text", "decoding": "greedy", "wipe_layer": 4},
        positions="keep",
    ),
    Row("twigvlm-pp", 20, positions="keep"),
    Row("quecc", 4, keeps_all=None, equals_full=False),
    Row("llama-vid", 2, QFORMER, keeps_all=None, equals_full=False),
    Row("llama-vid", 5, QFORMER, keeps_all=None, equals_full=False),
    Row("mqt-llava", 5, keeps_all=None, equals_full=False),
    Row("mqt-llava", 1, {"keys": "content"}, keeps_all=None, equals_full=False),
    Row("pdrop", 20, {"score": "last"}),
]


class Echo(Task):
    """A task whose prompt is its question."""

    name = "echo"
    max_new_tokens = 4

    def render(self, doc: Doc, style: str) -> str:
        return str(doc.fields["question"])


def encoded(seed: int, size: tuple[int, int]) -> Picture:
    stream = io.BytesIO()
    picture(seed, size).save(stream, "PNG")
    return Picture(stream.getvalue())


def samples() -> list[Doc]:
    """Several questions of different length on pictures of different shape, and one without."""
    shapes = [(24, 24), (30, 20), (16, 28), (24, 24)]
    docs = [
        Doc(f"{i}-{j}", str(i), (encoded(i, shape),), {"question": f"{'why ' * (j + i)}{j}?"}, None)
        for i, shape in enumerate(shapes)
        for j in range(3)
    ]
    return [*docs, Doc("text", "text", (), {"question": "only words"}, None)]


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return BACKBONES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def eager(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """The same weights under the reference implementation of attention."""
    family = backbone.spec.family
    model = BACKBONES[family](tmp_path_factory.mktemp(family), attention="eager")
    assert [backbone.attention, model.attention] == ["sdpa", "eager"]
    return model


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, backbone: Backbone, eager: Backbone) -> Backbone:
    return {"sdpa": backbone, "eager": eager}[request.param]


@pytest.fixture(params=METHODS, ids=str)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


def prefix_of(
    backbone: Backbone, method: Compressor, seed: int = 0, question: str = "what is it?"
) -> tuple[Any, Any]:
    """The assembled prefix of one picture for a question, and its prompt."""
    prompt = backbone.prompt(question, 1 if method.uses_image else 0, method.prompt_layout)
    visual = []
    if method.uses_image:
        pixels = backbone.preprocess([picture(seed)], [str(seed)])
        visual = [backbone.visual(pixels, method, [(0, question)])]
    return backbone.assemble([prompt], visual, method.learned_tokens()), prompt


def ask(
    backbone: Backbone, method: Compressor, question: str = "what is it?", seed: int = 0
) -> tuple[KVState, Tensor]:
    """Prefill one question in a single pass."""
    prefix, _ = prefix_of(backbone, method, seed, question)
    after = backbone.prompt(question, int(method.uses_image), method.prompt_layout).after
    return Decoder(backbone, method).whole(prefix, [after])


def points(positions: Tensor) -> set[tuple[int, ...]]:
    """Positions of shape (planes, tokens) as points."""
    return {tuple(point) for point in positions.T.tolist()}


def run(backbone: Backbone, method: Compressor, docs: Sequence[Doc], **how: Any) -> dict[str, Any]:
    found = {}
    for batch in answers(backbone, method, Echo(), docs, Settings(**how)):
        for answer in batch:
            assert answer.error is None, answer.error
            found[answer.doc.id] = (answer.response, answer.entering, answer.layer_average)
    return found


def close(first: Tensor, second: Tensor, tolerance: float = 2e-4) -> bool:
    return torch.allclose(first, second, atol=tolerance, rtol=tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("seed", [0, None])
def test_full_is_the_untouched_model(backbone: Backbone, eager: Backbone, seed: int | None) -> None:
    """Invariant 1: same logits as the model's forward, same answers as `generate`."""
    for model in (backbone, eager):
        method = registry.load("baselines", "full" if seed == 0 else "blind").from_budget(
            None, model.spec
        )
        kv, logits = ask(model, method)
        inputs = reference_inputs(model, "what is it?", seed)
        assert close(logits[0], model.model(**inputs).logits[0, -1])
        mine = Decoder(model, method).greedy(kv, logits, 8)[0]
        made = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
        new = made[inputs["input_ids"].shape[1] :].tolist()
        assert mine == [token for token in new if token not in model.eos_ids]


@torch.inference_mode()
@pytest.mark.parametrize("row", [row for row in METHODS if row.equals_full], ids=str)
def test_keeping_everything_changes_nothing(model: Backbone, row: Row) -> None:
    """Invariant 2; methods that have a documented variant of it are tested on that below."""
    full = registry.load("baselines", "full").from_budget(None, model.spec)
    _, expected = ask(model, full)
    _, found = ask(model, row.build(model, row.keeps_all))
    assert close(found, expected)


@torch.inference_mode()
def test_visionzip_with_all_patches_is_the_model_with_cls_in_front(backbone: Backbone) -> None:
    """Invariant 2, VisionZip: every patch and no contextual token; without CLS just the model."""
    if not backbone.spec.has_cls:
        row = Row("visionzip", TOKENS, {"contextual": 0})
        _, expected = ask(backbone, Row("full", None).build(backbone))
        assert close(ask(backbone, row.build(backbone))[1], expected)
        return
    method = registry.load("baselines", "visionzip").from_budget(
        Budget(TOKENS), backbone.spec, contextual=0
    )
    pixels = backbone.preprocess([picture(0)], ["x"])
    vision = backbone.encode(pixels)
    method.budget = Budget(TOKENS + 1)
    visual = backbone.project(vision, method.select_vision(vision))
    everything = backbone.model.model.multi_modal_projector(vision.features)
    assert close(visual.embeds, everything)
    assert visual.place[0, 0] == TOKENS


@torch.inference_mode()
def test_text_only_samples_are_those_of_the_model(model: Backbone, row: Row) -> None:
    """Invariant 2, learned-token methods: without a picture nothing is left of the method."""
    method = row.build(model)
    prompt = model.prompt("only words", 0, method.prompt_layout)
    prefix = model.assemble([prompt], [], method.learned_tokens())
    _, logits = Decoder(model, method).whole(prefix, [prompt.after])
    expected = model.model(**reference_inputs(model, "only words", None)).logits[0, -1]
    assert close(logits[0], expected)


def test_answers_do_not_depend_on_how_they_are_computed(
    backbone: Backbone, eager: Backbone, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 3: batch size, order of the samples, reuse, attention backend.

    Windows of nine samples let pictures of one come again in the next.
    """
    docs = samples()
    expected = run(backbone, row.build(backbone), docs, batch_size=1, reuse=False)
    monkeypatch.setattr(etcbench.engine, "WINDOW", 9)
    shuffled = random.Random(0).sample(docs, len(docs))
    for model, chosen in ((backbone, shuffled), (eager, shuffled[::3])):
        method, wanted = row.build(model), {doc.id: expected[doc.id] for doc in chosen}
        for size in (1, 3, 8):
            for reuse in (True, False):
                assert run(model, method, chosen, batch_size=size, reuse=reuse) == wanted


@torch.inference_mode()
def test_layers_hold_what_the_method_says(model: Backbone, row: Row) -> None:
    """Invariant 4: visual tokens at each layer's input; kept positions stay or are renumbered."""
    method = row.build(model)
    kv, _ = ask(model, method)
    counts = [int(count[0]) for count in kv.entered if count is not None]
    if row.options.get("version") == "1.0":  # the rank of the attention decides
        assert counts[0] == TOKENS and sorted(counts, reverse=True) == counts
    else:
        assert counts == method.schedule(TOKENS, model.spec.layers)
    prefix, _ = prefix_of(model, method)
    after = model.prompt("what is it?", int(method.uses_image), method.prompt_layout).after
    last = kv.layouts[-1]
    assert last is not None
    planes = last.positions[:, 0, last.valid[0]]
    if method.numbering == "reindex":
        assert torch.equal(planes, torch.arange(last.tokens).expand_as(planes))
        assert int(kv.next_position[0]) == int(prefix.next_position[0]) + len(after)
        return
    text = int(prefix.next_position[0]) + torch.arange(len(after))
    assert torch.equal(planes[:, -len(after) :], text.expand(model.planes, -1))
    assert points(planes[:, : -len(after)]) <= points(prefix.layout.positions[:, 0])
    if model.planes == 1 and row.positions == "contiguous":
        assert torch.equal(planes[0], torch.arange(last.tokens))
    if model.planes > 1:
        shown = prefix.layout.positions[:, prefix.layout.is_kind(Kind.VISUAL)]
        full, _ = prefix_of(model, Row("full", None).build(model))
        assert points(shown) <= points(full.layout.positions[:, 0])
    assert int(kv.next_position[0]) == int(planes.max()) + 1


@torch.inference_mode()
def test_single_pass_equals_prefill_evict_prefill(model: Backbone, row: Row) -> None:
    """Invariant 5, and the same for every method whose prefix is shared."""
    method = row.build(model)
    decoder = Decoder(model, method)
    prefix, prompt = prefix_of(model, method)
    _, once = decoder.whole(prefix, [prompt.after])
    shared = decoder.share(prefix)
    questions = [prompt.after, prompt.after[:-3]]
    kv, twice = decoder.question(shared.rows(torch.tensor([0, 0])), questions)
    assert close(twice[0], once[0])
    assert not close(twice[1], once[0])
    if method.learned_tokens() is not None and not getattr(method, "keep_prefix", False):
        for layout in kv.layouts:
            assert layout is not None
            assert not layout.is_kind(Kind.VISUAL).any()


@torch.inference_mode()
def test_the_question_reaches_the_kept_set_of_query_aware_methods_only(
    model: Backbone, row: Row
) -> None:
    """Invariant 6: kept places and cached states of the picture, for different questions."""
    method = row.build(model)

    def picture_part(question: str) -> tuple[list[list[int]], list[Tensor]]:
        kv, _ = ask(model, method, question)
        places, states = [], []
        for layout, layer in zip(kv.layouts, kv.cache.layers, strict=True):
            assert isinstance(layout, Layout)
            mine = layout.is_kind(Kind.VISUAL, Kind.LEARNED)[0]
            places.append(layout.place[0, mine].tolist())
            states.append(layer.keys[0, :, mine])
        return places, states

    asked = [picture_part(q) for q in ("a", "zzzz zz", "Is the cat near 5 of 7 dogs?", "!?")]
    if method.reuse in ("layers", "vision"):
        assert method.query_aware
        # A method that merges may keep the same places and mix them differently.
        assert any(
            places != asked[0][0] or not close(states[-1], asked[0][1][-1], 1e-3)
            for places, states in asked
        )
    else:
        for places, states in asked[1:]:
            assert places == asked[0][0]
            assert all(close(a, b, 1e-5) for a, b in zip(states, asked[0][1], strict=True))


def test_a_method_leaves_no_trace_on_the_model(backbone: Backbone, row: Row) -> None:
    """Invariant 7: state dict, hooks, attributes of modules."""

    def trace() -> dict[str, Any]:
        modules = dict(backbone.model.named_modules())
        return {
            name: (
                sorted(module.__dict__),
                len(module._forward_hooks) + len(module._forward_pre_hooks),
                type(module),
                module.forward.__func__,
            )
            for name, module in modules.items()
        }

    # transformers prepares a model once, when its inner states are first asked for.
    run(backbone, Row("full", None).build(backbone), samples()[:1])
    before, weights = trace(), copy.deepcopy(backbone.model.state_dict())
    run(backbone, row.build(backbone), samples()[:4], batch_size=4)
    assert trace() == before
    after = backbone.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
