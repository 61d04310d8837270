"""Instruction data in LLaVA's format: reading, order, packing, and the loss of a conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import picture, tiny_llava, tiny_qwen3_vl

from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.backbones.llava import SYSTEM
from etcbench.compressor import Budget
from etcbench.errors import UsageError
from etcbench.packing import Packer
from etcbench.selection import Kind
from etcbench.training import CompressionModel, Conversations
from etcbench.training.data import grouped_order


def record(number: int, *turns: tuple[str, str], image: str | None = None) -> dict[str, Any]:
    said = [
        {"from": role, "value": text}
        for turn in turns
        for role, text in zip(("human", "gpt"), turn, strict=True)
    ]
    return {"id": number, **({} if image is None else {"image": image}), "conversations": said}


TALK = record(1, ("<image>\nWhat is it?", "A cat."), ("Where?", "Left, é."), image="a/one.png")
TEXT = record(2, ("Say hello.", "Hello."))
SMALL = {"queries": 3, "width": 24, "depth": 2, "heads": 2}
LAST = record(3, ("Is it red?\n<image>", "No"), image="two.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    picture(1).save(tmp_path / "a" / "one.png")
    picture(2).convert("L").save(tmp_path / "two.png")
    (tmp_path / "data.json").write_text(json.dumps([TALK, TEXT, LAST], ensure_ascii=False))
    return tmp_path


def every(source: Conversations, passes: int = 1) -> list[dict[str, Any]]:
    return [source.sample(index) for index in range(passes * source.size)]


def test_a_pass_shows_every_sample_once_with_its_picture_in_front(folder: Path) -> None:
    source = Conversations(folder / "data.json", seed=3)
    samples = every(source, passes=2)
    for part in (samples[:3], samples[3:]):
        found = sorted((tuple(s["turns"]), s["picture"] is not None) for s in part)
        assert found == [
            ((("Is it red?", "No"),), True),
            ((("Say hello.", "Hello."),), False),
            ((("What is it?", "A cat."), ("Where?", "Left, é.")), True),
        ]
    assert all(s["picture"].mode == "RGB" for s in samples if s["picture"] is not None)
    again = every(Conversations(folder / "data.json", seed=3), passes=2)
    assert [s["turns"] for s in again] == [s["turns"] for s in samples]


def test_json_lines_and_a_folder_of_pictures_work_too(folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    lines = "\n".join(json.dumps(record) for record in (TALK, TEXT, LAST))
    (elsewhere / "data.jsonl").write_text(lines)
    source = Conversations(elsewhere / "data.jsonl", images=folder)
    assert {len(s["turns"]) for s in every(source)} == {1, 2}


def test_a_missing_picture_is_an_error_or_a_counted_gap(folder: Path) -> None:
    (folder / "two.png").unlink()
    with pytest.raises(UsageError, match=r"sample 3: picture two\.png is not in .*--images"):
        every(Conversations(folder / "data.json"))
    source = Conversations(folder / "data.json", missing="skip")
    assert (source.size, source.skipped) == (2, 1)
    assert len(every(source)) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[", "has no sample"),
        ("[{]", "is not json at byte"),
        ('[{"id": 1}]', "no list 'conversations'"),
        (json.dumps([{"id": 4, "conversations": [{"from": "me", "value": ""}]}]), "sample 4"),
        (json.dumps([record(5, ("a <image>", "b"))]), "sample 5: has <image>"),
        (json.dumps([{"id": 6, "conversations": [{"from": "human", "value": "?"}]}]), "take turns"),
        (json.dumps([{**TALK, "image": ["a.png", "b.png"]}]), "2 pictures"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UsageError, match=complaint):
        every(Conversations(tmp_path / "data.json"))


def test_a_batch_has_one_modality_and_similar_lengths() -> None:
    rng = np.random.default_rng(0)
    words, pictured = rng.integers(1, 500, 1000), rng.random(1000) < 0.7
    order = grouped_order(words, pictured, 8, np.random.default_rng(1))
    assert sorted(order) == list(range(1000))
    whole = order[: 1000 // 8 * 8].reshape(-1, 8)
    mixed = sum(len(set(pictured[batch])) > 1 for batch in whole)
    assert mixed <= 1
    spread = np.mean([np.ptp(words[batch]) for batch in whole])
    assert spread < np.mean([np.ptp(words[batch]) for batch in np.arange(1000).reshape(-1, 8)]) / 5


def modelled(backbone: Backbone, name: str) -> CompressionModel:
    torch.manual_seed(0)
    kind = registry.load("baselines", name)
    budget = Budget(1) if kind.takes_budget else None
    return CompressionModel(backbone, kind.from_budget(budget, backbone.spec)).eval()


def spoken(backbone: Backbone, sample: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """The conversation in the model's own template, and what of it is trained."""
    processor = backbone.processor
    shown = "" if sample["picture"] is None else processor.image_token
    pieces: list[tuple[str, bool]] = []
    for number, (question, answer) in enumerate(sample["turns"]):
        if backbone.model_type == "llava":
            image = f"{shown}\n" if shown and not number else ""
            head = f"{SYSTEM} " if not number else ""
            pieces += [(f"{head}USER: {image}{question} ASSISTANT:", False)]
            pieces += [(f" {answer}</s>", True)]
        else:
            image = f"<|vision_start|>{shown}<|vision_end|>" if shown and not number else ""
            start = "" if not number else "\n"
            head = f"{start}<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n"
            pieces += [(head, False), (f"{answer}<|im_end|>", True)]
    text = "".join(piece for piece, _ in pieces)
    images = None if sample["picture"] is None else [sample["picture"]]
    inputs = processor(images=images, text=[text], return_tensors="pt")
    trained = [
        flag
        for piece, flag in pieces
        for _ in processor.tokenizer(piece, add_special_tokens=False)["input_ids"]
    ]
    ids = inputs["input_ids"][0]
    # what is in front (BOS, and the repeated image token) is not trained
    mask = torch.zeros(len(ids), dtype=torch.bool)
    tail = len(trained) - trained.index(True)
    mask[len(ids) - tail :] = torch.tensor(trained[-tail:])
    return inputs, mask


