"""ExplainC: relevance against autograd, the student, what it keeps, and how it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from etcbench.baselines.explainc import ExplainC
from safetensors.torch import load_file
from test_invariants import BACKBONES, ask, close, prefix_of
from tiny import reference_inputs, tiny_llava
from torch import Tensor

from etcbench import registry
from etcbench.attention import LayerAttention
from etcbench.backbones import Backbone
from etcbench.backbones.stream import Stream
from etcbench.checkpoints import load_method
from etcbench.compressor import Budget, Compressor
from etcbench.decoder import Decoder
from etcbench.errors import MissingCheckpointError, UsageError
from etcbench.recipes import load_recipe, train
from etcbench.relevance import chained, prompt_relevance
from etcbench.selection import Kind, Layout
from etcbench.states import PromptState, RelevanceRule
from etcbench.student import Student, relevance_label

QUESTION = "what is it?"
ANSWER = [7, 9, 30]
RECIPE = """
method: explainc
tokens: 9
options: {{target: probability}}
model: {model}
data: micro
turns: 2
stages:
  - {{precompute: 4, epochs: 2, batch_size: 2, warmup_steps: 1, learning_rate: 1.0e-3,
     tune_model: false{more}}}
"""


@pytest.fixture(scope="module", params=BACKBONES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Backbone, Backbone]:
    """The same model under SDPA and eager attention."""
    path = tmp_path_factory.mktemp(request.param)
    sdpa, eager = (BACKBONES[request.param](path, attention=name) for name in ("sdpa", "eager"))
    return sdpa, eager


def build(backbone: Backbone, tokens: int = 9, **options: Any) -> ExplainC:
    torch.manual_seed(3)
    method = registry.load("baselines", "explainc").from_budget(
        Budget(tokens), backbone.spec, **options
    )
    assert isinstance(method, ExplainC)
    return method


def prompts(backbone: Backbone, *questions: str) -> tuple[Stream, Tensor]:
    """Prompts on one picture, and where their answers begin."""
    prefix, _ = prefix_of(backbone, Compressor())
    prefix = prefix.rows(torch.zeros(len(questions), dtype=torch.long))
    after = [backbone.prompt(question, 1).after for question in questions]
    text = backbone.continue_text(after, prefix.next_position)
    return Stream.cat([prefix, text]), text.layout.next_position()


def of_autograd(eager: Backbone, rule: RelevanceRule) -> Tensor:
    """Spec selective 8.2 as it is written, from the attention maps of transformers' own model."""
    inputs = reference_inputs(eager, QUESTION, 0)
    asked = inputs["input_ids"].shape[1]
    read = torch.tensor([ANSWER[:-1]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], read], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 2))
    out = eager.model(**inputs, output_attentions=True)
    total = torch.zeros(asked)
    for number, token in enumerate(ANSWER):
        row = asked - 1 + number
        logits = out.logits[0, row]
        score = (logits if rule.target == "logit" else logits.softmax(-1))[token]
        gradients = torch.autograd.grad(score, out.attentions, retain_graph=True)
        relevance = torch.eye(inputs["input_ids"].shape[1])
        for attention, gradient in zip(out.attentions, gradients, strict=True):
            product = attention * gradient if rule.weighting == "gradient" else attention
            product = product.clamp_min(0) if rule.signs == "positive" else product.abs()
            relevance = relevance + product[0].mean(0) @ relevance
        total += relevance[row, :asked].detach()
    return total / len(ANSWER)


