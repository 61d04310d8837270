"""ETC's training on both backbones (spec abstractive 6, tests 4 to 6)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import BACKBONES, TURNS, build, pack, samples
from torch import Tensor

from etcbench.backbones import Backbone
from etcbench.decoder import Decoder
from etcbench.etc.target import text_attention, voting_tokens
from etcbench.packing import PackedBatch, Packer
from etcbench.selection import Kind
from etcbench.states import PassStates
from etcbench.training import CompressionModel


@pytest.fixture(scope="module", params=BACKBONES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(family)


@pytest.fixture
def backbone(family: str, folder: Path) -> Backbone:
    return BACKBONES[family](folder)


def observed(model: CompressionModel, batch: PackedBatch) -> PassStates:
    """What the auxiliary loss is shown of the training pass."""
    seen: list[PassStates] = []
    handle = model.auxiliary.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    model(batch)
    handle.remove()
    return seen[0]


# Options -------------------------------------------------------------------------------------


def crossed(**axes: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Every pair of values of the first two axes, while the others take turns."""
    first, second, *others = axes.items()
    pairs = itertools.product(range(len(first[1])), range(len(second[1])))
    return [
        {
            first[0]: first[1][i],
            second[0]: second[1][j],
            **{name: values[(i + j) % len(values)] for name, values in others},
        }
        for i, j in pairs
    ]


GRID: list[dict[str, Any]] = [
    *crossed(
        decoder=("bottleneck", "outer_product", "qformer", "linear_interpolation"),
        attn_source=("same_pass_qk", "full_pass", "frozen_teacher"),
        auxiliary=("vid", "mse"),
    ),
    *crossed(
        text_rows=("instruction", "all_non_label", "all"),
        vid_reduction=("sum", "mean_tokens", "mean_all"),
        variance=("channel", "scalar"),
        detach=(True, False),
    ),
    *crossed(layer=(-1, 0, 2, -2), z_layer=("same", "last"), final_norm=(True, False)),
    {"tokens": 1, "keep_prefix": True},
    {"tokens": 5, "embeddings": "shared", "keep_prefix": False, "keep_bos": True},
    {"alpha": 0.0},
    {"alpha": 1.0, "rank": 3},
    {"decoder": "linear_interpolation", "decoder_projection": False},
]
OWN: dict[str, list[dict[str, Any]]] = {
    "llava": [{"variance": "entry"}, {"prompt": "image_first"}],
    "qwen3_vl": [{"z_t_index": "image_t"}, {"z_t_index": "0"}, {"prompt": "marker_first"}],
}


def test_every_option_trains(backbone: Backbone) -> None:
    """One step: finite loss; gradients in the decoder, the variances, Z and the model."""
    pictures = [{**sample, "turns": sample["turns"][:1]} for sample in samples(2)]
    for options in [*GRID, *OWN[backbone.spec.family]]:
        model = build(backbone, **{"prompt": "standard", **options})
        result = model(pack(model, pictures))
        assert all(torch.isfinite(value).all() for value in result.values()), options
        assert {"auxiliary", "unexplained"} <= set(result), options
        result["loss"].backward()
        trained = [*model.auxiliary.named_parameters(), *model.compressor.named_parameters()]
        for name, parameter in trained:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (options, name)
        for name, parameter in model.model.named_parameters():
            if "language_model.layers" in name:
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        model.zero_grad()


@pytest.mark.parametrize("options", [{"lambda_vid": 0.0}, {"auxiliary": "none"}])
def test_no_auxiliary_loss_is_voco(backbone: Backbone, options: dict[str, Any]) -> None:
    """Spec 6.6: the same loss and gradients to the last bit, at any M."""
    found = []
    for name, own in (("voco", {}), ("etc", {"embeddings": "shared", **options})):
        model = build(backbone, name, tokens=3, **own)
        assert model.auxiliary is None
        loss = model(pack(model, samples()))["loss"]
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
        model.zero_grad()
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(found[1][1][name], value) for name, value in found[0][1].items())


def test_the_auxiliary_loss_changes_nothing_at_inference(backbone: Backbone) -> None:
    """The answer's logits are those of the same tokens without a decoder."""
    model = build(backbone)
    batch = pack(model, samples())
    with torch.no_grad():
        with_decoder = model(batch)
        model.auxiliary = None
        without = model(batch)
    assert torch.equal(with_decoder["ce"], without["ce"])
    assert torch.equal(without["loss"], without["ce"])
    assert set(model.compressor.state_dict()) == {"tokens"}


