"""ETC's training target and loss (spec abstractive 6, tests 4 and 5)."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llava
from torch import Tensor

from etcbench import registry
from etcbench.compressor import Budget, ModelSpec
from etcbench.errors import UsageError
from etcbench.etc import ETC, VIDLoss, attention_weighted_target
from etcbench.etc.decoders import DECODERS, resample
from etcbench.etc.objective import EPS


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return tiny_llava(tmp_path_factory.mktemp("llava")).spec


@given(st.floats(0, 1), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_target_mixes_uniform_and_attended(alpha: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(2, 5, 3, generator=generator)
    attention = torch.rand(2, 5, generator=generator)
    target = attention_weighted_target(visual, attention, alpha)
    weights = (target / visual)[..., 0]
    assert weights.min() >= 1 - alpha - 1e-5
    assert weights.max() <= 1 + 1e-5
    rows = torch.arange(2)
    assert torch.allclose(target[rows, attention.argmax(1)], visual[rows, attention.argmax(1)])
    least = visual[rows, attention.argmin(1)] * (1 - alpha)
    assert torch.allclose(target[rows, attention.argmin(1)], least, atol=1e-6)


def test_alpha_zero_is_the_visual_states_and_alpha_one_silences_the_least_attended() -> None:
    visual, attention = torch.randn(1, 4, 3), torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert torch.equal(attention_weighted_target(visual, attention, 0.0), visual)
    assert attention_weighted_target(visual, attention, 1.0)[0, 0].abs().max() < 1e-6


def test_equal_attention_gives_finite_weights() -> None:
    target = attention_weighted_target(torch.ones(1, 3, 2), torch.full((1, 3), 0.2), 0.6)
    assert torch.isfinite(target).all()


def test_padding_takes_no_part_in_the_scale() -> None:
    visual, attention = torch.randn(1, 4, 3), torch.tensor([[0.3, 0.1, 0.0, 0.9]])
    present = torch.tensor([[True, True, False, False]])
    target = attention_weighted_target(visual, attention, 1.0, present)
    assert torch.equal(target[0, 0], visual[0, 0])
    assert target[0, 1].abs().max() < 1e-6


def loss_module(spec: ModelSpec, **options: Any) -> VIDLoss:
    torch.manual_seed(0)
    return VIDLoss(ETC.from_budget(Budget(2), spec, **options), spec).eval()


def score(module: VIDLoss, target: Tensor) -> Tensor:
    """Likelihood loss of a whole target on the backbone's own raster."""
    present = torch.ones(target.shape[:2], dtype=torch.bool)
    grid = torch.tensor([module.decoder.raster] * len(target))
    learned = torch.zeros(len(target), 2, target.shape[-1])
    return module.likelihood(learned, target, present, grid)[0]


def set_variance(module: VIDLoss, variance: Tensor) -> None:
    with torch.no_grad():
        module.rho.copy_(torch.expm1(variance - EPS).log())


def test_a_perfect_decoder_pays_only_the_log_variances(spec: ModelSpec) -> None:
    """Spec 6.5: mu = target gives N times the sum over channels of log sigma."""
    variance = torch.linspace(0.5, 3, spec.hidden)
    module = loss_module(spec)
    set_variance(module, variance)
    with torch.no_grad():
        module.decoder.up.weight.zero_()
        module.decoder.up.bias.copy_(torch.randn(36 * spec.hidden))
    target = module.decoder.up.bias.detach().view(1, 36, -1).expand(3, -1, -1)
    loss = score(module, target)
    assert math.isclose(float(loss.detach()), 36 * float(variance.sqrt().log().sum()), rel_tol=1e-4)


@pytest.mark.parametrize(("variance", "sign"), [(0.5, -1), (2.0, 1)])
def test_variances_move_towards_the_squared_error(
    spec: ModelSpec, variance: float, sign: int
) -> None:
    module = loss_module(spec)
    set_variance(module, torch.full((spec.hidden,), variance))
    with torch.no_grad():
        module.decoder.up.weight.zero_()
    score(module, torch.ones(2, 36, spec.hidden)).backward()
    assert (module.rho.grad.sign() == sign).all()


def test_each_channels_variance_rests_at_its_mean_squared_error(spec: ModelSpec) -> None:
    """Spec 6.5, over pictures of different size: padding takes no part."""
    dynamic = replace(spec, visual_tokens=None, grid=None)
    module = loss_module(dynamic, canonical_grid=5)
    grid = torch.tensor([[2, 3], [5, 5]])
    present = torch.arange(25) < grid.prod(-1, keepdim=True)
    learned = torch.randn(2, 2, spec.hidden)
    with torch.no_grad():
        module.decoder.up.bias.normal_()
        mean = module.decoder(learned, grid)
        target = mean + torch.randn_like(mean) * torch.linspace(0.5, 2, spec.hidden)
        target[~present] = 99.0
        squared = ((target - mean) ** 2)[present].mean(0)
    for factor, sign in ((0.9, -1), (1.0, 0), (1.1, 1)):
        set_variance(module, squared * factor)
        module.zero_grad()
        module.likelihood(learned, target, present, grid)[0].backward()
        assert module.rho.grad is not None
        if sign:
            assert (module.rho.grad.sign() == sign).all()
        else:
            assert module.rho.grad.abs().max() < 1e-3
    # And a perfect decoder pays the log-variances of the tokens that there are.
    loss, _ = module.likelihood(learned, mean.detach(), present, grid)
    expected = (6 + 25) / 2 * module.variance().sqrt().log().sum()
    assert torch.isclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize("variance", ["channel", "scalar", "entry"])