@pytest.mark.parametrize("build", [tiny_llava, tiny_qwen3_vl])
def test_the_loss_is_that_of_transformers_on_the_whole_conversation(
    tmp_path: Path, folder: Path, build: Any
) -> None:
    backbone = build(tmp_path / "model")
    model = modelled(backbone, "full")
    samples = every(Conversations(folder / "data.json"))
    for sample in samples:
        if sample["picture"] is not None:
            sample["picture"] = sample["picture"].resize((24, 24))
    total, count = torch.tensor(0.0), 0
    for sample in samples:
        inputs, mask = spoken(backbone, sample)
        with torch.no_grad():
            logits = backbone.model(**inputs).logits[0]
        losses = torch.nn.functional.cross_entropy(
            logits[:-1], inputs["input_ids"][0, 1:], reduction="none"
        )
        total, count = total + losses[mask[1:]].sum(), count + int(mask.sum())
    batch = Packer(backbone, conversation=True)(samples)
    with torch.no_grad():
        found = model(**batch)["ce"]
    assert batch["batch"].answers == count
    assert torch.isclose(found, total / count, atol=1e-5)


def test_a_conversation_is_cut_at_the_maximal_length(tmp_path: Path, folder: Path) -> None:
    backbone = tiny_llava(tmp_path / "model")
    samples = every(Conversations(folder / "data.json"))
    for length in (250, 2048):
        packed = Packer(backbone, conversation=True, max_length=length)(samples)["batch"]
        text = (packed.turns >= 0).sum(1)
        before = [sum(map(len, prompt.chunks)) for prompt in packed.prompts]
        visual = [36 if prompt.chunks else 0 for prompt in packed.prompts]
        whole = [int(t) + b + v for t, b, v in zip(text, before, visual, strict=True)]
        assert max(whole) <= length
        assert max(whole) == length if length == 250 else max(whole) > 250
        assert packed.tokens == sum(whole)


