"""A step is the same however many passes, processes and stops it is divided into."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tiny import picture, save_tiny_llava, save_tiny_qwen3_vl, tiny_llava
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

from etcbench.errors import UsageError
from etcbench.recipes import load_recipe, train
from etcbench.run import load_compressor
from etcbench.selection import Kind
from etcbench.training import CompressionModel
from etcbench.training.log import last_complete, read_log
from etcbench.training.sharding import check_division, check_launch

RECIPE = """
method: {method}
tokens: 1
options: {options}
model: {model}
data: {data}
precision: fp32
max_length: 300
stages:
  - {{steps: {steps}, batch_size: 4, warmup_steps: 1, learning_rate: 1.0e-3, log_steps: 1,
      save_steps: {save}, group_by_modality: false}}
"""
LOG = "stage-0/log.jsonl"
PARTS = ("loss", "ce", "auxiliary", "accuracy", "grad_norm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and data: half of the samples have a picture, answers differ in length."""
    save_tiny_llava(tmp_path / "model", layers=2)
    records = []
    for number in range(12):
        said = [("human", "what is it?"), ("gpt", "a" * (1 + 5 * (number % 3)))] * (1 + number % 2)
        record: dict[str, Any] = {
            "id": number,
            "conversations": [{"from": role, "value": text} for role, text in said],
        }
        if number % 2:
            record["image"] = f"{number}.png"
            picture(number).save(tmp_path / f"{number}.png")
        records.append(record)
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def recipe(
    folder: Path, method: str = "etc", model: str = "model", steps: int = 4, save: int = 100
) -> Path:
    path = folder / f"{method}.yaml"
    options = "{lambda_vid: 1.0e-3}" if method == "etc" else "{}"
    path.write_text(
        RECIPE.format(
            method=method,
            options=options,
            model=folder / model,
            data=folder / "data.json",
            steps=steps,
            save=save,
        )
    )
    return path


def curve(run: Path) -> list[dict[str, float]]:
    return [
        {part: record[part] for part in PARTS if part in record}
        for record in read_log(run / LOG)
        if "loss" in record
    ]


def assert_same(first: Path, second: Path, atol: float) -> None:
    """The same parts of the loss at every step, and the same weights."""
    assert len(curve(first)) == len(curve(second)) > 0
    for one, other in zip(curve(first), curve(second), strict=True):
        assert one.keys() == other.keys()
        for part in one:
            assert one[part] == pytest.approx(other[part], abs=atol, rel=atol), part
    assert all("auxiliary" in one for one in curve(first))
    weights = [load_file(run / "stage-0" / "trained.safetensors") for run in (first, second)]
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name].float(), value.float(), atol=10 * atol), name


@pytest.mark.parametrize("setting", ["stages.0.micro_batch_size=1", "gradient_checkpointing=true"])
def test_passes_and_recomputed_activations_change_nothing(folder: Path, setting: str) -> None:
    path = str(recipe(folder))
    train(load_recipe(path), folder / "whole")
    train(load_recipe(path, [setting]), folder / "divided")
    assert_same(folder / "whole", folder / "divided", 1e-5)


def test_two_processes_train_as_one(folder: Path) -> None:
    """Issue 6: the loss curve over 50 steps, to 1e-4."""
    path = recipe(folder, steps=50)
    train(load_recipe(str(path)), folder / "one")
    assert len(curve(folder / "one")) == 50
    launch("-m", "etcbench", "train", "--recipe", str(path), "--out", str(folder / "two"))
    assert_one_training(folder / "one", folder / "two")


def test_two_processes_that_divide_the_model_train_as_one(folder: Path) -> None:
    """FSDP 1 and 2; ETC reads a layer outside its forward pass, and behind a second pass."""
    path = recipe(folder)
    whole = path.read_text()
    path.write_text(whole.replace("{lambda_vid: ", "{attn_source: full_pass, lambda_vid: "))
    train(load_recipe(str(path)), folder / "one")
    launch(str(Path(__file__).with_name("sharded.py")), str(path), str(folder))
    for run in ("fsdp1", "fsdp2"):
        assert_one_training(folder / "one", folder / run)


def assert_one_training(one: Path, two: Path) -> None:
    assert all(r["processes"] == 2 for r in read_log(two / LOG) if "loss" in r)
    assert_same(one, two, 1e-4)
    results = [load_file(run / "result" / "model.safetensors") for run in (one, two)]
    assert results[0].keys() == results[1].keys()