@pytest.mark.parametrize("reduction", ["sum", "mean_tokens", "mean_all"])
def test_the_likelihood_is_a_gaussians(spec: ModelSpec, variance: str, reduction: str) -> None:
    """Against torch's own density: log sqrt(2 pi) per entry is the constant that eq. 16 leaves."""
    module = loss_module(spec, variance=variance, vid_reduction=reduction)
    target = torch.randn(3, 36, spec.hidden)
    with torch.no_grad():
        module.rho.normal_()
        mean = module.decoder(torch.zeros(3, 2, spec.hidden), torch.tensor([[6, 6]] * 3))
        scale = (torch.nn.functional.softplus(module.rho) + EPS).sqrt()
        density = torch.distributions.Normal(mean, scale).log_prob(target)
        expected = -density - math.log(math.sqrt(2 * math.pi))
        tokens = {"sum": 1, "mean_tokens": 36, "mean_all": 36 * spec.hidden}[reduction]
        expected = expected.sum((1, 2)).mean() / tokens
    assert torch.allclose(score(module, target), expected, rtol=1e-4)


def test_mse_is_the_likelihood_with_variance_one(spec: ModelSpec) -> None:
    module = loss_module(spec, auxiliary="mse")
    assert not hasattr(module, "rho")
    target = torch.randn(3, 36, spec.hidden)
    mean = module.decoder(torch.zeros(3, 2, spec.hidden), torch.tensor([[6, 6]] * 3))
    assert torch.allclose(score(module, target), ((target - mean) ** 2).sum() / 2 / 3)


@pytest.mark.parametrize("variance", ["channel", "scalar", "entry"])
def test_the_first_batch_sets_mean_and_variances(spec: ModelSpec, variance: str) -> None:
    """A decoder that ignores Z starts with the error that its variances say, and only once."""
    module = loss_module(spec, variance=variance, decoder="linear_interpolation").train()
    target = torch.randn(64, 36, spec.hidden) * torch.linspace(0.1, 30, spec.hidden) + 3
    score(module, target)
    assert torch.allclose(module.decoder.bias, target.mean((0, 1)))
    spread = target.var((0, 1), unbiased=False)
    wanted = spread.mean() if variance == "scalar" else spread
    assert torch.allclose(module.variance(), wanted.expand_as(module.rho), rtol=1e-3)
    before = module.rho.clone()
    score(module, target * 9)
    assert torch.equal(module.rho, before)
    assert set(module.variances()) == {"variance_low", "variance_median", "variance_high"}


@pytest.mark.parametrize("decoder", sorted(DECODERS))
@pytest.mark.parametrize("tokens", [1, 3])
def test_decoders_write_one_state_per_token_of_each_picture(
    spec: ModelSpec, decoder: str, tokens: int
) -> None:
    """Pictures of different raster in one batch, as alone; Z reaches every token."""
    dynamic = replace(spec, visual_tokens=None, grid=None)
    torch.manual_seed(0)
    method = ETC.from_budget(Budget(tokens), dynamic, decoder=decoder, canonical_grid=5)
    module = DECODERS[decoder](method, dynamic)
    learned = torch.randn(3, tokens, spec.hidden, requires_grad=True)
    grid = torch.tensor([[2, 3], [5, 5], [7, 4]])
    together = module(learned, grid)
    assert together.shape == (3, 28, spec.hidden)
    for row, count in enumerate(grid.prod(-1).tolist()):
        alone = module(learned[row : row + 1], grid[row : row + 1])
        assert torch.allclose(alone[0], together[row, :count], atol=1e-6)
    (gradient,) = torch.autograd.grad(together[0, :6].square().sum(), learned)
    assert gradient[0].abs().min() > 0 and gradient[1:].abs().max() == 0


def test_resampling_a_plane_gives_the_plane() -> None:
    """Bilinear: a ramp stays a ramp, sampled at the centres of the cells."""
    ramp = torch.arange(8.0).repeat_interleave(8)[None, :, None] + 0.5
    small = resample(ramp, (8, 8), torch.tensor([[4, 2]]))
    assert torch.allclose(small[0, :, 0], torch.tensor([1.0, 1, 3, 3, 5, 5, 7, 7]))


def test_interpolation_of_one_token_is_a_constant(spec: ModelSpec) -> None:
    method = ETC.from_budget(
        Budget(1), spec, decoder="linear_interpolation", decoder_projection=False
    )
    module = DECODERS["linear_interpolation"](method, spec)
    learned = torch.randn(1, 1, spec.hidden)
    assert torch.equal(module(learned, torch.tensor([[6, 6]])), learned.expand(-1, 36, -1))


