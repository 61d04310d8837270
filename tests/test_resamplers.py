"""Visual tokens of a method's own: QueCC, LLaMA-VID, MQT-LLaVA (spec abstractive 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import picture, tiny_llava, tiny_qwen3_vl
from torch import Tensor

from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.backbones.questions import read_questions
from etcbench.backbones.stream import Visual
from etcbench.compressor import Budget, Compressor, ModelSpec
from etcbench.errors import UsageError
from etcbench.packing import Packer
from etcbench.selection import Kind
from etcbench.training import CompressionModel

BACKBONES: dict[str, Any] = {"llava": tiny_llava, "qwen3_vl": tiny_qwen3_vl}
SMALL = {"queries": 3, "width": 24, "depth": 3, "heads": 2}
# name, budget, options
METHODS: list[tuple[str, int, dict[str, Any]]] = [
    ("quecc", 4, {}),
    ("llama-vid", 2, SMALL),
    ("llama-vid", 5, SMALL),
    ("mqt-llava", 5, {}),
]


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return BACKBONES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=METHODS, ids=lambda case: f"{case[0]}-{case[1]}")
def method(request: pytest.FixtureRequest, backbone: Backbone) -> Compressor:
    return build(backbone, *request.param)


def build(backbone: Backbone, name: str, tokens: int | None, options: Any = None) -> Compressor:
    torch.manual_seed(1)
    budget = None if tokens is None else Budget(tokens)
    kind = registry.load("baselines", name)
    made: Compressor = kind.from_budget(budget, backbone.spec, **(options or {}))
    return made


def tokens_of(
    backbone: Backbone, method: Compressor, questions: list[str], shape: tuple[int, int] = (24, 24)
) -> Visual:
    """Visual tokens of one picture for several questions."""
    pixels = backbone.preprocess([picture(0, shape)], ["x"])
    with torch.inference_mode():
        return backbone.visual(pixels, method, [(0, question) for question in questions])


def sample(index: int, turns: int) -> dict[str, Any]:
    rng = np.random.default_rng(index)
    asked = [(f"what {'is ' * k}it?", f"a{'b' * int(rng.integers(4))}") for k in range(turns)]
    shape = [(24, 24), (16, 28), (30, 20)][index % 3]
    shown = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    return {"picture": None if index % 5 == 4 else shown, "turns": asked}


def test_packed_turns_give_the_loss_of_each_turn_alone(
    backbone: Backbone, method: Compressor
) -> None:
    """Each turn sees the tokens made for it, at the positions that they have alone."""
    model = CompressionModel(backbone, method)
    packer = Packer(backbone, method.prompt_layout)
    samples = [sample(index, 1 + index % 3) for index in range(5)]
    with torch.no_grad():
        packed = model(**packer(samples))["ce"]
        single = [
            model(**packer([{"picture": s["picture"], "turns": [turn]}]))["ce"]
            for s in samples
            for turn in s["turns"]
        ]
    assert torch.allclose(packed, torch.stack(single).mean(), atol=1e-5)


def changed(before: Visual, after: Visual) -> list[int]:
    """Numbers of the tokens whose embeddings differ."""
    return ((before.embeds - after.embeds).abs().amax(-1) > 1e-6)[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("tokens", [36, 9, 4, 1])
def test_quecc_makes_a_token_of_each_window(backbone: Backbone, tokens: int) -> None:
    """Acceptance 8: a patch reaches the one token whose window it is in."""
    method = build(backbone, "quecc", tokens)
    side = round(tokens**0.5)
    vision = backbone.encode(backbone.preprocess([picture(0)], ["x"]))
    sources = vision.patches[0].repeat(1, 1, 4)
    question = torch.randn(1, backbone.spec.hidden)
    coarse = [(side, side)]

    def run(features: Tensor, multi: Tensor) -> Tensor:
        with torch.inference_mode():
            return method.module(features, multi, question, vision, coarse)[0]

    features = vision.patches[0]
    before = run(features, sources)
    assert before.shape[0] == tokens
    for place in (0, 7, 20, 35):
        other, multi = features.clone(), sources.clone()
        other[0, place] += 1.0
        multi[0, place] += 1.0
        moved = ((run(other, multi) - before).abs().amax(-1) > 1e-6).nonzero()[:, 0].tolist()
        row, column = (place // 6) * side // 6, (place % 6) * side // 6
        assert moved == [row * side + column]


@pytest.mark.parametrize("family", BACKBONES)
def test_quecc_serves_the_published_budgets(tmp_path: Path, family: str) -> None:
    """Acceptance 8: 64, 36, 16, 4 and 1 tokens of a 24 x 24 raster."""
    own = family == "llava"  # elsewhere a kernel is sized for 32 x 32 tokens
    backbone = tiny_llava(tmp_path, side=96) if own else tiny_qwen3_vl(tmp_path)
    if not own:
        areas = {"shortest_edge": 64, "longest_edge": 96 * 96}
        backbone.processor.image_processor.size = areas
    kernels = (3, 4, 6, 12, 24) if own else (4, 5, 8, 16, 32)
    assert backbone.preprocess([picture(0, (96, 96))], ["x"]).grid.tolist() == [[24, 24]]
    for tokens, kernel in zip((64, 36, 16, 4, 1), kernels, strict=True):
        method = build(backbone, "quecc", tokens)
        made = tokens_of(backbone, method, ["what?"], (96, 96))
        assert made.embeds.shape[1] == tokens and bool((made.place >= 0).all())
        assert (method.kernel, method.schedule(576, 2)) == (kernel, [tokens, tokens])


def test_quecc_downsamples_by_a_depthwise_convolution(backbone: Backbone) -> None:
    """Its windows are those of a convolution whose stride is its kernel."""
    module = build(backbone, "quecc", 9).module
    if backbone.spec.grid is None:  # sized for pictures of any shape, and resized to this one's
        module = build(backbone, "quecc", 9, {"kernel": 2}).module
    values = torch.randn(2, 36, backbone.spec.feature_width)
    index, kernel = module._windows((6, 6), (3, 3))
    found = (values[:, index] * kernel).sum(2) + module.q_downsample.bias
    expected = module.q_downsample(values.mT.unflatten(-1, (6, 6))).flatten(2).mT
    assert torch.allclose(found, expected, atol=1e-5)


def test_questions_are_read_alone_however_they_are_batched(backbone: Backbone) -> None:
    """Acceptance 9: padding does not change what the language model makes of a question."""
    texts = ["a", "is there a dog in the picture?", "", "a"]
    together = read_questions(backbone, texts)
    states, (words, present) = together.states(), together.words()
    for number, text in enumerate(texts):
        alone = read_questions(backbone, [text])
        assert torch.allclose(alone.states()[0], states[number], atol=1e-5)
        assert torch.equal(alone.words()[0][0], words[number, present[number]])
    assert not torch.allclose(states[0], states[1], atol=1e-3)
    assert torch.equal(states[0], states[3])
    ids = torch.tensor([backbone.processor.tokenizer(texts[1])["input_ids"]])
    text_model = backbone.model.get_decoder()
    with torch.no_grad():
        expected = text_model(input_ids=ids).last_hidden_state[0, -1]
    assert torch.allclose(states[1], expected, atol=1e-4)
    assert not states.requires_grad and not words.requires_grad


def test_the_question_makes_the_tokens(backbone: Backbone) -> None:
    """Acceptance 9 and 10: all of QueCC's, of LLaMA-VID's the context token only."""
    questions = ["is it red?", "how many dogs?"]
    quecc = tokens_of(backbone, build(backbone, "quecc", 4), questions)
    assert changed(quecc.rows(torch.tensor([0])), quecc.rows(torch.tensor([1]))) == [0, 1, 2, 3]
    for tokens in (2, 5):
        made = tokens_of(backbone, build(backbone, "llama-vid", tokens, SMALL), questions)
        assert changed(made.rows(torch.tensor([0])), made.rows(torch.tensor([1]))) == [0]


def test_a_method_that_reads_the_question_must_be_told(backbone: Backbone) -> None:
    pixels = backbone.preprocess([picture(0)], ["x"])
    with pytest.raises(UsageError, match="quecc reads the question"):
        backbone.visual(pixels, build(backbone, "quecc", 4))


@pytest.mark.parametrize(("compress", "tokens"), [("null", 37), ("mean", 2), ("grid:2", 5)])
def test_llama_vid_counts_the_context_token(backbone: Backbone, compress: str, tokens: int) -> None:
    """Acceptance 10: 1 + n_c, and the content is the model's own tokens, pooled."""
    method = build(backbone, "llama-vid", None, {"compress": compress, **SMALL})
    made = tokens_of(backbone, method, ["what?"])
    assert made.place.shape == (1, tokens) and bool((made.place >= 0).all())
    assert method.schedule(36, 2) == [tokens, tokens]
    pixels = backbone.preprocess([picture(0)], ["x"])
    with torch.inference_mode():
        vision = backbone.encode(pixels)
    patches, side = vision.patches[0], {"null": 6, "mean": 1, "grid:2": 2}[compress]

    def pooled(features: Tensor) -> Tensor:
        raster = features.mT.unflatten(-1, (6, 6))
        return torch.nn.functional.avg_pool2d(raster, 6 // side).flatten(2).mT

    with torch.inference_mode():
        assert torch.allclose(made.embeds[:, 1:], vision.project(pooled(patches)), atol=1e-5)
        for found, features in zip(made.deepstack, vision.deepstack, strict=True):
            assert torch.allclose(found[:, 1:], pooled(features), atol=1e-5)
            assert not found[:, 0].any()
    if backbone.spec.grid is not None:
        assert build(backbone, "llama-vid", tokens, SMALL).side == method.side


def test_llama_vid_may_count_the_content_alone(backbone: Backbone) -> None:
    """Register L1: as papers do that tabulate LLaMA-VID at 4 tokens; there are 5."""
    method = build(backbone, "llama-vid", 4, {"counts": "content", **SMALL})
    assert tokens_of(backbone, method, ["what?"]).place.shape == (1, 5)
    assert method.schedule(36, 1) == [5]
    with pytest.raises(UsageError, match="it can make 1, 4, 9"):
        build(backbone, "llama-vid", 5, {"counts": "content", **SMALL})


@pytest.mark.parametrize("keys", ["position", "content"])
def test_mqt_budgets_are_nested(backbone: Backbone, keys: str) -> None:
    """Acceptance 11: the first m tokens of all."""
    many = build(backbone, "mqt-llava", 16, {"keys": keys})
    few = build(backbone, "mqt-llava", 3, {"keys": keys})
    few.module.load_state_dict(many.module.state_dict())
    made = tokens_of(backbone, many, [""])
    assert torch.allclose(tokens_of(backbone, few, [""]).embeds, made.embeds[:, :3], atol=1e-6)


def test_mqt_attends_alike_to_every_picture(backbone: Backbone) -> None:
    """Acceptance 11: with keys of positions only the tokens are linear in the features."""
    module = build(backbone, "mqt-llava", 4).module
    grid, present = torch.tensor([[6, 6]]), torch.ones(1, 36, dtype=torch.bool)
    a, b = (torch.randn(1, 36, backbone.spec.feature_width) for _ in range(2))
    for part in (a, b):  # each patch normalised, so that the norm of the values does nothing
        part.sub_(part.mean(-1, keepdim=True)).div_(part.std(-1, unbiased=False, keepdim=True))
    with torch.inference_mode():
        first, second = (module(x, present, grid, 4) for x in (a, b))
        module.ln_v = torch.nn.Identity()
        middle = module((a + b) / 2, present, grid, 4)
    assert torch.allclose(middle, (first + second) / 2, atol=1e-4)
    assert not torch.allclose(first, second, atol=1e-2)


def test_mqt_draws_its_tokens_in_training_only(backbone: Backbone) -> None:
    method = build(backbone, "mqt-llava", 4, {"queries": 16})
    assert tokens_of(backbone, method, [""]).place.shape[1] == 4
    method.module.train()
    drawn = {tokens_of(backbone, method, [""]).place.shape[1] for _ in range(200)}
    assert drawn == set(range(2, 17, 2))
    method.module.eval()
    assert tokens_of(backbone, method, [""]).place.shape[1] == 4


def test_tokens_stand_like_a_picture_of_as_many(backbone: Backbone) -> None:
    """Consecutive positions in 1-D; with M-RoPE a raster of tokens behind the lead."""
    raster = [(0, row, column) for row in range(2) for column in range(2)]
    cases: list[tuple[str, int, Any, list[tuple[int, int, int]], int]] = [
        ("quecc", 4, {}, raster, 2),
        ("mqt-llava", 3, {}, [(0, 0, 0), (0, 1, 1), (0, 2, 2)], 3),
        ("llama-vid", 5, SMALL, [(0, 0, 0), *((0, r + 1, c + 1) for _, r, c in raster)], 3),
    ]
    prompt = backbone.prompt("what?", 1)
    for name, tokens, options, steps, extent in cases:
        visual = tokens_of(backbone, build(backbone, name, tokens, options), ["what?"])
        prefix = backbone.assemble([prompt], [visual], None)
        start = len(prompt.chunks[0])
        shown = prefix.layout.is_kind(Kind.VISUAL)[0]
        found = prefix.layout.positions[:, 0, shown].T.tolist()
        if backbone.planes == 1:
            assert found == [[start + n] for n in range(tokens)]
            assert int(prefix.next_position[0]) == start + tokens
        else:
            assert found == [[start + step for step in place] for place in steps]
            assert int(prefix.next_position[0]) == start + extent


def test_pictures_of_any_shape_are_cut_into_windows(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The port to dynamic resolution: windows of adaptive pooling, at most as many as asked."""
    backbone = tiny_qwen3_vl(tmp_path_factory.mktemp("qwen"))
    for name, options in (("quecc", {}), ("llama-vid", SMALL), ("mqt-llava", {"queries": 16})):
        method = build(backbone, name, 5 if name == "llama-vid" else 4, options)
        for shape in ((40, 16), (20, 28), (8, 8)):
            visual = tokens_of(backbone, method, ["what?"], shape)
            assert bool(visual.embeds.isfinite().all())
            assert int((visual.place >= 0).sum()) == method.schedule(4, 1)[0]


@pytest.mark.parametrize(
    ("name", "tokens", "options", "what"),
    [
        ("quecc", 2, {}, "ask for 1, 4, 9, 36"),
        ("quecc", 4, {"heads": 5}, "heads"),
        ("quecc", 4, {"heads": 0}, "heads is at least 1, not 0"),
        ("quecc", 4, {"kernel": -1}, "kernel is at least 1, not -1"),
        ("quecc", 4, {"layers": "0-9"}, "layers=0-9"),
        ("llama-vid", 4, SMALL, "it can make 2, 5, 10, 37"),
        ("llama-vid", 5, {"compress": "mean", **SMALL}, "it can make 2"),
        ("llama-vid", 2, {"compress": "max", **SMALL}, "pooling of llama-vid"),
        ("llama-vid", 2, {**SMALL, "heads": 5}, "5 heads do not divide its width, 24"),
        ("llama-vid", 2, {**SMALL, "depth": 0}, "depth is at least 1"),
        ("llama-vid", 2, {**SMALL, "queries": 0}, "queries is at least 1"),
        ("llama-vid", 2, {**SMALL, "dropout": 2.0}, "dropout is a share"),
        ("llama-vid", 2, {**SMALL, "image": 300}, "multiple of 14"),
        ("mqt-llava", 20, {}, "ask for 1 to 16"),
        ("mqt-llava", 4, {"queries": 12}, "square"),
        ("mqt-llava", 4, {"queries": -4}, "queries is at least 1"),
        ("mqt-llava", 4, {"heads": 0}, "heads is at least 1"),
        ("mqt-llava", 4, {"heads": 5}, "heads"),
    ],
)
def test_what_cannot_be_made_is_refused_with_what_can(
    tmp_path_factory: pytest.TempPathFactory, name: str, tokens: int, options: Any, what: str
) -> None:
    llava = tiny_llava(tmp_path_factory.getbasetemp() / "refusals")
    with pytest.raises(UsageError, match=what):
        build(llava, name, tokens, options)


# Sizes ---------------------------------------------------------------------------------------

LLAVA_7B = ModelSpec(
    "llava-1.5-7b", "llava", 32, 4096, 32, 32, 128, 11008, 576, (24, 24), 24, 1024, 16, True
)


def size(name: str, tokens: int, part: str = "", **options: Any) -> int:
    """Parameters of a method, or of a part of it, at the size of LLaVA-1.5-7B."""
    with torch.device("meta"):
        method = registry.load("baselines", name).from_budget(Budget(tokens), LLAVA_7B, **options)
    named = method.module.named_parameters()
    return sum(value.numel() for key, value in named if key.startswith(part))


def test_sizes_are_the_published_ones(tmp_path: Path) -> None:
    """Spec abstractive 3.2, 4.3, 5.1; acceptance 8: budgets of the 24 x 24 raster."""
    kernels = {64: 3, 36: 4, 16: 6, 4: 12, 1: 24}
    rest = 4_197_376 + 2_101_248 + 2 * 5_246_976 + 4_198_400
    for tokens, kernel in kernels.items():
        assert size("quecc", tokens) == rest + 1024 * (kernel**2 + 1)
        assert size("quecc", tokens, "q_downsample") == 1024 * (kernel**2 + 1)
    with pytest.raises(UsageError, match="ask for 1, 4, 9, 16, 36, 64, 144, 576"):
        size("quecc", 2)
    released = {"tower": "eva-g", "text": "bert", "vocabulary": str(tmp_path / "vocab.txt")}
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]")
    context = 194_525_440
    assert size("llama-vid", 2, "qformer", **released) == 185_660_160
    assert size("llama-vid", 2, "eva", **released) > 980_000_000
    own = size("llama-vid", 2, **released) - size("llama-vid", 2, "eva", **released)
    assert own == context + 1408 * 4096 + 4096 + 4096 * 4096 + 4096
    assert size("mqt-llava", 4) == 8_923_136
    assert size("mqt-llava", 4, "pos_embed") == 256 * 1024
