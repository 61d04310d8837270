"""Training: packed turns, the same loss sequence after a stop, and what a checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed import BACKBONES
from safetensors.torch import load_file
from tiny import tiny_llava

from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.checkpoints import installed, load_method
from etcbench.compressor import Budget
from etcbench.errors import MissingCheckpointError, UsageError
from etcbench.packing import Packer
from etcbench.recipes import load_recipe, train
from etcbench.training import CompressionModel, Indexed, Stage, choose_trainable, train_stage

RECIPE = """
method: {method}
tokens: 1
options: {options}
model: {model}
data: micro
turns: 3
stages:
  - {{steps: 3, batch_size: 2, warmup_steps: 1, learning_rate: 1.0e-3}}
"""


VARIANCES = ("variance_low", "variance_median", "variance_high")
SMALL = {"queries": 3, "width": 24, "depth": 2, "heads": 2, "dropout": 0.1}


class Stream:
    """Random pictures with questions and answers of different length."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at

    def sample(self, index: int) -> dict[str, Any]:
        if index == self.fail_at:
            raise KeyboardInterrupt
        rng = np.random.default_rng(index)
        blind = index % 5 == 4
        picture = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        turns = [(f"what {'is ' * k}it?", f"a{'b' * int(rng.integers(4))}") for k in range(3)]
        return {"picture": None if blind else picture, "turns": turns}


def build(
    path: Path, name: str = "voco", family: str = "llava", **options: Any
) -> tuple[Backbone, CompressionModel]:
    backbone = BACKBONES[family](path)
    torch.manual_seed(0)
    kind = registry.load("baselines", name)
    budget = Budget(1) if kind.takes_budget and "compress" not in options else None
    return backbone, CompressionModel(backbone, kind.from_budget(budget, backbone.spec, **options))


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("name", ["full", "voco", "etc"])
def test_packed_turns_give_the_loss_of_each_turn_alone(
    tmp_path: Path, name: str, family: str
) -> None:
    options = {"lambda_vid": 0.0} if name == "etc" else {}
    backbone, model = build(tmp_path, name, family, **options)
    layout = model._parts[1].prompt_layout
    packer = Packer(backbone, layout)
    samples = [Stream().sample(index) for index in range(5)]
    with torch.no_grad():
        packed = model(**packer(samples))["ce"]
        single = [
            model(**packer([{"picture": s["picture"], "turns": [turn]}]))["ce"]
            for s in samples
            for turn in s["turns"]
        ]
    assert torch.allclose(packed, torch.stack(single).mean(), atol=1e-5)


def test_only_the_answer_is_trained_and_only_the_question_votes(tmp_path: Path) -> None:
    backbone, _ = build(tmp_path)
    packer = Packer(backbone, "image_first")
    batch = packer([{"picture": np.zeros((24, 24, 3), np.uint8), "turns": [("why?", "so")]}])
    packed = batch["batch"]
    tokenizer = backbone.processor.tokenizer
    trained = packed.labels[0][packed.labels[0] >= 0].tolist()
    assert tokenizer.decode(trained) == " so</s>"
    text = torch.tensor(packed.text[0])
    assert tokenizer.decode(text[packed.instruction[0]].tolist()) == "why?"
    assert torch.isclose(packed.weights.sum(), torch.tensor(1.0))


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {record["step"]: record["ce"] for record in records if "ce" in record}


@pytest.mark.parametrize("family", BACKBONES)
def test_etc_without_lambda_trains_as_voco(tmp_path: Path, family: str) -> None:
    """Spec abstractive 6.6: the same losses, and the same weights to the last bit."""
    found = []
    for name, options in (("voco", {}), ("etc", {"lambda_vid": 0.0})):
        backbone = BACKBONES[family](tmp_path / "model")
        torch.manual_seed(0)
        method = registry.load("baselines", name).from_budget(Budget(1), backbone.spec, **options)
        model = CompressionModel(backbone, method)
        assert model.auxiliary is None
        stage = Stage(steps=20, batch_size=2, warmup_steps=2, log_steps=1)
        choose_trainable(model, stage, tokens_too=False)
        packer = Packer(backbone, method.prompt_layout)
        train_stage(model, stage, Indexed(Stream(), 0, 40), packer, tmp_path / name, 0)
        found.append((losses(tmp_path / name), model.state_dict()))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 20
    assert all(torch.equal(found[1][1][name], value) for name, value in found[0][1].items())


@pytest.mark.parametrize(
    ("name", "family", "options"),
    [
        ("etc", "llava", {"lambda_vid": 1e-3}),
        ("mqt-llava", "qwen3_vl", {}),  # draws its budget at every step
        ("llama-vid", "llava", {"compress": "mean", **SMALL}),  # dropout
    ],
)
def test_a_killed_training_continues_exactly(
    tmp_path: Path, name: str, family: str, options: dict[str, Any]
) -> None:
    stage = Stage(steps=6, batch_size=2, warmup_steps=1, save_steps=3, log_steps=1)
    results = {}
    for run, streams in (("whole", [Stream()]), ("stopped", [Stream(fail_at=9), Stream()])):
        for stream in streams:
            backbone, model = build(tmp_path / "model", name, family, **options)
            choose_trainable(model, stage, tokens_too=False)
            packer = Packer(backbone, model.method.prompt_layout)
            try:
                train_stage(model, stage, Indexed(stream, 0, 12), packer, tmp_path / run, 0)
            except KeyboardInterrupt:
                assert stream.fail_at is not None
        results[run] = model.state_dict()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 6
    for key, value in results["whole"].items():
        assert torch.equal(results["stopped"][key], value), key