def test_sizes_of_the_bottleneck_at_seven_billion(spec: ModelSpec) -> None:
    """Spec 1.3: about 21.3 M parameters for LLaVA-1.5-7B, 18.9 M for Qwen3-VL-2B."""
    sizes = {}
    for name, hidden, grid in (("llava", 4096, (24, 24)), ("qwen", 2048, None)):
        own = replace(spec, hidden=hidden, grid=grid)
        with torch.device("meta"):
            module = DECODERS["bottleneck"](ETC(Budget(1)), own)
        sizes[name] = round(sum(p.numel() for p in module.parameters()) / 1e6, 1)
    assert sizes == {"llava": 21.3, "qwen": 18.9}


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.5},
        {"lambda_vid": -1.0},
        {"lambda_vid": float("nan")},
        {"rank": 2.5},
        {"canonical_grid": True},
        {"layer": 99},
        {"no_such": 1},
        {"rank": 0},
        {"detach": False, "attn_source": "full_pass"},
        {"z_t_index": "0"},
        {"prompt": "marker_first"},
        {"decoder": "transformer"},
        {"attn_source": "teacher"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_bad_options_are_named(spec: ModelSpec, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options)).removesuffix("er")):
        ETC.from_budget(Budget(1), spec, **options)


def test_an_option_that_does_not_fit_the_decoder_or_backbone_is_named(spec: ModelSpec) -> None:
    dynamic = replace(spec, visual_tokens=None, grid=None)
    with pytest.raises(UsageError, match="variance=entry"):
        ETC.from_budget(Budget(1), dynamic, variance="entry")
    method = ETC.from_budget(Budget(1), spec, decoder="qformer", decoder_width=12)
    with pytest.raises(UsageError, match="decoder_width"):
        method.training_module(spec)


def test_options_may_come_as_text(spec: ModelSpec) -> None:
    """YAML reads 1e-5 as text, and a bare 0 as a number."""
    method = ETC.from_budget(Budget(1), replace(spec, planes=3), lambda_vid="1e-5", z_t_index=0)
    assert (method.lambda_vid, method.z_t_index) == (1e-5, "0")


@pytest.mark.parametrize(
    ("layer", "runs", "final"), [(-1, 3, True), (4, 3, True), (0, 1, False), (1, 1, False)]
)
def test_alignment_layers_are_those_of_the_hidden_states(
    spec: ModelSpec, layer: int, runs: int, final: bool
) -> None:
    """Of four layers; register E13: 0 is the output of the first block."""
    module = loss_module(spec, layer=layer)
    assert (module.layer, module.final) == (runs, final)


def test_the_register_of_the_other_methods_is_the_default(spec: ModelSpec) -> None:
    """E8, E9, V1, Q1, L1, M1; V2 and E11 are a recipe's, E12 a checkpoint's."""
    qwen = replace(spec, family="qwen3_vl", planes=3)

    def built(name: str, tokens: int, on: ModelSpec = spec, **options: Any) -> Any:
        return registry.load("baselines", name).from_budget(Budget(tokens), on, **options)

    for name in ("voco", "etc"):
        methods = (built(name, 2), built(name, 2, qwen))
        shown = [(method.prompt, method.keep_prefix, method.keep_bos) for method in methods]
        assert shown == [("image_first", False, False), ("standard", True, False)]
    assert (built("voco", 3).rows, built("etc", 3).rows) == (1, 3)
    assert built("quecc", 1).query == "first"
    vid = built("llama-vid", 5, queries=3, width=24, depth=2, heads=2)
    assert (vid.counts, vid.side) == ("total", 2)
    mqt = built("mqt-llava", 4)
    assert (mqt.keys, mqt.draw) == ("position", "even")


def test_the_register_of_the_specification_is_the_default() -> None:
    """E1-E10 and E13; E11 and E12 are a recipe's."""
    defaults = {option.name: option.default for option in fields(ETC)}
    expected = {
        "attn_source": "same_pass_qk",
        "text_rows": "instruction",
        "detach": True,
        "vid_reduction": "sum",
        "variance": "channel",
        "decoder": "bottleneck",
        "rank": 8,
        "canonical_grid": 32,
        "embeddings": "distinct",
        "keep_prefix": None,
        "z_t_index": "next_pos",
        "z_layer": "same",
        "alpha": 0.6,
        "lambda_vid": 1e-5,
        "layer": -1,
    }
    assert {name: defaults[name] for name in expected} == expected


@pytest.mark.parametrize(("embeddings", "rows"), [("distinct", 2), ("shared", 1)])
def test_at_inference_only_the_learned_tokens_exist(
    spec: ModelSpec, embeddings: str, rows: int
) -> None:
    method = ETC.from_budget(Budget(2), spec, embeddings=embeddings)
    assert {name: value.shape for name, value in method.module.state_dict().items()} == {
        "tokens": (rows, spec.hidden)
    }
    assert method.learned_tokens().shape == (2, spec.hidden)
