"""Training of TwigVLM and TwigVLM++: each loss from its definition, what it moves, the result."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from test_invariants import BACKBONES, Row
from tiny import tiny_llava
from torch import Tensor

from etcbench import twig_training
from etcbench.backbones import Backbone
from etcbench.checkpoints import load_method
from etcbench.compressor import Budget, Compressor
from etcbench.decoder import Decoder
from etcbench.packing import Packer
from etcbench.recipes import load_recipe, train
from etcbench.states import LayerState
from etcbench.training import CompressionModel
from etcbench.twig import visual_places


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return BACKBONES[request.param](tmp_path_factory.mktemp(request.param))


class Pictures:
    """Random pictures, questions and answers."""

    def sample(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        picture = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        turns = [(f"what {'is ' * k}it?", f"a{'b' * int(rng.integers(1, 4))}") for k in range(2)]
        return {"picture": None if index % 3 == 2 else picture, "turns": turns}


def training(backbone: Backbone, name: str, **options: Any) -> tuple[Any, CompressionModel, Any]:
    method = Row(name, 20, options).build(backbone)
    model = CompressionModel(backbone, method)
    batch = Packer(backbone)([Pictures().sample(n) for n in range(3)])["batch"]
    return method, model, batch


def test_only_the_twig_gets_gradients(backbone: Backbone) -> None:
    _, model, batch = training(backbone, "twigvlm", depth=2)
    model(batch)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("compressor."), name
    # The last twig layer's answers are what plain cross-entropy of a copy of the model says.
    plain = Decoder(backbone, Compressor())
    with torch.no_grad():
        stream = plain.run(model.frozen(batch, 0), None, 0, 3, select=False)
        logits = backbone.logits(model.answer_states(stream, batch))
        expected = model.answer_loss(logits, batch)["loss"]
        assert torch.allclose(model(batch)["loss"], expected, atol=1e-5)


def test_distillation_is_its_parts(backbone: Backbone) -> None:
    """L_NTP + 0.1 L_pred + 1.0 L_attn, each from its definition."""
    method, model, batch = training(backbone, "twigvlm-pp", teacher_layer=2)
    result = model(batch)
    expected = result["ce"] + 0.1 * result["prediction"] + result["attention"]
    assert torch.allclose(result["loss"], expected)
    plain = Decoder(backbone, Compressor())
    with torch.no_grad():
        start = model.frozen(batch, 0)
        twig = method.branch.logits(
            model.answer_states(plain.run(start, None, 0, 2, select=False), batch)
        )
        full = backbone.logits(
            model.answer_states(plain.run(start, None, 0, 4, select=False), batch)
        )
        kl = (
            F.kl_div((twig / 5).log_softmax(-1), (full / 5).softmax(-1), reduction="none").sum(-1)
            * 25
        )
        weights = batch.weights[batch.labels >= 0]
        assert torch.allclose(result["prediction"], ((kl / 4).tanh() * weights).sum(), atol=1e-5)
        taught = plain.run(start, None, 0, 2, select=False)
        lost = []
        width = batch.labels.shape[1]
        for row in range(2):  # the third sample has no picture
            for turn in range(2):
                mine = (batch.turns[row] == turn) & (batch.labels[row] >= 0)
                place = start.layout.tokens - width + int(mine.nonzero()[0])
                at = torch.full((3, 1), place)
                columns = visual_places(start.layout).clamp_min(0)
                logits = plain.attention(2, taught).logits(at, columns)[row, :, 0]
                teacher = logits.softmax(-1).mean(0)
                inputs = plain.run(start, None, 0, 1, select=False)
                attention = model.decoder.attention(method.branch.layers[-1], inputs)
                student = method.parts["pruning_head"](attention, at, start.layout)[row, 0]
                lost.append((teacher * (teacher / student).log()).sum())
        assert torch.allclose(result["attention"], torch.stack(lost).mean(), atol=1e-5)


@torch.no_grad()
def test_a_reward_is_the_answer_s_probability_under_the_pruned_model(backbone: Backbone) -> None:
    """Spec 7.7: drop behind layer K - 1, FinalWipe at K_f; against prefill and decoding."""
    method, model, batch = training(backbone, "twigvlm-pp", rollouts=3)
    losses = twig_training.TwigTraining(method, method.parts["pruning_head"], model, batch)
    numbers, turns = losses.questions[1].nonzero(as_tuple=True)
    assert numbers.tolist() == [0, 0, 1, 1] and turns.tolist() == [0, 1, 0, 1]
    drawn = twig_training.draw_without_replacement(losses.shares[numbers, turns], 3, 5)
    rewards = losses.rewards(drawn, numbers, turns)
    for case, rollout in ((0, 0), (1, 2), (3, 1)):
        sample = Pictures().sample(int(numbers[case]))
        question, answer = sample["turns"][int(turns[case])]
        packer = Packer(backbone)
        ids = [*packer._answer_ids(answer), packer._eos]
        fixed = Row("twigvlm", 20).build(backbone)
        wanted = set(drawn[case, rollout].tolist())

        def scores(state: LayerState, wanted: set[int] = wanted) -> Tensor:
            place = state.layout.place[0].tolist()
            return torch.tensor([[float(p in wanted) for p in place]])

        fixed.scores = scores
        fixed.budget = Budget(5, "kept")
        decoder = Decoder(backbone, fixed)
        pixels = backbone.preprocess([Image.fromarray(sample["picture"])], ["x"])
        prompt = backbone.prompt(question, 1)
        prefix = backbone.assemble([prompt], [backbone.visual(pixels, fixed)], None)
        kv, logits = decoder.whole(prefix, [prompt.after])
        likely = []
        for token in ids:
            likely.append(logits[0].log_softmax(-1)[token])
            logits = decoder.step(kv, torch.tensor([token]))
        assert torch.allclose(rewards[case, rollout], torch.stack(likely).mean(), atol=1e-4)


def test_probabilities_of_ordered_sets() -> None:
    """Over all orders they sum to one, and draws follow them (spec 7.7)."""
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    orders = torch.tensor([list(itertools.permutations(range(4), 2))])
    chances = twig_training.set_log_probability(shares, orders).exp()[0]
    assert torch.isclose(chances.sum(), torch.tensor(1.0), atol=1e-5)
    assert torch.isclose(chances[0], torch.tensor(0.5 * 0.3 / 0.5), atol=1e-5)
    torch.manual_seed(0)
    drawn = twig_training.draw_without_replacement(shares, 20000, 2)[0]
    found = torch.stack([(drawn == order).all(-1).float().mean() for order in orders[0]])
    assert torch.allclose(found, chances, atol=0.015)
    centred = twig_training.advantages(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    assert torch.allclose(centred, torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))


def test_budgets_shrink_while_training_goes_on() -> None:
    """P(i) ~ exp(-8 (t / t_max)^2 i) (spec 7.7): even at first, the smallest at last."""
    torch.manual_seed(0)
    first = [twig_training.draw_budget(0.0, 7) for _ in range(700)]
    last = [twig_training.draw_budget(1.0, 7) for _ in range(700)]
    assert min(first.count(n) for n in range(7)) > 60
    assert last.count(0) > 690


def test_reward_moves_only_the_gates_and_towards_what_pays(tmp_path: Path) -> None:
    """A policy step makes sets with a better reward more probable."""
    backbone = tiny_llava(tmp_path)
    method, model, batch = training(backbone, "twigvlm-pp", rollouts=8)
    model.phase = "reinforce"
    method.branch.requires_grad_(False)
    losses = twig_training.TwigTraining(method, method.parts["pruning_head"], model, batch)
    rewarded = 3
    losses.rewards = lambda drawn, *_: (drawn == rewarded).any(-1).float()  # type: ignore
    optimiser = torch.optim.Adam(method.parts["pruning_head"].parameters(), lr=3e-2)
    torch.manual_seed(0)
    before = losses.shares[:2, :, rewarded].detach().mean()
    for _ in range(15):
        del losses.__dict__["shares"]
        optimiser.zero_grad()
        losses.reinforce()["loss"].backward()
        optimiser.step()
    del losses.__dict__["shares"]
    assert losses.shares[:2, :, rewarded].mean() > 1.2 * before
    assert all(p.grad is None for p in method.branch.parameters())


def test_two_phases_give_one_checkpoint(tmp_path: Path) -> None:
    """The second phase trains the gates alone; the result holds the twig of the first."""
    backbone = tiny_llava(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
method: twigvlm-pp
tokens: 20
options: {{rollouts: 2, depth: 2, layer: 1, wipe_layer: 4, reinforced_attention: 0.5}}
model: {tmp_path / "model"}
data: micro
turns: 2
stages:
  - {{steps: 2, batch_size: 2, warmup_steps: 0, tune_model: false, phase: distill}}
  - {{steps: 2, batch_size: 2, warmup_steps: 0, tune_model: false, phase: reinforce,
      freeze: ["compressor.twig.*"]}}
"""
    )
    result = train(load_recipe(str(recipe)), tmp_path / "out")
    first, last = (load_file(tmp_path / f"out/stage-{n}/trained.safetensors") for n in (0, 1))
    assert all(name.startswith("compressor.pruning_head.") for name in last)
    stored = load_file(result / "model.safetensors")
    assert set(stored) == set(first)
    assert torch.equal(
        stored["compressor.twig.head.weight"], first["compressor.twig.head.weight"].half()
    )
    gate = "compressor.pruning_head.query.weight"
    assert not torch.equal(first[gate], last[gate])
    for tokens in (20, 12):  # one checkpoint serves every budget
        method, _ = load_method("twigvlm-pp", Budget(tokens), backbone, checkpoint=str(result))
        head = method.module.get_parameter("pruning_head.query.weight")  # type: ignore[union-attr]
        assert torch.allclose(head, last[gate], atol=1e-3)