@pytest.mark.parametrize(
    "rule",
    [
        RelevanceRule(),
        RelevanceRule(target="probability"),
        RelevanceRule(weighting="attention"),
        RelevanceRule(signs="both"),
    ],
    ids=str,
)
def test_relevance_is_that_of_autograd_through_eager_attention(
    pair: tuple[Backbone, Backbone], rule: RelevanceRule
) -> None:
    sdpa, eager = pair
    stream, start = prompts(sdpa, QUESTION)
    with torch.inference_mode():
        found = prompt_relevance(Decoder(sdpa, Compressor()), stream, start, [ANSWER], rule)
    expected = of_autograd(eager, rule)
    assert torch.allclose(found[0], expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    assert expected.std() > 0


def test_relevance_by_hand() -> None:
    """R = (I + A1)(I + A0): its last row is (0.25, 1.75) times ((2, 0), (0.5, 1.5))."""
    first = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    second = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    found = chained([second, first], torch.tensor([1]), 2)
    assert torch.allclose(found, torch.tensor([[1.375, 2.625]]))


def test_relevance_does_not_depend_on_the_batch(pair: tuple[Backbone, Backbone]) -> None:
    decoder = Decoder(pair[0], Compressor())
    questions, answers = (QUESTION, "a much longer question: what?"), [[7, 9, 30], []]
    stream, start = prompts(pair[0], *questions)
    together = prompt_relevance(decoder, stream, start, answers, RelevanceRule())
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        single, begin = prompts(pair[0], question)
        alone = prompt_relevance(decoder, single, begin, [answer], RelevanceRule())
        assert torch.allclose(together[row, : alone.shape[1]], alone[0], rtol=1e-3, atol=1e-6)
        assert not together[row, alone.shape[1] :].any()


def test_the_label_is_the_upper_half() -> None:
    relevance = torch.tensor([[1.0, 4.0, 2.0, 3.0, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    present = torch.tensor([[True] * 4 + [False], [True] * 5])
    label = relevance_label(relevance, present)
    assert torch.allclose(label[0], torch.tensor([0, 4 / 7, 0, 3 / 7, 0]))
    assert torch.allclose(label.sum(1), torch.ones(2))


def test_the_student_is_small_and_takes_any_length() -> None:
    student = Student(1, 5, 3, "relu")
    assert sum(p.numel() for p in student.parameters()) == pytest.approx(0.18e6, rel=0.02)
    seen = torch.rand(2, 1, 12)
    present = torch.ones(2, 12, dtype=torch.bool)
    present[1, 7:] = False
    seen[1, :, 7:] = 0
    with torch.no_grad():
        both = student(seen, present)
        short = student(seen[1:, :, :7], present[1:, :7])
    assert torch.allclose(both.exp().sum(-1), torch.ones(2), atol=1e-5)
    assert torch.allclose(both[1, :7], short[0], atol=1e-5)
    deep = Student(4, 10, 5, "gelu")
    assert deep(torch.rand(1, 4, 3), present[:1, :3]).shape == (1, 3)


def state_of(backbone: Backbone, *questions: str) -> PromptState:
    stream, start = prompts(backbone, *questions)
    answers = [ANSWER] * len(questions)
    decoder = Decoder(backbone, Compressor())
    return PromptState(
        stream.layout,
        LayerAttention(backbone, 0, stream, None),
        lambda rule: prompt_relevance(decoder, stream, start, answers, rule),
    )


@torch.inference_mode()
def test_the_student_sees_layer_0_of_the_eager_model(pair: tuple[Backbone, Backbone]) -> None:
    sdpa, eager = pair
    inputs = reference_inputs(eager, QUESTION, 0)
    weights = eager.model(**inputs, output_attentions=True).attentions[0][0]
    ids = inputs["input_ids"][0]
    visual = ids == eager.model.config.image_token_id
    behind = torch.arange(len(ids)) > int(visual.nonzero()[-1])
    expected = weights[:, behind][:, :, visual].mean(1)
    for heads, wanted in (("mean", expected.mean(0, keepdim=True)), ("each", expected)):
        seen, present = build(sdpa, heads=heads).observe(state_of(sdpa, QUESTION))
        assert present.all()
        assert torch.allclose(seen[0], wanted / wanted.mean(-1, keepdim=True), atol=1e-4)


def kept_places(layout: Layout | None) -> list[int]:
    assert layout is not None
    found: list[int] = layout.place[0, layout.is_kind(Kind.VISUAL)[0]].tolist()
    return found


@torch.inference_mode()
@pytest.mark.parametrize("scores", ["relevance", "attention"])
def test_the_best_tokens_are_kept_in_order(pair: tuple[Backbone, Backbone], scores: str) -> None:
    """Also the oracle inside the engine, which decodes without gradients."""
    method = build(pair[0], scores=scores)
    kv, _ = ask(pair[0], method, QUESTION)
    if scores == "attention":
        wanted = method.observe(state_of(pair[0], QUESTION))[0].mean(1)[0]
    else:
        full = Decoder(pair[0], Compressor())
        answers = full.greedy(*ask(pair[0], Compressor(), QUESTION), 32)
        stream, start = prompts(pair[0], QUESTION)
        relevance = prompt_relevance(full, stream, start, answers, RelevanceRule())
        wanted = relevance[stream.layout.is_kind(Kind.VISUAL)]
    places = kept_places(kv.layouts[0])
    assert places == sorted(wanted.topk(9).indices.tolist())
    assert all(kept_places(layout) == places for layout in kv.layouts)


@torch.inference_mode()
def test_random_places_depend_on_the_seed_alone(pair: tuple[Backbone, Backbone]) -> None:
    found = [
        kept_places(ask(pair[0], build(pair[0], scores="random", seed=seed), q)[0].layouts[0])
        for seed, q in ((0, QUESTION), (0, "why?"), (1, QUESTION))
    ]
    assert found[0] == found[1] != found[2]


@torch.inference_mode()
@pytest.mark.parametrize("positions", ["keep", "contiguous"])
def test_where_the_first_generated_token_stands(
    pair: tuple[Backbone, Backbone], positions: str
) -> None:
    """Spec 1.7 and 10.2.4: behind the whole prompt, or behind what is left of it."""
    method = build(pair[0], positions=positions)
    kv, logits = ask(pair[0], method, QUESTION)
    full, _ = ask(pair[0], Compressor(), QUESTION)
    left = kv.layouts[0]
    assert left is not None
    expected = left.tokens if positions == "contiguous" else int(full.next_position[0])
    Decoder(pair[0], method).step(kv, logits.argmax(-1))
    for layout in kv.layouts:
        assert layout is not None
        assert int(layout.positions[0, 0, -1]) == expected


@torch.inference_mode()
def test_incremental_decoding_equals_a_longer_prompt(pair: tuple[Backbone, Backbone]) -> None:
    """Spec 10.2.10, with the kept set frozen: random places do not read the question."""
    method = build(pair[0], scores="random")
    decoder = Decoder(pair[0], method)
    prefix, prompt = prefix_of(pair[0], method)
    kv, logits = decoder.whole(prefix, [prompt.after])
    tokens = []
    for _ in range(3):
        tokens.append(int(logits.argmax(-1)))
        logits = decoder.step(kv, logits.argmax(-1))
    again, _ = prefix_of(pair[0], method)
    assert close(decoder.whole(again, [[*prompt.after, *tokens]])[1], logits)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"scores": "best"}, "scores"),
        ({"kernel": 4}, "odd"),
        ({"activation": "tanh"}, "activation"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        build(tiny_llava(tmp_path), **options)


def recipe_in(path: Path, more: str = "") -> Any:
    file = path / "recipe.yaml"
    file.write_text(RECIPE.format(model=path / "model", more=more))
    return load_recipe(str(file))


def answer_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every answer for the model's own; a random model never answers as the data say."""
    monkeypatch.setattr(
        "etcbench.training.targets._answered", lambda _, prompts, *rest: list(range(len(prompts)))
    )


def test_training_gives_a_checkpoint_for_every_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_llava(tmp_path / "model")
    recipe = recipe_in(tmp_path)
    with pytest.raises(UsageError, match="answers no turn"):
        train(recipe, tmp_path / "random")
    answer_as_told(monkeypatch)
    result = train(recipe, tmp_path / "out")
    stored = load_file(result / "model.safetensors")
    assert stored and all(name.startswith("compressor.") for name in stored)
    examples = load_file(tmp_path / "out" / "stage-0" / "examples.safetensors")
    assert examples["seen"].shape[1:] == (1, backbone.spec.visual_tokens or 0)
    assert (examples["relevance"] > 0).any(1).all()
    for tokens in (4, 20):
        method, _ = load_method("explainc", Budget(tokens), backbone, checkpoint=str(result))
        assert isinstance(method, ExplainC) and method.target == "probability"
        untrained = build(backbone, tokens).module
        assert untrained is not None and method.module is not None
        weight = method.module.state_dict()["head.weight"]
        assert not torch.equal(weight, untrained.state_dict()["head.weight"])


def test_only_the_student_needs_weights(tmp_path: Path) -> None:
    backbone = tiny_llava(tmp_path)
    with pytest.raises(MissingCheckpointError):
        load_method("explainc", Budget(4), backbone)
    for scores in ("attention", "relevance", "random"):
        method, weights = load_method("explainc", Budget(4), backbone, options={"scores": scores})
        assert method.module is None and not weights


def test_examples_are_needed_and_offered_by_the_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llava(tmp_path / "model")
    assert recipe_in(tmp_path).stages[0].precompute == 4
    file = tmp_path / "recipe.yaml"
    text = file.read_text()
    file.write_text(text.replace("precompute: 4, epochs: 2", "steps: 1"))
    with pytest.raises(UsageError, match="precompute"):
        train(load_recipe(str(file)), tmp_path / "pictures")
    answer_as_told(monkeypatch)
    other = text.replace("explainc", "random").replace("{target: probability}", "{}")
    file.write_text(other)
    with pytest.raises(UsageError, match="random notes no examples"):
        train(load_recipe(str(file)), tmp_path / "random")
