"""Recipes: fields by name and type, what they would take, adapters, and the data they name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import picture, tiny_llava
from typer.testing import CliRunner

from etcbench.adapters import LoRA, add_adapter, merged_adapter
from etcbench.backbones.loading import micro_models
from etcbench.checkpoints import installed, load_method
from etcbench.cli import app
from etcbench.compressor import Budget
from etcbench.efficiency.shapes import KNOWN
from etcbench.errors import UsageError
from etcbench.packing import Packer
from etcbench.recipes import load_recipe, recipe_names, train
from etcbench.recipes.launch import Launch, read_launch
from etcbench.recipes.plan import plan, show_plan
from etcbench.recipes.recipe import check_trained, method_of
from etcbench.recipes.run import start, trained_by
from etcbench.recipes.sources import data_of, open_source
from etcbench.training import CompressionModel, Stage, choose_trainable
from etcbench.training.stage import part_of


def test_fields_are_set_by_path_and_read_as_their_types() -> None:
    changes = ["options.alpha=0.2", "options.lambda_vid=1e-4", "seed=1", "stages.0.steps=300"]
    recipe = load_recipe("etc-llava-1.5-7b", [*changes, "lora.rank=4", "images=null"], tokens=2)
    assert recipe.options["alpha"] == 0.2 and recipe.options["lambda_vid"] == 1e-4
    assert (recipe.seed, recipe.tokens, recipe.images) == (1, 2, None)
    assert (recipe.stages[0].steps, recipe.stages[0].epochs) == (300, None)
    assert recipe.lora == LoRA(rank=4)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("sed=1", "unknown field of recipe etc-llava-1.5-7b 'sed'; did you mean seed"),
        ("stages.0.stepps=1", "unknown field .*stages.0 'stepps'; did you mean steps"),
        ("stages.3.steps=1", "'3' is not one of 0 to 0"),
        ("seed=abc", "seed is a whole number"),
        ("seed=1.5", "seed cannot be 1.5"),
        ("precision=fp8", "unknown value of .*precision 'fp8'"),
        ("options.alhpa=x", "unknown option of etc 'alhpa'"),
        ("options.alpha=x", "alpha is a number"),
        ("stages.0.steps=0", "steps is at least 1"),
        ("stages.0.learning_rate=-1", "learning_rate cannot be negative"),
        ("stages.0.warmup_ratio=3", "warmup_ratio is a share"),
        ("stages.0.betas=[0.9]", "betas are two numbers"),
        ("lora.rank=0", "rank is at least 1"),
        ("seed=-1", "seed is at least 0, not -1"),
        ("max_length=0", "max_length is at least 1"),
        ("lora.dropout=1", "dropout is a share"),
        ("seed.deep=1", "seed has no fields"),
        ("seed", "not of the form"),
    ],
)
def test_wrong_settings_are_named(setting: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        load_recipe("etc-llava-1.5-7b", [setting])


def test_a_stage_says_how_long_it_trains() -> None:
    for given in ({}, {"steps": 1, "epochs": 1.0}):
        with pytest.raises(UsageError, match="either steps or epochs"):
            Stage(**given)  # type: ignore[arg-type]
    stage = Stage(epochs=1, batch_size=128, warmup_ratio=0.03)
    assert stage.length(665_298) == 5198
    assert stage.warmup(5198) == 156
    with pytest.raises(UsageError, match="needs steps"):
        stage.length(None)


def test_a_step_divides_among_processes() -> None:
    assert Stage(steps=1, batch_size=128, micro_batch_size=4).split(8) == (4, 4)
    assert Stage(steps=1, batch_size=8).split(2) == (4, 1)
    for processes, micro, what in ((3, None, "among 3 processes"), (2, 3, "passes of 3")):
        with pytest.raises(UsageError, match=what):
            Stage(steps=1, batch_size=8, micro_batch_size=micro).split(processes)


# Batch, epochs, rate, warm-up, length and trained parts of each stage: spec abstractive 1.6, 2.6,
# 3.4, 4.3, 5.2. LLaMA-VID's Q-Former starts from random weights, so stage 1 trains it, too.
WHOLE = {"language model", "token embeddings", "projector", "method"}
PAPERS: dict[str, list[tuple[int, float, float, float, int, set[str]]]] = {
    "etc-llava-1.5-7b": [(128, 1, 2e-5, 0.03, 2048, {*WHOLE, "auxiliary"})],
    "etc-qwen3-vl-2b": [(8, 1, 1e-4, 0.05, 2048, {"adapter", "projector", "method", "auxiliary"})],
    "voco-llava-1.5-7b": [(128, 2, 2e-5, 0.03, 2048, WHOLE)],
    "quecc-llava-1.5-7b": [
        (256, 1, 1e-3, 0.03, 2048, {"projector", "method"}),
        (128, 1, 2e-5, 0.03, 2048, WHOLE),
    ],
    "llama-vid-llava-1.5-7b": [
        (256, 1, 1e-3, 0.03, 2048, {"projector", "method"}),
        (128, 1, 2e-5, 0.03, 4096, WHOLE),
    ],
    "mqt-llava-1.5-7b": [
        (256, 1, 1e-3, 0.03, 2048, {"method"}),
        (128, 2, 2e-5, 0.03, 2048, WHOLE - {"projector"}),
    ],
}


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_have_the_papers_hyperparameters(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.precision == "bf16" and recipe.data == "llava-mix665k"
    first = ["llava-pretrain-558k"] * (len(recipe.stages) - 1)
    assert [stage.data for stage in recipe.stages] == [*first, None]
    for stage, paper in zip(recipe.stages, PAPERS[name], strict=True):
        length = stage.max_length or recipe.max_length
        found = (stage.batch_size, stage.epochs, stage.learning_rate, stage.warmup_ratio, length)
        assert found == paper[:5]
        assert (stage.weight_decay, stage.final_rate, stage.betas) == (0, 0, (0.9, 0.999))
        assert stage.vision_learning_rate == 0 and stage.group_by_modality
        # QueCC's first stage reads conversations, whose question it needs.
        assert stage.captions == (stage.data is not None and recipe.method != "quecc")
    if recipe.method == "etc":
        wanted = {"lambda_vid": 1e-5, "alpha": 0.6, "layer": -1, "rank": 8}
        assert recipe.options == wanted and recipe.tokens == 1
        assert recipe.stages[0].auxiliary_learning_rate is None  # that of the rest
        assert recipe.lora == (LoRA(rank=8, alpha=32) if "qwen3" in name else None)
    if recipe.method == "mqt-llava":
        assert [stage.phase for stage in recipe.stages] == ["all", None]
        assert recipe.stages[1].freeze == ("compressor.pos_embed",)


@pytest.mark.parametrize("family", ["micro", "micro-qwen3vl"])
def test_voco_is_trained_as_etc_is(family: str) -> None:
    """So that lambda 0 on the same recipe is VoCo's run."""
    etc, voco = (load_recipe(f"{family}-{method}-1") for method in ("etc", "voco"))
    assert replace(voco, name=etc.name, method="etc", options=etc.options) == etc