# Target --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["same_pass_qk", "full_pass", "frozen_teacher"])
def test_the_target_carries_no_gradient(backbone: Backbone, source: str) -> None:
    """Spec 6.4; and the decoder's loss reaches the model through Z only."""
    model = build(backbone, attn_source=source, final_norm=False)
    batch = pack(model, samples())
    own = observed(model, batch)
    assert own.outputs.requires_grad
    targets = []
    likelihood = model.auxiliary.likelihood
    model.auxiliary.likelihood = lambda z, target, *rest: (
        targets.append(target) or likelihood(z, target, *rest)
    )
    learned = own.layout.is_kind(Kind.LEARNED)[..., None]
    cut = replace(own, outputs=torch.where(learned, own.outputs.detach(), own.outputs))
    for shown, reaches in ((own, True), (cut, False)):
        model.zero_grad()
        model.auxiliary(batch, shown)["loss"].backward(retain_graph=True)
        gradients = [p.grad for p in model.model.parameters() if p.grad is not None]
        assert any(bool(g.abs().sum() > 0) for g in gradients) == reaches
    assert len(targets) == 2 and not any(target.requires_grad for target in targets)
    model.zero_grad()


def test_without_detaching_the_target_is_trained_too(backbone: Backbone) -> None:
    model = build(backbone, detach=False)
    batch = pack(model, samples())
    target, _ = model.auxiliary.target(batch, observed(model, batch))
    assert target.requires_grad


def text_of(model: CompressionModel, batch: PackedBatch, which: Any) -> list[str]:
    tokenizer = model._parts[0].processor.tokenizer
    votes = voting_tokens(batch, which)
    return [
        tokenizer.decode(torch.tensor(ids)[row].tolist())
        for ids, row in zip(batch.text, votes, strict=True)
    ]


def test_who_votes(backbone: Backbone) -> None:
    """Register E2: the questions; with the template; with the answers."""
    model = build(backbone)
    batch = pack(model, samples(2, blind=False))
    assert text_of(model, batch, "instruction")[0] == "what is it?why?"
    template = text_of(model, batch, "all_non_label")[0]
    everything = text_of(model, batch, "all")[0]
    assert "what is it?" in template and "abc" not in template
    assert len(template) > len("what is it?why?")
    assert "abc" in everything
    answers = sum(len(f" {answer}") for _, answer in TURNS[0])
    assert len(everything) == len(template) + answers


def test_in_a_conversation_every_question_votes(backbone: Backbone) -> None:
    """Register E2: all user turns; neither the answers nor the ends of turns that are read."""
    model = build(backbone)
    packer = Packer(backbone, model.method.prompt_layout, conversation=True)
    batch = packer(samples(2, blind=False))["batch"]
    assert text_of(model, batch, "instruction")[0] == "what is it?why?"
    template = text_of(model, batch, "all_non_label")[0]
    assert "what is it?" in template and "why?" in template and "abc" not in template
    end = backbone.processor.tokenizer.eos_token
    everything = text_of(model, batch, "all")[0]
    assert f"abc{end}" in everything
    space = len(everything) - len(template) - len(f"abc{end}b")
    assert space == (2 if backbone.planes == 1 else 0)  # Vicuna's answers begin with a space


def causal_weights(backbone: Backbone, states: PassStates, layer: int) -> Tensor:
    """The model's own eager attention of one layer, over all that plain causality allows."""
    layout, hidden = states.layout, states.hidden
    order = torch.arange(layout.tokens)
    seen = (order <= order[:, None]) & layout.valid[:, None]
    seen = seen & ((layout.turn[:, None] < 0) | (layout.turn[:, None] == layout.turn[..., None]))
    mask = torch.where(seen | (order == order[:, None]), 0.0, torch.finfo(hidden.dtype).min)
    block: Any = backbone.decoder_layers[layer]
    _, weights = block.self_attn(
        hidden_states=block.input_layernorm(hidden),
        position_embeddings=backbone.rotary(hidden, layout.positions),
        attention_mask=mask[:, None],
    )
    return weights


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, 1, 3])
def test_the_statistic_is_that_of_the_models_attention(
    family: str, folder: Path, layer: int
) -> None:
    """Same pass: eager weights of the layer, mean over heads and question tokens (eq. 9)."""
    backbone = BACKBONES[family](folder, attention="eager")
    model = build(backbone, layer=layer)
    batch = pack(model, samples())
    own = observed(model, batch)
    weights = causal_weights(backbone, own, model.auxiliary.layer)
    count = batch.labels.shape[1]
    for row in range(3):
        asked = batch.instruction[row].nonzero()[:, 0] + own.layout.tokens - count
        expected = weights[row][:, asked].mean((0, 1))
        votes = torch.nn.functional.pad(batch.instruction[:3], (own.layout.tokens - count, 0))
        assert torch.allclose(text_attention(own.attention, votes)[row], expected, atol=1e-6)
    bottleneck = Decoder(backbone, model._parts[1]).mask(own.layout, own.layout)
    assert bottleneck is not None
    text, shown = own.layout.is_kind(Kind.SUFFIX), own.layout.is_kind(Kind.VISUAL)
    assert not bottleneck[0, 0][text[0]][:, shown[0]].any()  # what the loss must get around


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, 2])
def test_the_full_pass_is_the_untouched_model(family: str, folder: Path, layer: int) -> None:
    """Attention maps and visual states of transformers' own forward, one question at a time."""
    backbone = BACKBONES[family](folder, attention="eager")
    model = build(backbone, layer=layer, prompt="standard", attn_source="full_pass", alpha=1.0)
    data = samples(2, blind=False)
    batch = pack(model, data)
    again = observed(model, batch).again(False)
    assert not again.layout.is_kind(Kind.LEARNED).any()
    found, present = model.auxiliary.target(batch, again)
    depth = backbone.spec.layers
    for row, sample in enumerate(data):
        total, votes = torch.zeros(()), 0
        single = pack(model, [{**sample, "turns": sample["turns"][:1]}])
        for question, answer in sample["turns"]:
            asked = pack(model, [{"picture": sample["picture"], "turns": [(question, answer)]}])
            inputs, shown = stock_inputs(backbone, asked)
            out = backbone.model(**inputs, output_attentions=True, output_hidden_states=True)
            place = asked.instruction[0].nonzero()[:, 0] - asked.labels.shape[1]
            place = place + inputs["input_ids"].shape[1] + padding(asked)
            maps = out.attentions[depth - 1 if layer == -1 else layer][0]
            total = total + maps[:, place][..., shown].mean(0).sum(0)
            votes += len(place)
        attention = total / votes
        scaled = (attention - attention.min()) / (attention.max() - attention.min())
        states = out.hidden_states[layer][0, shown]
        if layer in (1, 2, 3) and backbone.planes > 1:  # the tuple lacks DeepStack (spec 0.4)
            states = states + deepstack(backbone, single, layer)
        expected = scaled[:, None] * states
        assert torch.allclose(found[row, present[row]], expected, atol=2e-4, rtol=1e-3)