@pytest.mark.parametrize(("method", "options"), [("voco", "{}"), ("etc", "{lambda_vid: 0.001}")])
def test_a_recipe_gives_a_checkpoint_that_loads(tmp_path: Path, method: str, options: str) -> None:
    backbone = tiny_llava(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(method=method, options=options, model=tmp_path / "model"))
    result = train(load_recipe(str(recipe)), tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out/stage-0/log.jsonl").open()]
    logged = next(record for record in records if "ce" in record)
    assert logged.keys() >= {"learning_rate", "grad_norm", "accuracy", "eta_seconds"}
    assert logged["samples_per_second"] > 0 and logged["tokens_per_second"] > 0
    extra = {"auxiliary", "auxiliary_over_ce", "unexplained", *VARIANCES}
    assert extra & logged.keys() == (extra if method == "etc" else set())
    if method == "etc":
        ratio = logged["auxiliary"] / logged["ce"]
        assert logged["auxiliary_over_ce"] == pytest.approx(ratio, abs=1e-4)
        low, middle, high = (logged[name] for name in VARIANCES)
        assert 0 < low <= middle <= high
    stored = load_file(result / "model.safetensors")
    assert stored["compressor.tokens"].shape == (1, backbone.spec.hidden)
    assert not any("vision_tower" in k or "embed_tokens" in k or "rho" in k for k in stored)
    original = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    compressor, identity = load_method(method, Budget(1), backbone, checkpoint=str(result))
    assert identity["checkpoint"] == "result"
    with installed(compressor, backbone):
        tuned = backbone.model.state_dict()
        assert any(not torch.equal(tuned[name], value) for name, value in original.items())
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in original.items())


@pytest.mark.parametrize(("bits", "parts"), [(8, 200), (4, 13)])
def test_tuned_weights_may_be_kept_as_differences(tmp_path: Path, bits: int, parts: int) -> None:
    backbone = tiny_llava(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(method="voco", options="{}", model=tmp_path / "model"))
    half = train(load_recipe(str(recipe)), tmp_path / "out").rename(tmp_path / "half")
    # A finished training is only written again.
    small = train(load_recipe(str(recipe), [f"storage=delta{bits}"]), tmp_path / "out")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (small, half)]
    assert sizes[0] < 0.7 * sizes[1]  # the rest of so small a model is headers
    assert f"{bits}-bit differences" in (small / "README.md").read_text()
    trained = load_file(tmp_path / "out" / "stage-0" / "trained.safetensors")
    compressor, _ = load_method("voco", Budget(1), backbone, checkpoint=str(small))
    assert compressor.tuned.keys() == {
        name.removeprefix("model.") for name in trained if name.startswith("model.")
    }
    matrices = 0
    for name, value in compressor.tuned.items():
        wanted, base = trained[f"model.{name}"], backbone.model.get_parameter(name).detach()
        if value.ndim > 1:
            matrices += 1
            largest = (wanted - base).abs().amax(-1, keepdim=True)
            assert ((value - wanted).abs() <= largest / parts + 1e-7).all(), name
        else:
            assert torch.equal(value, wanted.half()), name
    assert matrices


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny_llava(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(method="voco", options="{}", model=tmp_path / "model"))
    return train(load_recipe(str(recipe)), tmp_path / "out")


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, checkpoint: Path
) -> None:
    backbone = tiny_llava(tmp_path / "model")
    for name, tokens, what in (("etc", 1, "method voco"), ("voco", 2, "tokens 1 instead of 2")):
        with pytest.raises(UsageError, match=what):
            load_method(name, Budget(tokens), backbone, checkpoint=str(checkpoint))
    other = tiny_llava(tmp_path / "other", seed=5)
    with pytest.raises(UsageError, match="weights"):
        load_method("voco", Budget(1), other, checkpoint=str(checkpoint))
    deeper = tiny_llava(tmp_path / "deeper", layers=6)
    with pytest.raises(UsageError, match="layers 4 instead of 6"):
        load_method("voco", Budget(1), deeper, checkpoint=str(checkpoint))


def test_a_trained_method_without_weights_names_the_ways_out(tmp_path: Path) -> None:
    backbone = tiny_llava(tmp_path)
    with pytest.raises(MissingCheckpointError) as caught:
        load_method("etc", Budget(1), backbone)
    for way in ("--checkpoint", "etcbench train", "--untrained"):
        assert way in str(caught.value)
    assert load_method("etc", Budget(1), backbone, untrained=True)[1] == {"untrained": "yes"}


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    recipe = load_recipe(str(tmp_path / "recipe.yaml"), seed=7)
    with pytest.raises(UsageError, match="another recipe"):
        train(recipe, checkpoint.parent)