REAL = [name for name in recipe_names() if load_recipe(name).model in KNOWN]
MICRO = [name for name in recipe_names() if load_recipe(name).model in micro_models()]


@pytest.mark.parametrize("name", [*REAL, *MICRO])
def test_every_recipe_can_be_planned_without_weights(name: str) -> None:
    recipe = load_recipe(name)
    found = plan(recipe)
    for stage, planned in zip(recipe.stages, found.stages, strict=True):
        assert planned.trained and planned.steps > 0
        assert planned.measured == (data_of(recipe, stage) == "micro")
        assert found.parameters.keys() >= planned.trained.keys()
    if name in PAPERS:
        assert [set(stage.trained) for stage in found.stages] == [p[5] for p in PAPERS[name]]


def test_the_plan_of_etc_on_llava_is_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(load_recipe("etc-llava-1.5-7b"))
    backbone = sum(v for k, v in found.parameters.items() if k not in ("method", "auxiliary"))
    assert backbone == 7_063_427_072
    assert found.parameters["projector"] == 20_979_712  # spec abstractive 0.2
    assert found.parameters["method"] == 4096
    assert found.parameters["auxiliary"] == pytest.approx(21.3e6, rel=5e-3)  # spec 1.3
    (stage,) = found.stages
    assert "vision tower" not in stage.trained
    assert (stage.steps, stage.batch_size) == (5198, 128)
    show_plan(found, as_json=False)
    printed = capsys.readouterr().out
    for text in ("7,084,705,800", "5,198", "one device", "gradient checkpointing", "at most"):
        assert text in printed
    ran = CliRunner().invoke(app, ["train", "--recipe", "etc-llava-1.5-7b", "--dry-run", "--json"])
    assert ran.exit_code == 0
    assert json.loads(ran.stdout)["stages"][0]["steps"] == 5198


