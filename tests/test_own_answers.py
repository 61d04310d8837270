"""Conversations of a model's own answers, and what drafts trained on them leave as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_invariants import Row, ask
from tiny import picture, tiny_llava

from etcbench.backbones import load_backbone
from etcbench.compressor import Compressor
from etcbench.decoder import Decoder
from etcbench.errors import UsageError
from etcbench.recipes import load_recipe
from etcbench.recipes.own_answers import micro_pictures, own_answers, pictures_of, write
from etcbench.training import CompressionModel, Conversations, choose_trainable

PROMPTS = ("Describe the picture in detail.", "How many objects are there?")


def test_answers_are_greedy_ones_and_can_be_trained_on(tmp_path: Path) -> None:
    model = load_backbone("micro-llava", device="cpu")
    method = Compressor()
    scenes = micro_pictures(tmp_path / "pictures", 3, seed=5)
    found = list(own_answers(model, method, scenes, PROMPTS, batch_size=4))
    file, count = write(tmp_path, found)
    assert count == 6
    source = Conversations(file)
    samples = [source.sample(number) for number in range(source.size)]
    by_question = {(s["picture"].tobytes(), s["turns"][0][0]): s["turns"][0][1] for s in samples}
    decoder = Decoder(model, method)
    for scene in scenes:
        opened = Image.open(scene).convert("RGB")
        for text in PROMPTS:
            prompt = model.prompt(text, 1)
            visual = model.visual(model.preprocess([opened], ["x"]), method)
            kv, logits = decoder.whole(model.assemble([prompt], [visual], None), [prompt.after])
            said = model.detokenize(decoder.greedy(kv, logits, 129)[0])
            assert by_question[opened.tobytes(), text] == said
    # Short answers, and those that would be cut, are left out.
    longer = list(own_answers(model, method, scenes, PROMPTS, shortest=12, batch_size=4))
    assert [row for row in found if row[1] == PROMPTS[0]] == longer
    assert not list(own_answers(model, method, scenes, PROMPTS, shortest=2, longest=4))


def test_pictures_of_a_folder_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    picture(1).save(tmp_path / "photos" / "a" / "one.png")
    picture(2).save(tmp_path / "photos" / "two.jpg")
    found = pictures_of(tmp_path / "photos", 5)
    file, _ = write(tmp_path / "out", [(path, "What?", "That.") for path in found])
    assert [r["image"] for r in json.loads(file.read_text())] == [
        "../photos/a/one.png", "../photos/two.jpg",
    ]  # fmt: skip
    assert all(Conversations(file).sample(n)["picture"] is not None for n in range(2))
    with pytest.raises(UsageError, match="no pictures"):
        pictures_of(tmp_path / "out", 5)
    (tmp_path / "photos" / "two.jpg").write_bytes(b"no picture")
    model = tiny_llava(tmp_path / "model")
    with pytest.raises(UsageError, match=r"two\.jpg"):
        list(own_answers(model, Compressor(), [tmp_path / "photos" / "two.jpg"], ("What?",)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["twigvlm", "twigvlm-pp"])
def test_training_drafts_does_not_change_selections(tmp_path: Path, name: str) -> None:
    """What the last stage trains may become anything: the same tokens are kept."""
    backbone = tiny_llava(tmp_path)
    method: Any = Row(name, 20, {"depth": 2}).build(backbone)
    model = CompressionModel(backbone, method)
    stage = load_recipe(f"micro-{name}-long").stages[-1]
    choose_trainable(model, stage, tokens_too=False)
    before, _ = ask(backbone, method)
    drafts = method.branch.logits(torch.ones(1, 1, backbone.spec.hidden))
    torch.manual_seed(0)
    for name_, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert name_.startswith("compressor.twig.")
            parameter.normal_()
    after, _ = ask(backbone, method)
    kept = [[layout.place.tolist() for layout in kv.layouts] for kv in (before, after)]
    assert kept[0] == kept[1]
    assert not torch.allclose(drafts, method.branch.logits(torch.ones(1, 1, backbone.spec.hidden)))