def padding(batch: PackedBatch) -> int:
    return int((batch.turns[0] < 0).sum())


def stock_inputs(backbone: Backbone, batch: PackedBatch) -> tuple[dict[str, Tensor], Tensor]:
    """A single packed turn as the untouched model takes it, and where its picture is."""
    assert batch.pixels is not None
    image = backbone.model.config.image_token_id
    text = [t for t, turn in zip(batch.text[0], batch.turns[0].tolist(), strict=True) if turn >= 0]
    slots = [image] * int(batch.pixels.grid[0].prod())
    tokens = torch.tensor([[*batch.prompts[0].chunks[0], *slots, *text]])
    shown = tokens[0] == image
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    inputs |= batch.pixels.tensors
    if backbone.planes > 1:
        inputs["mm_token_type_ids"] = shown[None].int()
    return inputs, shown


def deepstack(backbone: Backbone, batch: PackedBatch, layer: int) -> Tensor:
    assert batch.pixels is not None
    tensors = batch.pixels.tensors
    out = backbone.model.model.get_image_features(
        tensors["pixel_values"], tensors["image_grid_thw"]
    )
    features: Tensor = out.deepstack_features[layer - 1][0]
    return features


@torch.no_grad()
def test_sources_agree_on_the_picture_and_the_teacher_never_changes(backbone: Backbone) -> None:
    """V never sees Z or text, so all three give the same states until the model has trained."""
    model = build(backbone, attn_source="frozen_teacher", alpha=0.0)
    batch = pack(model, samples())
    own = observed(model, batch)
    before = [model.auxiliary.target(batch, s)[0] for s in (own, own.again(False), own.again(True))]
    assert all(torch.allclose(before[0], other, atol=1e-5) for other in before[1:])
    owned = {id(parameter) for parameter in model.parameters()}
    teacher = model._initial.model
    assert not any(id(p) in owned or p.requires_grad for p in teacher.parameters())
    weight = backbone.decoder_layers[0].self_attn.v_proj.weight
    kept = weight.clone()
    weight.mul_(1.5)
    own = observed(model, batch)
    after = [model.auxiliary.target(batch, s)[0] for s in (own, own.again(False), own.again(True))]
    weight.copy_(kept)
    assert torch.equal(after[2], before[2])
    assert torch.allclose(after[0], after[1], atol=1e-5)
    assert not torch.allclose(after[0], after[2], atol=1e-3)


@pytest.mark.parametrize("source", ["same_pass_qk", "full_pass"])
@pytest.mark.parametrize("decoder", ["bottleneck", "outer_product", "qformer"])
@torch.no_grad()
def test_a_batch_gives_the_mean_of_its_samples(
    backbone: Backbone, source: str, decoder: str
) -> None:
    """Pictures of different size (Qwen3-VL, register E7), questions of different number."""
    model = build(backbone, attn_source=source, decoder=decoder).eval()
    for parameter in model.auxiliary.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    data = samples()
    together = model(pack(model, data))["auxiliary"]
    alone = [model(pack(model, [sample]))["auxiliary"] for sample in data[:3]]
    assert torch.allclose(together, torch.stack(alone).sum() / 4, rtol=1e-4)
    assert "auxiliary" not in model(pack(model, data[3:]))
