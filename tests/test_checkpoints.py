"""Checkpoints: what is in them, from where they load, what they refuse, how they are pushed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llava, tiny_qwen3_vl
from torch import Tensor
from typer.testing import CliRunner

from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.checkpoints import CARD, CONFIG, WEIGHTS, load_method, save_checkpoint
from etcbench.cli import app
from etcbench.compressor import Budget
from etcbench.errors import BudgetError, UsageError
from etcbench.publish import prepare, push

RECIPE = {"name": "tiny", "seed": 3, "data": "micro", "options": {}}
SMALL = {"queries": 3, "width": 24, "depth": 2, "heads": 2}
NORM = "model.language_model.norm.weight"


@pytest.fixture(scope="module", params=["llava", "qwen3_vl"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    make = {"llava": tiny_llava, "qwen3_vl": tiny_qwen3_vl}[request.param]
    return make(tmp_path_factory.mktemp(request.param))


def store(
    folder: Path, backbone: Backbone, name: str, tokens: int | None, options: Any = None
) -> dict[str, Tensor]:
    """Write a checkpoint with random weights of a method and one tuned weight of the model."""
    kind = registry.load("baselines", name)
    budget = None if tokens is None else Budget(tokens)
    method = kind.from_budget(budget, backbone.spec, **(options or {}))
    own = {} if method.module is None else method.module.state_dict()
    weights = {f"compressor.{key}": torch.randn_like(value) for key, value in own.items()}
    weights[f"model.{NORM}"] = torch.rand(backbone.spec.hidden)
    save_checkpoint(folder, method, backbone, weights, {**RECIPE, "options": options or {}})
    return weights


@pytest.mark.parametrize(
    ("name", "tokens", "options"),
    [
        ("voco", 2, {}),
        ("etc", 2, {"lambda_vid": 1e-3, "embeddings": "distinct"}),
        ("quecc", 4, {}),
        ("llama-vid", 2, SMALL),
        ("mqt-llava", 9, {"queries": 9}),
    ],
)
def test_a_checkpoint_holds_a_method_and_brings_it_back(
    tmp_path: Path, backbone: Backbone, name: str, tokens: int, options: Any
) -> None:
    weights = store(tmp_path, backbone, name, tokens, options)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((CONFIG, WEIGHTS, CARD))
    method, identity = load_method(name, Budget(tokens), backbone, checkpoint=str(tmp_path))
    assert identity["checkpoint"] == tmp_path.name and len(identity["content"]) == 16
    assert not method.module.training
    if name in ("voco", "etc"):  # nothing of the decoder or the variances (acceptance 6)
        assert {key: len(v) for key, v in method.module.state_dict().items()} == {
            "tokens": 1 if name == "voco" else 2
        }
    for key, value in method.module.state_dict().items():
        assert torch.equal(value, weights[f"compressor.{key}"].half().float())
    assert torch.equal(method.tuned[NORM], weights[f"model.{NORM}"].half())
    card = (tmp_path / CARD).read_text()
    for said in (name, backbone.spec.name, backbone.identity["weights"], "seed 3", "transformers"):
        assert said in card


def test_another_backbone_size_or_budget_is_refused_by_name(
    tmp_path: Path, backbone: Backbone
) -> None:
    store(tmp_path / "quecc", backbone, "quecc", 4)
    with pytest.raises(UsageError, match="tokens 4 instead of 1"):
        load_method("quecc", Budget(1), backbone, checkpoint=str(tmp_path / "quecc"))
    with pytest.raises(UsageError, match="method quecc instead of mqt-llava"):
        load_method("mqt-llava", Budget(4), backbone, checkpoint=str(tmp_path / "quecc"))
    make = tiny_qwen3_vl if backbone.planes > 1 else tiny_llava
    deeper = make(tmp_path / "deeper", layers=5)
    with pytest.raises(UsageError, match="layers 4 instead of 5"):
        load_method("quecc", Budget(4), deeper, checkpoint=str(tmp_path / "quecc"))
    retrained = make(tmp_path / "retrained", seed=5)
    with pytest.raises(UsageError, match=f"weights {backbone.identity['weights']} instead of"):
        load_method("quecc", Budget(4), retrained, checkpoint=str(tmp_path / "quecc"))
    other = (tiny_llava if backbone.planes > 1 else tiny_qwen3_vl)(tmp_path / "other")
    with pytest.raises(UsageError, match=f"family {backbone.spec.family} instead of"):
        load_method("quecc", Budget(4), other, checkpoint=str(tmp_path / "quecc"))


def test_one_mqt_checkpoint_serves_every_budget(tmp_path: Path, backbone: Backbone) -> None:
    store(tmp_path, backbone, "mqt-llava", 9, {"queries": 9})
    for tokens in (1, 4, 9):
        method, _ = load_method("mqt-llava", Budget(tokens), backbone, checkpoint=str(tmp_path))
        assert method.schedule(36, 1) == [tokens]
    with pytest.raises(BudgetError, match="ask for 1 to 9"):
        load_method("mqt-llava", Budget(10), backbone, checkpoint=str(tmp_path))


def test_a_model_tuned_without_a_method_serves_those_without_weights(
    tmp_path: Path, backbone: Backbone
) -> None:
    weights = store(tmp_path, backbone, "full", None)
    for name, budget in (("full", None), ("pool", Budget(4)), ("blind", None)):
        method, identity = load_method(name, budget, backbone, checkpoint=str(tmp_path))
        assert torch.equal(method.tuned[NORM], weights[f"model.{NORM}"].half())
        assert identity["checkpoint"] == tmp_path.name
    with pytest.raises(UsageError, match="method full instead of quecc"):
        load_method("quecc", Budget(4), backbone, checkpoint=str(tmp_path))


def test_a_missing_or_surplus_weight_is_named(tmp_path: Path, backbone: Backbone) -> None:
    store(tmp_path, backbone, "quecc", 4)
    weights = load_file(tmp_path / WEIGHTS)
    gone = weights.pop("compressor.clip_attn.in_proj_bias")
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(UsageError, match=r"lacks compressor\.clip_attn\.in_proj_bias"):
        load_method("quecc", Budget(4), backbone, checkpoint=str(tmp_path))
    weights |= {"compressor.clip_attn.in_proj_bias": gone, "compressor.extra": gone.clone()}
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(UsageError, match=r"compressor\.extra \[96\] is not part of the model"):
        load_method("quecc", Budget(4), backbone, checkpoint=str(tmp_path))


def test_a_hub_id_is_fetched_without_files_that_could_run_code(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, backbone, "quecc", 4)
    asked: list[Any] = []

    def fetch(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, [p for p in allow_patterns if p in ("*.bin", "*.pth")]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    load_method("quecc", Budget(4), backbone, checkpoint="someone/quecc-4@v2")
    assert asked == [("someone/quecc-4", "v2", [])]
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UsageError, match="does not load"):
        load_method("quecc", Budget(4), backbone, checkpoint="someone/quecc-4")
    assert asked[1:] == [
        ("someone/quecc-4", None, []),
        ("someone/quecc-4", None, ["*.bin", "*.pth"]),
    ]


class Hub:
    """Records what a push asks of the hub."""

    def __init__(self, refuse: str | None = None) -> None:
        self.calls: list[Any] = []
        self.refuse = refuse

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        if self.refuse:
            raise RuntimeError(self.refuse)
        self.calls.append(("create", repository, private, exist_ok))

    def upload_folder(self, **named: Any) -> Any:
        self.calls.append(("upload", named))
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_a_push_takes_the_checkpoint_and_nothing_else(tmp_path: Path, backbone: Backbone) -> None:
    store(tmp_path, backbone, "quecc", 4)
    (tmp_path / "notes.txt").write_text("mine")
    hub = Hub()
    planned, address = push(tmp_path, "someone/quecc-4", private=True, hub=hub)
    assert address == "https://hub/commit/1"
    assert hub.calls[0] == ("create", "someone/quecc-4", True, True)
    uploaded = hub.calls[1][1]
    assert sorted(uploaded["allow_patterns"]) == sorted((CONFIG, WEIGHTS, CARD))
    assert planned.files[WEIGHTS] == (tmp_path / WEIGHTS).stat().st_size
    assert "quecc at 4 tokens" in uploaded["commit_message"]
    with pytest.raises(UsageError, match="someone/quecc-4 cannot be pushed: no token"):
        push(tmp_path, "someone/quecc-4", hub=Hub(refuse="no token\nmore"))


def test_what_cannot_be_pushed_is_said_before_anything_happens(
    tmp_path: Path, backbone: Backbone
) -> None:
    with pytest.raises(UsageError, match=f"it has no {CONFIG}"):
        prepare(tmp_path, "someone/name")
    store(tmp_path, backbone, "quecc", 4)
    with pytest.raises(UsageError, match="OWNER/NAME"):
        prepare(tmp_path, "name")
    listed = CliRunner().invoke(app, ["push", str(tmp_path), "someone/name", "--dry-run"])
    assert listed.exit_code == 0 and f"{WEIGHTS}\t" in listed.output
    (tmp_path / CONFIG).write_text(json.dumps({"method": "quecc"}))
    with pytest.raises(UsageError, match="does not parse"):
        prepare(tmp_path, "someone/name")


def test_differences_need_the_weights_they_differ_from(backbone: Backbone, tmp_path: Path) -> None:
    method = registry.load("baselines", "voco").from_budget(Budget(1), backbone.spec)
    weights = {f"model.{NORM}": torch.rand(backbone.spec.hidden)}
    with pytest.raises(ValueError, match="delta4"):
        save_checkpoint(tmp_path / "c", method, backbone, weights, {**RECIPE, "storage": "delta4"})
    assert not (tmp_path / "c").exists()