def test_states_are_divided_as_the_launch_says(tmp_path: Path) -> None:
    configs = {
        "none": "distributed_type: 'NO'\nnum_processes: 1\n",
        "ddp": "distributed_type: MULTI_GPU\nnum_processes: 8\n",
        "zero2": "distributed_type: DEEPSPEED\nnum_processes: 8\ndeepspeed_config: {zero_stage: 2}",
        "zero3": "distributed_type: DEEPSPEED\nnum_processes: 8\n"
        "deepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu}",
        "fsdp": "distributed_type: FSDP\nnum_processes: 8\nfsdp_config: {fsdp_version: 2, "
        "fsdp_reshard_after_forward: true}",
    }
    recipe = load_recipe("etc-llava-1.5-7b")
    found: dict[str, Any] = {}
    for name, text in configs.items():
        (tmp_path / name).write_text(text)
        found[name] = plan(recipe, tmp_path / name).stages[0]
    trained, everything = sum(found["none"].trained.values()), 7_084_705_800
    assert found["none"].memory.weights == 4 * everything
    assert found["none"].memory.optimizer == 8 * trained
    assert found["ddp"].memory.gradients == 2 * found["none"].memory.gradients == 8 * trained
    zero2 = found["zero2"].memory
    assert (zero2.weights, zero2.optimizer) == (2 * everything, 12 * trained / 8)
    assert found["zero3"].memory.weights == 2 * everything / 8
    assert found["zero3"].memory.optimizer == 0  # on the host
    assert found["fsdp"].memory.weights == 4 * everything / 8
    teacher = plan(load_recipe("etc-llava-1.5-7b", ["options.attn_source=frozen_teacher"]))
    more = teacher.stages[0].memory.weights - found["none"].memory.weights
    assert more == 4 * 7_063_427_072
    assert found["ddp"].passes == 4 and found["none"].passes == 32
    assert found["fsdp"].memory.total < found["ddp"].memory.total
    with pytest.raises(UsageError, match="does not exist"):
        read_launch(tmp_path / "nothing.yaml")
    (tmp_path / "odd").write_text("a: 1")
    with pytest.raises(UsageError, match="no distributed_type"):
        read_launch(tmp_path / "odd")
    assert read_launch(None) == Launch()


def test_published_data_are_found_in_their_folder_or_asked_for(tmp_path: Path) -> None:
    recipe = load_recipe("etc-llava-1.5-7b")
    with pytest.raises(UsageError, match=r"llava_v1_5_mix665k\.json.*--data DIR"):
        open_source(recipe, recipe.stages[0])
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    file = tmp_path / "llava_v1_5_mix665k.json"
    file.write_text(json.dumps([{"id": 0, "conversations": talk}]))
    for data in (tmp_path, file):
        recipe = load_recipe("etc-llava-1.5-7b", data=str(data))
        assert open_source(recipe, recipe.stages[0]).sample(0)["turns"] == [("a", "b")]
    recipe = load_recipe("etc-llava-1.5-7b", data="elsewhere")
    with pytest.raises(UsageError, match="unknown data 'elsewhere'"):
        open_source(recipe, recipe.stages[0])


