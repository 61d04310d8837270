import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
)

from etcbench import micro
from etcbench.errors import UsageError
from etcbench.micro import warmup
from etcbench.micro.artwork import sprites
from etcbench.micro.model import (
    build_micro_llava,
    build_processor,
    normalise,
    save_micro_llava,
    vision_config,
)
from etcbench.micro.scenes import BACKGROUNDS, scene_at
from etcbench.micro.stream import TurnStream
from etcbench.micro.tokenizer import PHRASES, SYSTEM, build_tokenizer


@cache
def tokenizer():
    return build_processor().tokenizer


def ids(text):
    return tokenizer().encode(text, add_special_tokens=False)


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_survives(text):
    assert tokenizer().decode(ids(text)) == text


@given(st.lists(st.sampled_from([*PHRASES, " cat", "cats", "\n", "<image>", " 0.12", "Yes", " "])))
@settings(max_examples=200, deadline=None)
def test_any_mixture_of_phrases_survives(pieces):
    text = "".join(pieces)
    assert tokenizer().decode(ids(text)) == text


def test_training_text_survives_and_is_short():
    stream = TurnStream(12)
    for index in range(100):
        for question, answer in stream.sample(index)["turns"]:
            assert tokenizer().decode(ids(question)) == question
            assert tokenizer().decode(ids(f" {answer}")).strip() == answer
            assert len(ids(question)) < 0.55 * len(question)


def test_every_answer_word_is_one_token():
    words = {s.name for s in sprites()} | {s.category for s in sprites()} | set(BACKGROUNDS)
    words |= {s.word for s in sprites() if s.word} | {"Yes", "No", "top", "left", *"ABCDE0123456"}
    for word in words:
        assert len(ids(f" {word}")) == 1, word


def test_a_plural_shares_the_token_of_its_singular():
    assert ids(" cats")[0] == ids(" cat")[0]
    assert ids(" foxes")[0] == ids(" fox")[0]


def test_vocabulary_and_special_tokens():
    assert len(tokenizer()) <= 1000
    assert tokenizer().unk_token is None
    assert tokenizer()("a")["input_ids"][0] == tokenizer().bos_token_id
    assert tokenizer().decode(tokenizer()("a")["input_ids"], skip_special_tokens=True) == "a"
    of_the_image = SYSTEM.replace("assistant. The", "assistant of the image. The")
    assert len(ids(SYSTEM)) == 2
    assert len(ids(of_the_image)) == 5


def test_the_committed_tokenizer_is_the_built_one():
    folder = Path(micro.__file__).parent / "models" / "micro-llava"
    committed = AutoTokenizer.from_pretrained(folder)
    assert committed.get_vocab() == build_tokenizer().get_vocab()


def test_the_chat_template_is_llavas_prompt():
    processor = build_processor()
    text = {"type": "text", "text": "Q"}
    asked = [{"role": "user", "content": [{"type": "image"}, text]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    assert prompt == f"{SYSTEM} USER: <image>\nQ ASSISTANT:"
    told = [*asked, {"role": "assistant", "content": "A"}]
    assert processor.apply_chat_template(told) == f"{SYSTEM} USER: <image>\nQ ASSISTANT: A</s>"
    own = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert processor.apply_chat_template(own) == "S USER: Q"


def test_the_processor_gives_64_image_tokens_and_the_normalised_picture():
    picture = scene_at(1, 0)[0].render()
    prompt = f"{SYSTEM} USER: <image>\nHow many cats are in the picture? ASSISTANT:"
    out = build_processor()(images=[picture], text=[prompt], return_tensors="pt")
    image_id = tokenizer().convert_tokens_to_ids("<image>")
    assert (out["input_ids"] == image_id).sum() == 64
    assert out["input_ids"].shape[1] - 64 < 20
    assert torch.allclose(out["pixel_values"][0], normalise(picture), atol=1e-5)


def test_the_model_is_small_and_depends_on_its_seed_alone():
    before = torch.random.get_rng_state()
    model = build_micro_llava(3)
    assert torch.equal(before, torch.random.get_rng_state())
    text = model.model.language_model
    assert size(model) < 10_000_000
    assert size(text) - size(text.embed_tokens) <= 1_900_000
    assert model.lm_head.weight is text.embed_tokens.weight
    other = build_micro_llava(3)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_model_and_processor_round_trip(tmp_path):
    model = build_micro_llava(0).eval()
    save_micro_llava(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 2.2 * size(model)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlavaForConditionalGeneration"
    assert loaded.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    picture = scene_at(1, 1)[0].render()
    prompt = f"{SYSTEM} USER: <image>\nQ ASSISTANT:"
    ours = build_processor()(images=[picture], text=[prompt], return_tensors="pt")
    theirs = processor(images=[picture], text=[prompt], return_tensors="pt")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    answer = loaded.generate(**theirs, max_new_tokens=3, do_sample=False)
    assert answer.shape[0] == 1 and answer.shape[1] > ours["input_ids"].shape[1]
    assert processor.tokenizer.get_vocab() == tokenizer().get_vocab()


def test_the_warm_up_resumes_and_its_tower_fits_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(warmup, "HELD_OUT_SCENES", 4)
    first = warmup.train(tmp_path, steps=2, batch_size=4)
    weights = first.read_bytes()
    assert '"step": 2' in (tmp_path / "log.jsonl").read_text()
    assert warmup.train(tmp_path, steps=2, batch_size=4).read_bytes() == weights
    warm, cold = build_micro_llava(0, first), build_micro_llava(0)
    layers = [m.model.vision_tower.encoder.layers for m in (warm, cold)]
    query = [[layer.self_attn.q_proj.weight for layer in stack] for stack in layers]
    assert not torch.equal(query[0][4], query[1][4])
    assert torch.equal(query[0][5], query[1][5])
    # what LLaVA reads at layer -2 is what the warm-up trained
    config = vision_config()
    config.num_hidden_layers -= 1
    tower = CLIPVisionModel(config).eval()
    tower.load_state_dict(load_file(first))
    pixels = normalise(scene_at(1, 2)[0].render())[None]
    with torch.no_grad():
        trained = tower(pixels, output_hidden_states=True).hidden_states[-1]
        seen = warm.eval().model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(trained, seen, atol=1e-5)


def test_weights_of_another_tower_are_refused(tmp_path):
    with pytest.raises(UsageError, match="warmup"):
        build_micro_llava(0, tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="not a warmed-up"):
        build_micro_llava(0, tmp_path / "other.safetensors")


def test_the_package_imports_nothing_heavy():
    code = "import sys, etcbench.micro; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert not {"torch", "transformers", "numpy", "PIL"} & set(loaded.split())


def test_the_normalised_picture_has_the_processors_layout():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[0, 1, 2] = 255
    pixels = normalise(picture)
    assert pixels.shape == (3, 64, 64)
    assert pixels[2, 0, 1] > 1 > 0 > pixels[2, 1, 0]
