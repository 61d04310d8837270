"""LLaVA-NeXT: tiles, what the untouched model makes of them, and methods on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_invariants import Row, close, run, samples
from tiny import picture, tiny_llava_next

from etcbench import registry
from etcbench.backbones.llava_next import LlavaNextBackbone, TiledStates
from etcbench.compressor import Budget, Compressor
from etcbench.decoder import Decoder
from etcbench.errors import BudgetError, UsageError
from etcbench.selection import Kind, Selection

SIZES = [(24, 24), (30, 20), (16, 28), (40, 12), (9, 50)]
ROWS = [
    Row("full", None),
    Row("random", 9),
    Row("fastv", 30),
    Row("fastv", 30, {"layer": 1, "query": "all"}),
    Row("visionzip", 15),
    Row("visionzip", 10, {"contextual": 0}),
    Row("pdrop", 20),
    Row("sparsevlm", 20),
    Row("lightkv", 20),
    Row("twigvlm", 20),
    Row("explainc", 9),
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> LlavaNextBackbone:
    return tiny_llava_next(tmp_path_factory.mktemp("next"))


def build(backbone: LlavaNextBackbone, name: str, tokens: int | None, **options: Any) -> Compressor:
    return Row(name, tokens, options).build(backbone)


@torch.inference_mode()
@pytest.mark.parametrize("size", SIZES)
def test_full_is_the_untouched_model(backbone: LlavaNextBackbone, size: tuple[int, int]) -> None:
    """Invariant 1, in a batch with a picture of another shape."""
    shown = [picture(0, size), picture(1, (24, 24))]
    text = "what is it?"
    prompt = backbone.prompt(text, 1)
    method = build(backbone, "full", None)
    visual = backbone.visual(backbone.preprocess(shown, ["a", "b"]), method)
    prefix = backbone.assemble([prompt, prompt], [visual], None)
    decoder = Decoder(backbone, method)
    kv, logits = decoder.whole(prefix, [prompt.after] * 2)
    mine = decoder.greedy(kv, logits, 6)
    written = backbone.processor.tokenizer.decode(
        [*prompt.chunks[0], backbone.model.config.image_token_id, *prompt.after]
    )
    for row, image in enumerate(shown):
        inputs = backbone.processor(
            images=image, text=written, return_tensors="pt", add_special_tokens=False
        )
        assert close(logits[row], backbone.model(**inputs).logits[0, -1])
        made = backbone.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
        answer = made[inputs["input_ids"].shape[1] :].tolist()
        assert mine[row] == [token for token in answer if token not in backbone.eos_ids]
        count = int((inputs["input_ids"] == backbone.model.config.image_token_id).sum())
        assert visual.grid[row].tolist() == [1, count]
        assert int((visual.place[row] >= 0).sum()) == count


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_answers_do_not_depend_on_how_they_are_computed(
    backbone: LlavaNextBackbone, row: Row
) -> None:
    """Invariant 3, on pictures of different shape."""
    method, docs = row.build(backbone), samples()[:7]
    expected = run(backbone, method, docs, batch_size=1, reuse=False)
    for size, reuse in ((3, True), (8, False)):
        assert run(backbone, method, docs[::-1], batch_size=size, reuse=reuse) == expected


@torch.inference_mode()
@pytest.mark.parametrize("row", [row for row in ROWS if row.name != "visionzip"], ids=str)
def test_keeping_everything_changes_nothing(backbone: LlavaNextBackbone, row: Row) -> None:
    """Invariant 2."""
    prompt = backbone.prompt("what is it?", 1)
    found = []
    for method in (build(backbone, "full", None), row.build(backbone, 51)):
        visual = backbone.visual(backbone.preprocess([picture(0)], ["x"]), method)
        prefix = backbone.assemble([prompt], [visual], None)
        found.append(Decoder(backbone, method).whole(prefix, [prompt.after])[1])
    assert close(found[0], found[1])


@torch.inference_mode()
def test_fastv_ranks_the_whole_picture_and_all_its_tiles(backbone: LlavaNextBackbone) -> None:
    """Spec 1.10: over the union of the visual tokens; layers behind K hold what it says."""
    method = build(backbone, "fastv", 30)
    prompt = backbone.prompt("what is it?", 1)
    visual = backbone.visual(backbone.preprocess([picture(0)], ["x"]), method)
    kv, _ = Decoder(backbone, method).whole(
        backbone.assemble([prompt], [visual], None), [prompt.after]
    )
    entered = [int(count[0]) for count in kv.entered if count is not None]
    assert entered == method.schedule(51, 4) == [51, 51, 9, 9]


@torch.inference_mode()
def test_visionzip_compresses_each_tile_and_orders_them_together(
    backbone: LlavaNextBackbone,
) -> None:
    """Spec 4.4: base tile, patches over the joint raster, CLS tokens, contextual tokens."""
    method: Any = build(backbone, "visionzip", 20, contextual=1)
    vision = backbone.encode(backbone.preprocess([picture(0)], ["x"]))
    assert isinstance(vision, TiledStates) and vision.counts == [5]
    selection = method.select_vision(vision)
    visual = backbone.project(vision, selection)
    places = visual.place[0].tolist()
    assert len(places) == 20 and method.split(9) == (3, 1)
    own = [tile * 10 + (index - 1 if index else 9) for tile, index in _pairs(selection)]
    assert places[:4] == own[:4]
    tiles = [place // 10 for place in places]
    patches = places[4:12]
    raster = [_joint(place) for place in patches]
    assert raster == sorted(raster) and all(place % 10 < 9 for place in patches)
    assert places[12:16] == [10 * tile + 9 for tile in (1, 2, 3, 4)]
    assert tiles[16:] == [1, 2, 3, 4]
    assert sorted(places) == sorted(own)
    features = selection.apply(vision.features)
    expected = backbone.model.model.multi_modal_projector(features).flatten(0, 1)
    assert close(visual.embeds[0], expected[[own.index(place) for place in places]])


def _pairs(selection: Selection) -> list[tuple[int, int]]:
    """(tile, tower token) of every slot."""
    rows = selection.index.tolist()
    return [(tile, index) for tile, row in enumerate(rows) for index in row]


def _joint(place: int) -> tuple[int, int]:
    """Row and column of a patch in the raster of two by two tiles of three by three patches."""
    tile, patch = place // 10 - 1, place % 10
    return tile // 2 * 3 + patch // 3, tile % 2 * 3 + patch % 3


def test_published_budgets_are_shares_of_five_tiles(backbone: LlavaNextBackbone) -> None:
    """Spec 4.3 and 4.4: 128, 64 and 32 per tile."""
    kind = registry.load("baselines", "visionzip")
    for tokens, split in ((640, (108, 20)), (320, (54, 10)), (160, (27, 5))):
        method = kind.from_budget(Budget(tokens), backbone.spec)
        assert method.split(576) == split
    with pytest.raises(BudgetError, match="tiles"):
        kind.from_budget(Budget(4), backbone.spec)


@torch.inference_mode()
def test_what_needs_one_raster_is_refused(backbone: LlavaNextBackbone) -> None:
    pixels = backbone.preprocess([picture(0)], ["x"])
    for name in ("mqt-llava", "downsample", "pool"):
        with pytest.raises(UsageError, match="tiles"):
            backbone.visual(pixels, build(backbone, name, 4))
    with pytest.raises(UsageError, match="tiles"):
        backbone.encode(pixels, torch.tensor([[1, 9]]))


def test_visual_tokens_stand_where_the_model_has_them(backbone: LlavaNextBackbone) -> None:
    prompt = backbone.prompt("why?", 1)
    visual = backbone.visual(
        backbone.preprocess([picture(0, (30, 20))], ["x"]), build(backbone, "full", None)
    )
    layout = backbone.assemble([prompt], [visual], None).layout
    assert torch.equal(layout.positions[0, 0], torch.arange(layout.tokens))
    assert int(layout.is_kind(Kind.VISUAL).sum()) == 37