ADAPTED = """
method: {method}
tokens: 1
model: {model}
data: {data}
precision: fp32
lora: {{rank: 4, alpha: 8}}
stages:
  - {{steps: 3, batch_size: 2, warmup_steps: 0, learning_rate: 1.0e-2}}
"""


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # by peft
def test_an_adapter_is_stored_as_peft_does_and_evaluated_as_trained(tmp_path: Path) -> None:
    backbone = tiny_llava(tmp_path / "model", layers=2)
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    picture().save(tmp_path / "a.png")
    records = [{"id": n, "image": "a.png", "conversations": talk} for n in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    path = tmp_path / "voco.yaml"
    path.write_text(
        ADAPTED.format(method="voco", model=tmp_path / "model", data=tmp_path / "data.json")
    )
    recipe, out = load_recipe(str(path)), tmp_path / "out"
    result = train(recipe, out)
    trained = start(recipe, out).eval()
    trained.load_state_dict(trained_by(recipe, out), strict=False)
    adapter = [name for name, _ in trained.named_parameters() if part_of(name) == "adapter"]
    assert len(adapter) == 2 * 2 * 7  # layers, factors, linear layers
    batch = Packer(backbone, "image_first")([{"picture": picture(1), "turns": [("x", "y")]}])
    with torch.no_grad():
        wanted = trained(**batch)["ce"]
        compressor, _ = load_method("voco", Budget(1), backbone, checkpoint=str(result))
        plain = CompressionModel(backbone, compressor).eval()(**batch)["ce"]
        with installed(compressor, backbone):
            found = CompressionModel(backbone, compressor).eval()(**batch)["ce"]
    assert torch.isclose(found, wanted, atol=5e-3)  # the projector is stored in half precision
    assert (plain - wanted).abs() > 20 * (found - wanted).abs()

    merged = merged_adapter(backbone.model, result)
    layer = trained.model.get_submodule("model.language_model.layers.1.mlp.up_proj")
    exact = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.allclose(merged["model.language_model.layers.1.mlp.up_proj.weight"], exact)
    theirs = PeftModel.from_pretrained(tiny_llava(tmp_path / "model").model, str(result))
    other = theirs.merge_and_unload().get_parameter(
        "model.language_model.layers.1.mlp.up_proj.weight"
    )
    assert torch.allclose(other, exact, atol=1e-6)


def test_an_adapter_that_cannot_be_merged_is_named(tmp_path: Path) -> None:
    backbone = tiny_llava(tmp_path / "model", layers=1)
    down = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight"
    up = down.replace("lora_A", "lora_B")
    whole = {down: torch.zeros(2, 32), up: torch.zeros(48, 2)}
    plain: dict[str, Any] = {"r": 2, "lora_alpha": 4}

    def merge(config: Any, weights: dict[str, torch.Tensor]) -> Any:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save_file(weights, tmp_path / "adapter_model.safetensors")
        return merged_adapter(backbone.model, tmp_path)

    assert len(merge(plain, whole)) == 1
    for config, weights, words in (
        ({"lora_alpha": 4}, whole, "is no adapter's of low rank"),
        ([], whole, "is no adapter's of low rank"),
        ({**plain, "use_dora": True}, whole, "use_dora, which are not read here"),
        ({**plain, "rank_pattern": {"up_proj": 4}}, whole, "rank_pattern"),
        (plain, {down: whole[down]}, "lora_A.weight is no half"),
        (plain, {**whole, "x.weight": torch.zeros(1)}, "x.weight is no half"),
        (plain, {**whole, up: torch.zeros(47, 2)}, "another shape"),
    ):
        with pytest.raises(UsageError, match=words):
            merge(config, weights)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match="does not load"):
        merged_adapter(backbone.model, tmp_path)


STAGED = """
method: llama-vid
tokens: 2
options: {{queries: 3, width: 24, depth: 2, heads: 2}}
model: {model}
data: {data}
precision: fp32
stages:
  - {{steps: 2, batch_size: 2, log_steps: 1, captions: true, data: {captions}, tune_model: false,
      tune_projector: true}}
  - {{steps: 1, batch_size: 2, log_steps: 1, max_length: 300}}
"""