def launch(*program: str) -> None:
    """Run two processes; accelerate launches several on CPUs through MPI only."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *torchrun, *program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"transformer_cls_names_to_wrap": ["CLIPEncoderLayer"]}, "layer_cls_to_wrap: Layer"),
        ({"auto_wrap_policy": size_based_auto_wrap_policy}, "TRANSFORMER_BASED_WRAP"),
        ({"fsdp_version": 1}, "fsdp_use_orig_params: true"),
    ],
)
def test_a_division_that_would_go_wrong_is_refused(setting: dict[str, Any], words: str) -> None:
    plugin = SimpleNamespace(
        fsdp_version=2,
        use_orig_params=None,
        transformer_cls_names_to_wrap=["Layer"],
        auto_wrap_policy=transformer_auto_wrap_policy,
    )
    state = SimpleNamespace(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    check_division(state, "Layer")
    vars(plugin).update(setting)
    with pytest.raises(UsageError, match=words):
        check_division(state, "Layer")


def test_a_method_that_reads_divided_layers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_llava(tmp_path, layers=2)
    model = CompressionModel(backbone, load_compressor("full", None, backbone).compressor)
    stream = backbone.text([(5, 6)], Kind.SUFFIX)
    assert model.decoder.attention(1, stream).keys.shape[2] == 2
    monkeypatch.setattr("etcbench.training.model.is_unit", lambda _: True)
    with pytest.raises(UsageError, match="train it with DDP"):
        model.decoder.attention(1, stream)


def test_zero_3_has_to_give_its_weights_back() -> None:
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    state = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, deepspeed_plugin=plugin)
    check_division(state, "Layer")
    zero["stage3_gather_16bit_weights_on_model_save"] = False
    with pytest.raises(UsageError, match="zero3_save_16bit_model: true"):
        check_division(state, "Layer")
    zero["stage"] = 2
    check_division(state, "Layer")


def test_what_accelerate_cannot_do_here_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_launch(cpu=True, main=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_launch(cpu=False, main=True)
    check_launch(cpu=True, main=False)
    assert not capsys.readouterr().err
    check_launch(cpu=True, main=True)
    assert "DDP" in capsys.readouterr().err
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(UsageError, match="fsdp_cpu_ram_efficient_loading: false"):
        check_launch(cpu=False, main=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("etcbench.training.sharding.is_deepspeed_available", lambda: False)
    with pytest.raises(UsageError, match="pip install deepspeed"):
        check_launch(cpu=False, main=True)


def test_a_killed_training_gives_the_same_losses(folder: Path) -> None:
    path = recipe(folder, steps=12, save=3)
    train(load_recipe(str(path)), folder / "whole")
    command = [sys.executable, "-m", "etcbench", "train", "--recipe", str(path), "--out"]
    process = subprocess.Popen([*command, str(folder / "killed")], stderr=subprocess.DEVNULL)
    log = folder / "killed" / LOG
    begin = time.monotonic()
    while time.monotonic() - begin < 300 and process.poll() is None:
        if last_complete(log.parent) and len(read_log(log)) >= 5:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last_complete(log.parent) is not None
    train(load_recipe(str(path)), folder / "killed")
    assert curve(folder / "killed") == curve(folder / "whole")
    weights = [load_file(folder / run / "stage-0" / "trained.safetensors") for run in RUNS]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


RUNS = ("whole", "killed")


def test_a_checkpoint_that_was_not_finished_is_not_continued_from(tmp_path: Path) -> None:
    for step, state in ((3, '{"global_step": 3}'), (6, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("save", [save_tiny_llava, save_tiny_qwen3_vl])
def test_only_what_a_stage_names_is_trained(folder: Path, save: Any) -> None:
    save(folder / "other", layers=2)
    path = str(recipe(folder, "voco", model="other", steps=1))
    trained = {}
    for tune in ("true", "false"):
        out = folder / tune
        settings = [f"stages.0.tune_model={tune}", "stages.0.tune_projector=true"]
        train(load_recipe(path, settings), out)
        trained[tune] = set(load_file(out / "result" / "model.safetensors"))
    projector = {name for name in trained["true"] if "merger" in name or "projector" in name}
    assert projector
    assert trained["false"] == projector | {"compressor.tokens"}
    assert any("language_model.layers" in name for name in trained["true"])
    assert not any("blocks" in n or "vision_tower" in n or "embed" in n for n in trained["true"])
