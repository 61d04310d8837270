"""Qwen3-VL: positions, DeepStack, pictures of different sizes, the tower's attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image
from tiny import llava_config, picture, tiny_qwen3_vl
from torch import Tensor

from etcbench import registry
from etcbench.backbones import Pixels, Prompt
from etcbench.backbones.llava import LlavaBackbone
from etcbench.backbones.qwen3_vl import Qwen3VLBackbone, _TowerAttention
from etcbench.backbones.stream import Stream, Visual
from etcbench.compressor import Budget, Compressor, LayerState
from etcbench.decoder import Decoder
from etcbench.errors import UsageError
from etcbench.selection import Kind, Selection

SIZES = [(24, 24), (30, 20), (16, 28)]  # 36, 40 and 28 tokens
QUESTIONS = ["what is it?", "a", "is there a cat or a dog?"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Qwen3VLBackbone:
    return tiny_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@dataclass(eq=False)
class Keeping(Compressor):
    """Keep every other visual token, in front of the decoder or behind one of its layers."""

    behind: int | None = None

    def select_embeds(self, embeds: Tensor, grid: Tensor, keys: list[str]) -> Selection | None:
        if self.behind is not None:
            return None
        place = torch.arange(embeds.shape[1])
        return Selection.from_mask((place % 2 == 0) & (place < grid.prod(-1, keepdim=True)))

    def select_hidden(self, state: LayerState) -> Selection | None:
        if state.layer != self.behind:
            return None
        odd = state.layout.is_kind(Kind.VISUAL) & (state.layout.place % 2 == 1)
        return Selection.from_mask(state.layout.valid & ~odd)


@dataclass(eq=False)
class Adding(Compressor):
    """Learned tokens and nothing else: no mask, no eviction."""

    tokens: Tensor = field(default_factory=lambda: torch.zeros(0))

    def learned_tokens(self) -> Tensor:
        return self.tokens


def pixels_of(backbone: Qwen3VLBackbone, sizes: Sequence[tuple[int, int]] = SIZES) -> Pixels:
    pictures = [picture(seed, size) for seed, size in enumerate(sizes)]
    return backbone.preprocess(pictures, [str(seed) for seed in range(len(sizes))])


def prefix_of(backbone: Qwen3VLBackbone, method: Compressor) -> tuple[Stream, list[Prompt]]:
    """Three questions on three pictures of different size, as one batch."""
    prompts = [backbone.prompt(question, 1) for question in QUESTIONS]
    visual = backbone.visual(pixels_of(backbone), method)
    return backbone.assemble(prompts, [visual], method.learned_tokens()), prompts


def stock_inputs(
    backbone: Qwen3VLBackbone, prompt: Prompt, pixels: Sequence[Pixels], extra: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """What the untouched model takes; ``extra`` are tokens behind the last image placeholder."""
    image_token = backbone.model.config.image_token_id
    ids: list[int] = []
    for chunk, shown in zip(prompt.chunks, pixels, strict=True):
        ids += [*chunk, *[image_token] * int(shown.grid.prod())]
    tokens = torch.tensor([[*ids, *extra, *prompt.after]])
    tensors = {
        name: torch.cat([shown.tensors[name] for shown in pixels])
        for name in ("pixel_values", "image_grid_thw")
    }
    kinds = (tokens == image_token).int()
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": kinds,
        **tensors,
    }


def stock_positions(backbone: Qwen3VLBackbone, inputs: dict[str, Tensor]) -> Tensor:
    found, _ = backbone.model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    return found[:, 0]


def one(backbone: Qwen3VLBackbone, row: int) -> Pixels:
    return backbone.preprocess([picture(row, SIZES[row])], [str(row)])


def full(backbone: Qwen3VLBackbone) -> Compressor:
    method: Compressor = registry.load("baselines", "full").from_budget(None, backbone.spec)
    return method


def close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, atol=1e-4, rtol=1e-4)


def test_full_logits_of_pictures_of_different_sizes_in_one_batch(
    backbone: Qwen3VLBackbone,
) -> None:
    prefix, prompts = prefix_of(backbone, full(backbone))
    decoder = Decoder(backbone, full(backbone))
    text = backbone.continue_text([prompt.after for prompt in prompts], prefix.next_position)
    whole = decoder.run(Stream.cat([prefix, text]), None, 0, decoder.layers)
    logits = backbone.logits(whole.hidden)
    for row, prompt in enumerate(prompts):
        inputs = stock_inputs(backbone, prompt, [one(backbone, row)])
        expected = backbone.model(**inputs).logits[0]
        valid = whole.layout.valid[row]
        assert close(logits[row, valid], expected)
        mine = whole.layout.positions[:, row, valid]
        assert torch.equal(mine, stock_positions(backbone, inputs))


def test_positions_of_two_pictures_are_the_models_own(backbone: Qwen3VLBackbone) -> None:
    prompt = backbone.prompt("which is larger?", 2)
    shown = [one(backbone, 1), one(backbone, 2)]
    visual = [backbone.visual(pixels, full(backbone)) for pixels in shown]
    prefix = backbone.assemble([prompt], visual, None)
    expected = stock_positions(backbone, stock_inputs(backbone, prompt, shown))
    assert torch.equal(prefix.layout.positions[:, 0], expected[:, : prefix.layout.tokens])
    assert int(prefix.next_position[0]) == int(expected[0, prefix.layout.tokens])


def test_one_learned_token_is_an_ordinary_text_token(backbone: Qwen3VLBackbone) -> None:
    """Positions, and no DeepStack: a word's embedding as learned token gives the model's logits."""
    word = 42
    method = Adding(tokens=backbone.embed_tokens(torch.tensor([word])))
    prefix, prompts = prefix_of(backbone, method)
    _, logits = Decoder(backbone, method).whole(prefix, [prompt.after for prompt in prompts])
    for row, prompt in enumerate(prompts):
        inputs = stock_inputs(backbone, prompt, [one(backbone, row)], (word,))
        mine = prefix.layout.positions[:, row, prefix.layout.valid[row]]
        expected = stock_positions(backbone, inputs)
        assert torch.equal(mine, expected[:, : mine.shape[1]])
        assert int(prefix.next_position[row]) == int(expected[0, mine.shape[1]])
        assert close(logits[row], backbone.model(**inputs).logits[0, -1])


def test_several_learned_tokens_count_on_along_height_and_width(backbone: Qwen3VLBackbone) -> None:
    prefix, prompts = prefix_of(backbone, Adding(tokens=torch.zeros(3, backbone.spec.hidden)))
    learned = prefix.layout.is_kind(Kind.LEARNED)
    for row, (columns, rows) in enumerate([(6, 6), (8, 5), (4, 7)]):
        start = len(prompts[row].chunks[0]) + max(columns, rows)
        t, h, w = prefix.layout.positions[:, row, learned[row]].tolist()
        assert t == [start] * 3
        assert h == w == [start, start + 1, start + 2]
        assert int(prefix.next_position[row]) == start + 3


def test_deepstack_reaches_visual_tokens_only(backbone: Qwen3VLBackbone) -> None:
    prefix, _ = prefix_of(backbone, Adding(tokens=torch.ones(2, backbone.spec.hidden)))
    visual = prefix.layout.is_kind(Kind.VISUAL)
    assert len(prefix.deepstack) == 3
    for number in range(3):
        added = prefix.after_layer(torch.zeros_like(prefix.hidden)).hidden
        assert (added[visual].abs().sum(-1) > 0).all()
        assert (added[~visual] == 0).all()
        prefix = prefix.after_layer(prefix.hidden)
        assert len(prefix.deepstack) == 2 - number
    assert prefix.after_layer(prefix.hidden).hidden is prefix.hidden


def test_selection_before_the_decoder(backbone: Qwen3VLBackbone) -> None:
    """The model itself, given the kept tokens with their own positions and DeepStack features."""
    method = Keeping()
    prefix, prompts = prefix_of(backbone, method)
    _, logits = Decoder(backbone, method).whole(prefix, [prompt.after for prompt in prompts])
    core = backbone.model.model
    for row, prompt in enumerate(prompts):
        pixels = one(backbone, row)
        inputs = stock_inputs(backbone, prompt, [pixels])
        shown = inputs["mm_token_type_ids"][0] == 1
        features = core.get_image_features(pixels.tensors["pixel_values"], inputs["image_grid_thw"])
        embeds = backbone.embed_tokens(inputs["input_ids"])[0]
        embeds[shown] = features.pooler_output[0]
        kept = ~shown
        kept[shown.nonzero()[::2, 0]] = True
        states = core.language_model(
            inputs_embeds=embeds[None, kept],
            attention_mask=torch.ones(1, int(kept.sum()), dtype=torch.long),
            position_ids=stock_positions(backbone, inputs)[:, None, kept],
            visual_pos_masks=shown[None, kept],
            deepstack_visual_embeds=[layer[0][::2] for layer in features.deepstack_features],
        )
        expected = backbone.model.lm_head(states.last_hidden_state[0, -1])
        assert close(logits[row], expected)


@pytest.mark.parametrize("behind", [0, 1, 2])
def test_selection_between_layers_takes_the_remaining_deepstack_along(
    backbone: Qwen3VLBackbone, behind: int
) -> None:
    method = Keeping(behind=behind)
    prefix, prompts = prefix_of(backbone, method)
    _, logits = Decoder(backbone, method).whole(prefix, [prompt.after for prompt in prompts])
    model = backbone.model.model.language_model
    for row, prompt in enumerate(prompts):
        pixels = one(backbone, row)
        inputs = stock_inputs(backbone, prompt, [pixels])
        shown = inputs["mm_token_type_ids"][0] == 1
        features = backbone.model.model.get_image_features(
            pixels.tensors["pixel_values"], inputs["image_grid_thw"]
        )
        hidden = backbone.embed_tokens(inputs["input_ids"])
        hidden[0, shown] = features.pooler_output[0]
        positions = stock_positions(backbone, inputs)[:, None]
        added = torch.zeros(3, *hidden.shape)
        for number, layer in enumerate(features.deepstack_features):
            added[number, 0, shown] = layer[0]
        for number, block in enumerate(model.layers):
            hidden = block(hidden, position_embeddings=model.rotary_emb(hidden, positions))
            if number < 3:
                hidden = hidden + added[number]
            if number == behind:
                kept = ~shown
                kept[shown.nonzero()[::2, 0]] = True
                hidden, positions, added = hidden[:, kept], positions[..., kept], added[:, :, kept]
        assert close(logits[row], backbone.model.lm_head(model.norm(hidden[0, -1])))


def test_rows_without_a_picture_are_plain_text(backbone: Qwen3VLBackbone) -> None:
    """Training pads a batch with rows that have no picture."""
    visual = backbone.visual(one(backbone, 0), full(backbone))
    padded = Visual(
        torch.cat([visual.embeds, torch.zeros_like(visual.embeds)]),
        torch.cat([visual.place, torch.full_like(visual.place, -1)]),
        torch.cat([visual.grid, torch.zeros_like(visual.grid)]),
        tuple(torch.cat([layer, torch.zeros_like(layer)]) for layer in visual.deepstack),
    )
    prompts = [backbone.prompt("a", 1), backbone.prompt("only words", 0)]
    prefix = backbone.assemble(prompts, [padded], torch.zeros(1, backbone.spec.hidden))
    assert not prefix.layout.valid[1].any()
    assert prefix.next_position.tolist() == [len(prompts[0].chunks[0]) + 6 + 1, 0]


@pytest.mark.parametrize("name", ["random", "visionzip", "pool", "downsample"])
def test_a_budget_counts_per_picture_and_smaller_pictures_keep_everything(
    backbone: Qwen3VLBackbone, name: str
) -> None:
    method = registry.load("baselines", name).from_budget(Budget(30), backbone.spec)
    visual = backbone.visual(pixels_of(backbone), method)
    counts = (visual.place >= 0).sum(-1).tolist()
    assert counts == [30, 30, 28]
    alone = backbone.visual(one(backbone, 2), full(backbone))
    assert close(visual.embeds[2, :28], alone.embeds[0])
    for mine, whole in zip(visual.deepstack, alone.deepstack, strict=True):
        assert close(mine[2, :28], whole[0])


@pytest.mark.parametrize("name", ["pool", "downsample"])
def test_a_budget_that_is_no_raster_of_a_picture_is_not_exceeded(
    backbone: Qwen3VLBackbone, name: str
) -> None:
    method = registry.load("baselines", name).from_budget(Budget(7), backbone.spec)
    visual = backbone.visual(pixels_of(backbone, [*SIZES, (80, 4)]), method)
    counts = (visual.place >= 0).sum(-1).tolist()
    assert counts == [6, 6, 6, 7]


def test_visionzip_merges_deepstack_features_with_the_same_weights(
    backbone: Qwen3VLBackbone,
) -> None:
    method = registry.load("baselines", "visionzip").from_budget(Budget(32), backbone.spec)
    assert method.split(64) == (27, 5)
    vision = backbone.encode(pixels_of(backbone))
    selection = method.select_vision(vision)
    visual = backbone.project(vision, selection)
    weights = selection.matrix(vision.features.shape[1])
    for mine, features in zip(visual.deepstack, vision.deepstack, strict=True):
        assert close(mine, weights @ features)
    slots, tokens = weights.sum(-1), weights.sum(1)
    for row, count in enumerate(vision.grid.prod(-1).tolist()):
        assert (tokens[row, :count] > 0).all()  # nothing is lost
        doubled = int((slots[row] > 1.5).sum())  # target plus mean of its sources
        assert (0 < doubled <= 5) if count > 32 else doubled == 0
    assert (visual.place[:2].diff(dim=-1) > 0).all()  # contextual tokens stand at their own place


def test_attention_of_the_tower(backbone: Qwen3VLBackbone) -> None:
    """Recomputed weights give the block's own output; tokens sum and average their patches."""
    tower = backbone.model.model.visual
    pixels = pixels_of(backbone)
    seen: dict[str, object] = {}
    handle = tower.blocks[-1].attn.register_forward_hook(
        lambda module, args, named, out: seen.update(named, normed=args[0], out=out),
        with_kwargs=True,
    )
    vision = backbone.encode(pixels)
    handle.remove()

    class Block:
        attn = tower.blocks[-1].attn
        norm1 = torch.nn.Identity()

    normed = seen["normed"]
    assert isinstance(normed, Tensor)
    patches = [4 * count for count in pixels.grid.prod(-1).tolist()]
    single = _TowerAttention(Block(), normed, seen["position_embeddings"], patches, 1)
    weights = single.rows(torch.arange(max(patches)))
    values = Block.attn.qkv(normed).chunk(3, -1)[2].unflatten(-1, (2, -1)).split(patches)
    mixed = [
        torch.einsum("hqk,khd->qhd", weights[number, :, :count, :count], values[number])
        for number, count in enumerate(patches)
    ]
    assert close(Block.attn.proj(torch.cat(mixed).flatten(1)), seen["out"])

    rows = torch.tensor([0, 30, 39])
    tokens = vision.attention_rows(rows)
    units = weights[:, :, : 4 * 40, : 4 * 40].unflatten(-1, (40, 4)).sum(-1)
    expected = units.unflatten(2, (40, 4)).mean(3)[:, :, rows]
    assert close(tokens, expected)
    assert close(tokens.sum(-1)[:, 0], torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0]]))

    cos, sin = seen["position_embeddings"]
    keys = Block.attn.qkv(normed).chunk(3, -1)[1].unflatten(-1, (2, -1))
    low, high = keys.chunk(2, -1)
    keys = keys * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
    for number, part in enumerate(keys.split(patches)):
        found = vision.attention_keys()[number, : len(part) // 4]
        assert close(found, part.unflatten(0, (-1, 4)).mean((1, 2)))


def test_a_picture_is_resized_as_a_picture(backbone: Qwen3VLBackbone) -> None:
    """Reducing patches comes close to preprocessing the smaller picture."""
    across = torch.linspace(0, 255, 48).expand(32, 48)
    down = torch.linspace(255, 0, 32)[:, None].expand(32, 48)
    smooth = torch.stack([across, down, (across + down) / 2], -1).to(torch.uint8)
    large = Image.fromarray(smooth.numpy())
    pixels = backbone.preprocess([large, picture(1, (16, 28))], ["a", "b"])
    grid = torch.tensor([[4, 6], [7, 4]])
    patches, shapes = pixels.tensors["pixel_values"], pixels.tensors["image_grid_thw"]
    small = backbone.preprocess([large.resize((24, 16))], ["a"]).tensors["pixel_values"]
    reduced = backbone._reduced(patches, shapes, grid)
    assert (reduced[: len(small)] - small).abs().max() < 0.05
    assert close(reduced[len(small) :], patches[-len(reduced) + len(small) :])
    vision = backbone.encode(pixels, grid)
    assert vision.grid.tolist() == grid.tolist()


@pytest.mark.parametrize("name", ["etc", "voco"])
def test_the_bottleneck_uses_the_models_template_with_the_prefix_visible(
    backbone: Qwen3VLBackbone, name: str
) -> None:
    kind = registry.load("baselines", name)
    method = kind.from_budget(Budget(1), backbone.spec)
    assert method.prompt_layout == "standard"
    assert method.keep_prefix
    prompt = backbone.prompt("a", 1)
    assert prompt.chunks[0][-1] == backbone.model.config.vision_start_token_id
    assert prompt.bridge == ()
    assert prompt.after[0] == backbone.model.config.vision_end_token_id
    prefix = backbone.assemble(
        [prompt], [backbone.visual(one(backbone, 0), method)], method.learned_tokens()
    )
    kv = Decoder(backbone, method).share(prefix).kv
    for layout in kv.layouts:
        assert layout is not None
        kinds = layout.kind[0].tolist()
        assert kinds == [int(Kind.PREFIX)] * len(prompt.chunks[0]) + [int(Kind.LEARNED)]
    with pytest.raises(UsageError, match="image_first"):
        kind.from_budget(Budget(1), backbone.spec, prompt="image_first")
    with pytest.raises(UsageError, match="image_first"):
        backbone.prompt("a", 1, "image_first")
    llava = kind.from_budget(Budget(1), LlavaBackbone.spec_of(llava_config(), "tiny"))
    assert llava.prompt_layout == "image_first"
    assert not llava.keep_prefix
