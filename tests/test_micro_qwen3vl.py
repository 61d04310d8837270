"""The second embedded model: its shape, tokenizer, processor and recipe."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from etcbench.backbones import load_backbone
from etcbench.backbones.loading import micro_models
from etcbench.errors import UsageError
from etcbench.micro.questions import LOCATE
from etcbench.micro.qwen3_vl import PATCH, TOKEN, build_micro_qwen3vl, build_processor
from etcbench.micro.stream import MIX, SHAPE_RUN, TurnStream
from etcbench.micro.untrained import build, save
from etcbench.packing import Packer
from etcbench.recipes import load_recipe
from etcbench.recipes.run import Recipe, train
from etcbench.registry import load
from etcbench.scoring.boxes import iou, read_boxes, to_pixels
from etcbench.training import CompressionModel, Stage

SHAPES = ((2, 2), (2, 3), (1, 2))


@cache
def tokenizer():
    return build_processor().tokenizer


def ids(text):
    return tokenizer().encode(text, add_special_tokens=False)


def picture(cells=(2, 2), index=0):
    return Image.fromarray(TurnStream(5, cells=cells, blind_share=0).sample(index)["picture"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "untrained"
    save(build_micro_qwen3vl(0), build_processor(), path)
    return path


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(str(folder), device="cpu")


def test_the_model_is_small_and_has_what_the_family_has():
    model = build_micro_qwen3vl(3)
    config = model.config
    assert sum(p.numel() for p in model.parameters()) < 5_000_000
    assert config.text_config.num_key_value_heads < config.text_config.num_attention_heads
    assert len(config.vision_config.deepstack_visual_indexes) >= 2
    assert config.text_config.num_hidden_layers == 8
    rope = config.text_config.rope_parameters
    assert 2 * sum(rope["mrope_section"]) == config.text_config.head_dim
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_the_weights_depend_on_the_seed_alone():
    before = torch.random.get_rng_state()
    one, same, other = build_micro_qwen3vl(3), build_micro_qwen3vl(3), build_micro_qwen3vl(4)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = zip(one.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_training_text_survives_and_is_short():
    mix = {**MIX, "box_milli": 1.0}
    stream = TurnStream(12, shapes=SHAPES, mix=mix)
    for index in range(0, 3 * SHAPE_RUN, 4):
        for question, answer in stream.sample(index)["turns"]:
            assert tokenizer().decode(ids(question)) == question
            assert tokenizer().decode(ids(f" {answer}")).strip() == answer
            assert len(ids(question)) < 0.55 * len(question)


@pytest.mark.parametrize("text", ["", "naïve 图片 🙂", "\n\n  a", " center", "assistant\n x"])
def test_any_text_survives(text):
    assert tokenizer().decode(ids(text)) == text
    assert tokenizer().unk_token is None


def test_the_chat_template_is_the_familys():
    text = {"type": "text", "text": "Q"}
    asked = [{"role": "user", "content": [{"type": "image"}, text]}]
    render = build_processor().apply_chat_template
    prompt = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Q<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(asked, add_generation_prompt=True) == prompt
    told = [{"role": "system", "content": "S"}, {"role": "assistant", "content": "A"}]
    assert render(told) == "<|im_start|>system\nS<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"


@pytest.mark.parametrize("cells", [*SHAPES, (3, 2)])
def test_the_grid_follows_the_picture(backbone, cells):
    pixels = backbone.preprocess([picture(cells)], ["0"])
    raster = [cells[0] * 32 // TOKEN, cells[1] * 32 // TOKEN]
    assert pixels.grid.tolist() == [raster]
    visual = backbone.project(backbone.encode(pixels), None)
    assert visual.embeds.shape == (1, raster[0] * raster[1], 128)
    assert [features.shape for features in visual.deepstack] == [visual.embeds.shape] * 2


def test_the_processor_gives_what_the_backbone_preprocesses(backbone):
    images = [picture((2, 2)), picture((2, 3))]
    prompt = "<|vision_start|><|image_pad|><|vision_end|>Q"
    out = build_processor()(images=images, text=[prompt] * 2, padding=True, return_tensors="pt")
    pixels = backbone.preprocess(images, ["0", "1"])
    assert torch.equal(out["pixel_values"], pixels.tensors["pixel_values"])
    assert torch.equal(out["image_grid_thw"], pixels.tensors["image_grid_thw"])
    image = ids("<|image_pad|>")[0]
    assert (out["input_ids"] == image).sum(1).tolist() == pixels.grid.prod(1).tolist()


def test_pictures_of_the_world_keep_every_pixel(backbone):
    shown = picture()
    patches = backbone.preprocess([shown], ["0"]).tensors["pixel_values"]
    first = patches[0].view(3, 2, PATCH, PATCH)[:, 0]
    wanted = torch.from_numpy(np.asarray(shown)[:PATCH, :PATCH].copy()).permute(2, 0, 1)
    assert torch.allclose(first, wanted / 127.5 - 1, atol=1e-5)


def test_a_saved_model_loads_as_float32_and_answers_the_same(folder, backbone):
    assert (folder / "model.safetensors").stat().st_size < 10_000_000
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert model.dtype == torch.float32
    half = build_micro_qwen3vl(0).state_dict()["lm_head.weight"].half().float()
    assert torch.equal(model.lm_head.weight, half)
    content = [{"type": "image"}, {"type": "text", "text": "Is there a cat in this image?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=[picture()], text=[prompt], return_tensors="pt")
    answers = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for _ in range(2)]
    assert torch.equal(*answers)
    assert answers[0].shape[1] > inputs["input_ids"].shape[1]
    assert processor.tokenizer.get_vocab() == tokenizer().get_vocab()


def test_boxes_are_in_thousandths_and_find_their_object():
    sample = TurnStream(8, cells=(2, 3), mix={"box_milli": 1}, blind_share=0).sample(1)
    for question, answer in sample["turns"]:
        if LOCATE[0] not in question:
            continue
        phrase = question.removeprefix(LOCATE[0]).removesuffix(LOCATE[1])
        box = to_pixels(read_boxes(answer)[0], "milli", 96, 64)
        overlaps = {
            o.sprite.word or o.sprite.name: iou(box, o.box) for o in sample["scene"].objects
        }
        best = max(overlaps, key=lambda name: overlaps[name])
        assert overlaps[best] > 0.95
        assert phrase.startswith(best)


def test_shapes_take_turns():
    stream = TurnStream(2, shapes=SHAPES, blind_share=0)
    for number, (rows, columns) in enumerate(SHAPES):
        sample = stream.sample(number * SHAPE_RUN)
        assert sample["picture"].shape == (rows * 32, columns * 32, 3)
        assert len(sample["patch_names"]) == rows * columns * 16


def test_a_mix_takes_scenes_that_it_suits():
    stream = TurnStream(1, mix={"word": 1}, blind_share=0)
    for index in range(20):
        sample = stream.sample(index)
        assert sample["turns"] and set(sample["kinds"]) <= {"word", "region"}
        assert [*stream.sample(index)["turns"]] == sample["turns"]


@pytest.mark.parametrize(
    ("mix", "message"), [({"wrod": 1}, "wrod"), ({"word": 0}, "above 0"), ({}, "above 0")]
)
def test_an_impossible_mix_is_refused(mix, message):
    with pytest.raises(UsageError, match=message):
        TurnStream(1, mix=mix or {"exist": 0}).sample(0)


def test_no_turns_means_no_turns():
    stream = TurnStream(1, turns=0, blind_share=0)
    samples = [stream.sample(index) for index in range(40)]
    assert all(sample["turns"] == [] and sample["picture"] is not None for sample in samples)


def test_a_batch_of_several_shapes_is_named_without_its_padding(backbone):
    compressor = load("baselines", "full").from_budget(None, backbone.spec)
    model = CompressionModel(backbone, compressor)
    packer = Packer(backbone, compressor.prompt_layout)

    def naming(*shapes):
        samples = [TurnStream(3, turns=0, cells=cells, blind_share=0).sample(1) for cells in shapes]
        batch = packer(samples)["batch"]
        with torch.no_grad():
            return batch, float(model(batch)["naming"])

    model.grounding = 1.0
    batch, both = naming((2, 2), (1, 2))
    assert (batch.shown >= 0).sum(1).tolist() == [64, 32]
    alone = [naming((2, 2))[1], naming((1, 2))[1]]
    assert both == pytest.approx((64 * alone[0] + 32 * alone[1]) / 96, rel=1e-5)


def test_the_recipe_loads_and_keeps_every_kind_of_turn():
    recipe = load_recipe("micro-qwen3vl")
    assert recipe.model == "micro-qwen3vl" and recipe.from_scratch
    assert len(set(recipe.shapes)) >= 4
    for stage in recipe.stages:
        assert stage.turns == 0 or set(stage.mix) == {*MIX, "box_milli"}


def test_a_short_training_gives_a_model_that_runs(tmp_path):
    stages = (
        Stage(2, batch_size=2, turns=0, grounding=1.0, vision_learning_rate=1e-3, warmup_steps=0),
        Stage(2, batch_size=2, grounding=0.5, vision_learning_rate=1e-3, warmup_steps=0),
    )
    recipe = Recipe(
        "short", "full", "micro-qwen3vl", "micro", stages, turns=2, from_scratch=True,
        shapes=((2, 2), (1, 2)),
    )  # fmt: skip
    trained = load_backbone(str(train(recipe, tmp_path)), device="cpu")
    start = build_micro_qwen3vl(0)
    for name in ("model.visual.patch_embed.proj.weight", "model.language_model.norm.weight"):
        assert not torch.equal(trained.model.state_dict()[name], start.state_dict()[name])


def test_an_unknown_embedded_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="micro-lava"):
        build("micro-lava", 0, 0, tmp_path)


def test_the_committed_model_is_the_recipes():
    committed = load_backbone("micro-qwen3vl", device="cpu")
    assert committed.processor.tokenizer.get_vocab() == tokenizer().get_vocab()
    assert committed.processor.chat_template == build_processor().chat_template
    start = build_micro_qwen3vl(0)
    assert committed.model.config.to_dict().keys() == start.config.to_dict().keys()
    shapes = {name: value.shape for name, value in start.state_dict().items()}
    assert {name: v.shape for name, v in committed.model.state_dict().items()} == shapes
    assert "micro-qwen3vl" in micro_models()


def test_the_committed_model_looks():
    """It says whether an object is there, and cannot when it sees another picture."""
    backbone = load_backbone("micro-qwen3vl", device="cpu")
    compressor = load("baselines", "full").from_budget(None, backbone.spec)
    model = CompressionModel(backbone, compressor).eval()
    packer = Packer(backbone, compressor.prompt_layout)
    stream = TurnStream(9, policy="iid", mix={"exist": 1}, turns=8, blind_share=0)
    samples = [stream.sample(index) for index in range(16)]
    others = [{**a, "picture": b["picture"]} for a, b in pairwise([*samples, samples[0]])]
    with torch.no_grad():
        seen, wrong = (
            float(model(packer(part)["batch"])["accuracy"]) for part in (samples, others)
        )
    assert seen > 0.8
    assert seen > wrong + 0.2
