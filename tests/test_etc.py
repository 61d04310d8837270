"""ETC's training target and loss (spec abstractive 6, tests 4 and 5)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llava

from etcbench.compressor import Budget, ModelSpec
from etcbench.errors import UsageError
from etcbench.etc import ETC, VIDLoss, attention_weighted_target


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


def test_target_carries_no_gradient() -> None:
    visual = torch.randn(1, 4, 3, requires_grad=True)
    attention = torch.rand(1, 4, requires_grad=True)
    assert not attention_weighted_target(visual, attention, 0.6).requires_grad


def loss_of_a_perfect_decoder(spec: ModelSpec, variance: torch.Tensor) -> torch.Tensor:
    """Likelihood loss when the decoder hits the target everywhere."""
    module = VIDLoss(ETC.from_budget(Budget(1), spec, alpha=0.0), spec).eval()
    visual = torch.randn(2, 36, spec.hidden)
    with torch.no_grad():
        module.rho.copy_(torch.expm1(variance - module.eps).log())
        for parameter in module.decoder.parameters():
            parameter.zero_()
        module.decoder[2].bias.copy_(visual[0].flatten())
    same = visual[:1].expand(2, -1, -1)
    loss, _ = module.likelihood(torch.zeros(2, 1, spec.hidden), same, torch.rand(2, 36))
    return loss.detach()


def test_a_perfect_decoder_pays_only_the_log_variances(spec: ModelSpec) -> None:
    variance = torch.linspace(0.5, 3, spec.hidden)
    loss = loss_of_a_perfect_decoder(spec, variance)
    assert math.isclose(float(loss), 36 * float(variance.sqrt().log().sum()), rel_tol=1e-4)


@pytest.mark.parametrize(("variance", "sign"), [(0.5, -1), (2.0, 1)])
def test_variances_move_towards_the_squared_error(
    spec: ModelSpec, variance: float, sign: int
) -> None:
    module = VIDLoss(ETC.from_budget(Budget(1), spec, alpha=0.0), spec).eval()
    with torch.no_grad():
        for parameter in module.decoder.parameters():
            parameter.zero_()
        module.rho.fill_(math.log(math.expm1(variance - module.eps)))
    visual = torch.ones(2, 36, spec.hidden)
    module.likelihood(torch.zeros(2, 1, spec.hidden), visual, torch.rand(2, 36))[0].backward()
    assert (module.rho.grad.sign() == sign).all()


@pytest.mark.parametrize(
    "options", [{"alpha": 1.5}, {"lambda_vid": -1.0}, {"layer": 99}, {"no_such": 1}]
)
def test_bad_options_are_named(spec: ModelSpec, options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options)).removesuffix("er")):
        ETC.from_budget(Budget(1), spec, **options)


def test_a_real_checkpoint_config_survives(tmp_path: Path, spec: ModelSpec) -> None:
    """At inference only the learned tokens exist."""
    method = ETC.from_budget(Budget(2), spec)
    assert {name: value.shape for name, value in method.module.state_dict().items()} == {
        "tokens": (2, spec.hidden)
    }