def test_captions_then_conversations_each_turn_with_its_own_tokens(tmp_path: Path) -> None:
    """The two stages of LLaMA-VID (spec abstractive 4.3), from the recipe to the checkpoint."""
    backbone = tiny_llava(tmp_path / "model", layers=2)
    picture().save(tmp_path / "a.png")
    names = ("captions", "data")
    for name, turns in zip(names, (1, 2), strict=True):
        talk = [{"from": who, "value": "a"} for _ in range(turns) for who in ("human", "gpt")]
        records = [{"id": n, "image": "a.png", "conversations": talk} for n in range(4)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    path = tmp_path / "vid.yaml"
    files = {name: tmp_path / f"{name}.json" for name in names}
    path.write_text(STAGED.format(model=tmp_path / "model", **files))
    result = train(load_recipe(str(path)), tmp_path / "out")
    method, _ = load_method("llama-vid", Budget(2), backbone, checkpoint=str(result))
    assert method.tuned.keys() >= {"model.multi_modal_projector.linear_1.weight"}
    first, second = (
        load_file(tmp_path / "out" / f"stage-{number}" / "trained.safetensors").keys()
        for number in range(2)
    )
    assert not any("language_model" in name for name in first)
    assert {"compressor.W_v.weight", "model.model.multi_modal_projector.linear_2.bias"} <= first
    assert first < second and any("language_model.layers" in name for name in second)


def test_an_adapter_is_all_of_the_language_model_that_is_trained(tmp_path: Path) -> None:
    recipe = load_recipe("etc-qwen3-vl-2b")
    assert recipe.lora == LoRA(rank=8, alpha=32)
    trained = plan(recipe).stages[0].trained
    assert trained.keys() == {"projector", "adapter", "method", "auxiliary"}
    # rank x (inputs + outputs) of seven linear layers in each of 28 decoder layers
    widths = 2 * (2048 + 2048) + 2 * (2048 + 1024) + 3 * (2048 + 6144)
    assert trained["adapter"] == 28 * 8 * widths
    backbone = tiny_llava(tmp_path)
    with pytest.raises(UsageError, match="no layers nothing"):
        add_adapter(backbone.model, LoRA(targets=("nothing",)))


def test_what_drops_inside_the_decoder_is_not_trained(tmp_path: Path) -> None:
    """Training leaves such a method out, so what came out would be a plain tuned model."""
    recipe = load_recipe("micro-llava")
    for name in ("fastv", "pdrop", "sparsevlm", "lightkv"):
        refused = replace(recipe, method=name, tokens=21, from_scratch=False)
        for begin in (train, start):
            with pytest.raises(UsageError, match=f"{name} .* method: full .* --checkpoint"):
                begin(refused, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for name in ("full", "pool", "downsample", "random", "visionzip", "etc", "quecc"):
        assert check_trained(replace(recipe, method=name))
    for name in ("twigvlm", "twigvlm-pp", "explainc"):  # they have losses of their own
        assert check_trained(replace(recipe, method=name))
    spec = tiny_llava(tmp_path / "model").spec
    assert method_of(replace(recipe, method="pool", tokens=9), spec).budget == Budget(9)


def test_patterns_freeze_parameters_by_name(tmp_path: Path) -> None:
    backbone = tiny_llava(tmp_path)
    compressor, _ = load_method("voco", Budget(1), backbone, untrained=True)
    model = CompressionModel(backbone, compressor)
    choose_trainable(model, Stage(steps=1, freeze=("*.mlp.*", "compressor.*")), tokens_too=False)
    trained = model.trained_names()
    assert trained and not any(".mlp." in n or n.startswith("compressor.") for n in trained)
    with pytest.raises(UsageError, match="no parameter is named nonsense"):
        choose_trainable(model, Stage(steps=1, freeze=("nonsense",)), tokens_too=False)