@pytest.mark.parametrize(("name", "options"), [("llama-vid", SMALL), ("quecc", {"query": "each"})])
@torch.no_grad()
def test_turns_with_tokens_of_their_own_are_trained_apart(
    tmp_path: Path, folder: Path, name: str, options: dict[str, Any]
) -> None:
    """Every answer token counts the same, the end token too, and the cut holds (spec 4.2, 2.6)."""
    backbone = tiny_llava(tmp_path / "model")
    method = registry.load("baselines", name).from_budget(
        Budget(2 if name == "llama-vid" else 1), backbone.spec, **options
    )
    assert method.separate_turns
    model = CompressionModel(backbone, method)
    samples = every(Conversations(folder / "data.json"))
    packer = Packer(backbone, conversation=True, separate=True)
    together = packer(samples)["batch"]
    parts = [
        Packer(backbone, conversation=True)([{**sample, "turns": [turn]}])["batch"]
        for sample in samples
        for turn in sample["turns"]
    ]
    assert together.answers == sum(part.answers for part in parts)
    losses = [model(part)["ce"] * part.answers for part in parts]
    expected = torch.stack(losses).sum() / together.answers
    assert torch.isclose(model(together)["ce"], expected, atol=1e-5)

    talk = [sample for sample in samples if len(sample["turns"]) == 2]
    whole = packer(talk)["batch"]
    assert whole.questions == [["What is it?", "Where?"]]
    first = int((whole.turns == 0).sum()) + whole.tokens - int((whole.turns >= 0).sum())
    cut = Packer(backbone, conversation=True, separate=True, max_length=first)(talk)["batch"]
    assert cut.tokens == first and cut.questions == [["What is it?"]]
    assert torch.isfinite(model(cut)["loss"])


@pytest.mark.parametrize("build", [tiny_llava, tiny_qwen3_vl])
@torch.no_grad()
def test_captions_stand_behind_the_bare_picture(tmp_path: Path, build: Any) -> None:
    """LLaVA's plain format (spec 4.3, 5.2): loss of transformers on exactly these tokens."""
    backbone = build(tmp_path / "model")
    samples: list[dict[str, Any]] = [
        {"picture": picture(n), "turns": [("Describe it.", text)]}
        for n, text in enumerate(("a cat", "two red dogs"))
    ]
    batch = Packer(backbone, conversation=True, captions=True)(samples)["batch"]
    assert batch.questions == [["Describe it."]] * 2 and not batch.instruction.any()
    start, end = ("<s>", "") if backbone.planes == 1 else ("<|vision_start|>", "<|vision_end|>")
    losses = []
    for sample in samples:
        caption = f"{sample['turns'][0][1]}\n"
        text = f"{start}{backbone.processor.image_token}{end}{caption}"
        inputs = backbone.processor(images=[sample["picture"]], text=[text], return_tensors="pt")
        if backbone.planes == 1:  # whose tokenizer puts BOS in front itself
            inputs = {k: v[:, 1:] if v.dim() == 2 else v for k, v in inputs.items()}
        ids = inputs["input_ids"][0]
        logits = backbone.model(**inputs).logits[0]
        predicted = len(caption) - (backbone.planes == 1)  # behind a picture nothing predicts
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[-predicted - 1 : -1], ids[-predicted:], reduction="none"
            )
        )
    assert batch.answers == sum(map(len, losses))
    expected = torch.cat(losses).mean()
    assert torch.isclose(modelled(backbone, "full")(batch)["ce"], expected, atol=1e-5)
    packer = Packer(backbone, conversation=True, captions=True, placeholder=True)
    for wrong in ({"picture": None}, {"turns": [("a", "b"), ("c", "d")]}):
        with pytest.raises(UsageError, match="leave captions out"):
            packer([{**samples[0], **wrong}])


