"""The bottleneck of VoCo and ETC on both backbones: what Z hides, and where Z stands.

Spec abstractive 1.4, 2.2 to 2.4 and 6, tests 2, 3 and 7.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import BACKBONES, build, pack, samples
from tiny import tiny_llava, tiny_qwen3_vl
from torch import Tensor

from etcbench.backbones import Backbone
from etcbench.backbones.stream import Stream
from etcbench.errors import UsageError
from etcbench.packing import PackedBatch
from etcbench.selection import Kind
from etcbench.training import CompressionModel


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return BACKBONES[request.param](tmp_path_factory.mktemp(request.param))


def embedded(model: CompressionModel, batch: PackedBatch) -> tuple[Stream, Tensor]:
    """Input of layer 0, and the visual embeddings in it as a leaf."""
    backbone, method, _ = model._parts
    visual = model._visual(batch)
    assert visual is not None
    leaf = visual.embeds.detach().requires_grad_()
    plain = tuple(features.detach() for features in visual.deepstack)
    shown = replace(visual, embeds=leaf, deepstack=plain)
    return model._embed(batch, shown, backbone, method.learned_tokens()), leaf


@pytest.mark.parametrize("name", ["voco", "etc"])
@pytest.mark.parametrize(
    "options", [{}, {"keep_prefix": True}, {"keep_prefix": True, "prompt": "bridged"}], ids=str
)
def test_z_is_the_only_way_from_picture_to_text(
    backbone: Backbone, name: str, options: dict[str, Any]
) -> None:
    """Spec 6.2: detach Z behind every layer and no gradient reaches V.

    Neither through the prefix, nor through what stands between picture and Z.
    """
    if "prompt" in options:
        bridged = "image_first" if backbone.planes == 1 else "marker_first"
        options = {**options, "prompt": bridged}
    model = build(backbone, name, **options)
    decoder = model._parts[2]
    for cut in (False, True):
        stream, leaf = embedded(model, pack(model, samples(2, blind=False)))
        learned = stream.layout.is_kind(Kind.LEARNED)[..., None]
        text = stream.layout.is_kind(Kind.SUFFIX)
        for layer in range(decoder.layers):
            stream = decoder.run(stream, None, layer, layer + 1, select=False)
            if cut:
                kept = torch.where(learned, stream.hidden.detach(), stream.hidden)
                stream = replace(stream, hidden=kept)
        (gradient,) = torch.autograd.grad(stream.hidden[text].square().sum(), leaf)
        assert bool((gradient != 0).any()) == (not cut)


@torch.no_grad()
@pytest.mark.parametrize("name", ["voco", "etc"])
def test_z_does_not_depend_on_the_question(backbone: Backbone, name: str) -> None:
    """Spec 6.3, bit for bit."""
    model = build(backbone, name)
    states = []
    for question in ("what?", "where"):
        data = [{"picture": samples()[0]["picture"], "turns": [(question, "a")]}]
        stream, _ = embedded(model, pack(model, data))
        final = model._parts[2].run(stream, None, 0, model._parts[2].layers, select=False)
        states.append(final.hidden[final.layout.is_kind(Kind.LEARNED)])
    assert torch.equal(*states)


@torch.no_grad()
@pytest.mark.parametrize("z_t_index", ["next_pos", "image_t", "0"])
def test_time_of_the_learned_tokens(tmp_path: Path, z_t_index: str) -> None:
    """Register E10: next free position, the picture's t, or 0; h, w and the text stay put."""
    backbone = tiny_qwen3_vl(tmp_path)
    model = build(backbone, tokens=3, z_t_index=z_t_index)
    decoder = model._parts[2]
    batch = pack(model, samples(1, blind=False))
    stream, _ = embedded(model, batch)
    layout = decoder.run(stream, None, 0, 1, select=False).layout
    learned, shown = layout.is_kind(Kind.LEARNED), layout.is_kind(Kind.VISUAL)
    start = len(batch.prompts[0].chunks[0])
    free = start + 6
    wanted = {"next_pos": free, "image_t": start, "0": 0}[z_t_index]
    t, h, w = layout.positions[:, learned].tolist()
    assert t == [wanted] * 3
    assert h == w == [free, free + 1, free + 2]
    assert (layout.positions[0, shown] == start).all()
    assert int(layout.positions[:, layout.is_kind(Kind.SUFFIX)].min()) == free + 3
    kv = decoder.share(backbone.assemble(batch.prompts, [model._visual(batch)], torch.zeros(3, 32)))
    kept = kv.kv.layouts[-1]
    assert kept is not None
    assert kept.positions[0, kept.is_kind(Kind.LEARNED)].tolist() == [wanted] * 3


@torch.no_grad()
def test_learned_tokens_behind_the_marker(tmp_path: Path) -> None:
    """prompt=marker_first: the picture's end marker is part of the prefix."""
    backbone = tiny_qwen3_vl(tmp_path)
    model = build(backbone, prompt="marker_first")
    prompt = pack(model, samples(1, blind=False)).prompts[0]
    end = backbone.model.config.vision_end_token_id
    standard = backbone.prompt("what is it?", 1)
    assert prompt.bridge == (end,)
    asked = backbone.prompt("what is it?", 1, "marker_first")
    assert (*asked.bridge, *asked.after) == standard.after
    assert backbone.prompt("only words", 0, "marker_first") == backbone.prompt("only words", 0)
    with pytest.raises(UsageError, match="marker_first"):
        tiny_llava(tmp_path / "llava").prompt("a", 1, "marker_first")


def test_keep_bos_shows_the_first_token_only(tmp_path: Path) -> None:
    backbone = tiny_llava(tmp_path)
    for keep, seen in ((False, []), (True, [0])):
        model = build(backbone, "voco", prompt="standard", keep_bos=keep)
        stream, _ = embedded(model, pack(model, samples(1, blind=False)))
        mask = model._parts[2].mask(stream.layout, stream.layout)
        assert mask is not None
        kinds = stream.layout.kind[0]
        text = int((kinds == int(Kind.SUFFIX)).nonzero()[0, 0])
        shown = mask[0, 0, text].nonzero()[:, 0].tolist()
        learned = (kinds == int(Kind.LEARNED)).nonzero()[:, 0].tolist()
        assert shown == [*seen, *learned, text]


def test_vocos_prompt_has_no_line_breaks(tmp_path: Path) -> None:
    """Register V1: picture first, system sentence behind Z, text on one line."""
    backbone = tiny_llava(tmp_path)
    prompt = backbone.prompt("<image>\nWhich?\nA. one\nB. two", 1, "image_first")
    assert prompt.chunks == ((0,),)
    newline = backbone.processor.tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert list(prompt.bridge) == newline
    text = backbone.processor.tokenizer.decode(list(prompt.after))
    assert text.startswith("\nA chat between") and text.count("\n") == 1
    assert "assistant of the image. The assistant" in text
    assert text.endswith("USER: Which?A. oneB. two ASSISTANT:")