def test_the_first_question_of_a_conversation_makes_its_tokens(tmp_path: Path) -> None:
    """Register Q1."""
    backbone = tiny_llava(tmp_path / "model")
    method = registry.load("baselines", "quecc").from_budget(Budget(1), backbone.spec)
    assert (method.query, method.separate_turns) == ("first", False)
    turns = [("a", "b"), ("c", "d")]
    batch = Packer(backbone, conversation=True)([{"picture": picture(1), "turns": turns}])["batch"]
    assert batch.questions == [["a"]]


def test_later_turns_see_earlier_ones_but_no_picture(tmp_path: Path, folder: Path) -> None:
    """Under the bottleneck mask of VoCo, with its prompt in front."""
    backbone = tiny_llava(tmp_path / "model")
    model = modelled(backbone, "voco")
    packer = Packer(backbone, "image_first", conversation=True)
    first = {"picture": picture(1), "turns": [("a", "b\nc"), ("d", "e")]}
    batch = packer([first])["batch"]
    trained = batch.labels[0][batch.labels[0] >= 0].tolist()
    assert backbone.processor.tokenizer.decode(trained) == " bc</s> e</s>"  # no line break
    stream = model._embed(batch, model._visual(batch), backbone, model.method.learned_tokens())
    mask = model.decoder.mask(stream.layout, stream.layout)
    assert mask is not None
    kind = stream.layout.kind[0]
    suffix = kind == int(Kind.SUFFIX)
    assert not mask[0, 0][suffix][:, kind == int(Kind.VISUAL)].any()
    behind = mask[0, 0][suffix][:, suffix]
    assert torch.equal(behind, torch.ones_like(behind).tril())
    positions = stream.layout.positions[0, 0][stream.layout.valid[0]]
    assert torch.equal(positions.diff(), torch.ones_like(positions[1:]))


def test_line_breaks_stay_where_there_is_no_picture(tmp_path: Path) -> None:
    """VoCo's normalisation is of prompts with a picture, in training as at evaluation."""
    backbone = tiny_llava(tmp_path / "model")
    text = [{"picture": None, "turns": [("a\nb", "c\nd"), ("e\nf", "g\nh")]}]
    for conversation in (False, True):
        plain, voco = (
            Packer(backbone, layout, conversation=conversation)(text)["batch"]
            for layout in ("standard", "image_first")
        )
        assert voco.text == plain.text
        assert torch.equal(voco.labels, plain.labels)


def test_a_placeholder_picture_counts_in_no_loss(tmp_path: Path) -> None:
    backbone = tiny_llava(tmp_path / "model")
    text = [{"picture": None, "turns": [("why?", "so")]}]
    alone = Packer(backbone, conversation=True)(text)["batch"]
    joined = Packer(backbone, conversation=True, placeholder=True)(text)["batch"]
    assert joined.pixels is not None and joined.pictures == 0
    assert (joined.samples, joined.answers) == (alone.samples, alone.answers)
    model = modelled(backbone, "full")
    with torch.no_grad():
        assert torch.isclose(model(joined)["ce"], model(alone)["ce"], atol=1e-6)


def test_pictures_may_be_pil_images_or_arrays(tmp_path: Path) -> None:
    backbone = tiny_llava(tmp_path / "model")
    packer = Packer(backbone)
    image = picture(3)
    pair = [{"picture": p, "turns": [("a", "b")]} for p in (image, np.asarray(image))]
    assert isinstance(pair[0]["picture"], Image.Image)
    pixels = packer(pair)["batch"].pixels
    assert pixels is not None
    values = pixels.tensors["pixel_values"]
    assert torch.equal(values[0], values[1])
