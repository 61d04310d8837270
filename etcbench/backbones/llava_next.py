"""LLaVA-NeXT (`LlavaNextForConditionalGeneration`): LLaVA on a picture and on tiles of it.

A picture is resized to a whole and to a grid of tiles that fits its shape; CLIP sees each of them
alone. The decoder gets the whole, then the tiles' patches as one raster without the padding, a
newline embedding behind each of its rows. A method inside the tower selects from every tile alone
(`VisionStates` holds tiles); behind the projector it sees the picture's one sequence.

Where a method has selected in the tower, newlines are left out, as in VisionZip (spec selective
4.4): the whole comes first in its own order, then the tiles' patches in raster order over all
tiles, their CLS tokens, and what the method has put behind its patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from etcbench.backbones.llava import LlavaBackbone
from etcbench.backbones.stream import Pixels, Visual
from etcbench.compressor import Compressor, ModelSpec
from etcbench.costs import Tower
from etcbench.errors import UsageError
from etcbench.selection import Selection
from etcbench.states import VisionStates


@dataclass
class TiledStates(VisionStates):
    """States of all tiles, picture after picture.

    Attributes
    ----------
    counts : list of int
        Tiles of each picture, the whole included.
    sizes : Tensor, long, shape (pictures, 2)
        Height and width of each picture in pixels.
    pictures : list of str
        Identity of each picture; `keys` are those of the tiles.
    """

    counts: list[int] = field(default_factory=list)
    sizes: Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    pictures: list[str] = field(default_factory=list)

    @property
    def shown(self) -> list[str]:
        """Identity of each whole picture, which is not that of its tiles."""
        return self.pictures


@dataclass
class LlavaNextBackbone(LlavaBackbone):
    """LLaVA-NeXT with a CLIP tower."""

    model_type: ClassVar[str] = "llava_next"

    @classmethod
    def spec_of(cls, config: Any, name: str) -> ModelSpec:
        """Read the shape from a `LlavaNextConfig`; the picture decides over the visual tokens."""
        side = config.vision_config.image_size
        most = max(height * width for height, width in config.image_grid_pinpoints)
        tiles = 1 + most // side**2
        return replace(super().spec_of(config, name), visual_tokens=None, grid=None, tiles=tiles)

    @classmethod
    def tower_of(cls, config: Any, grid: tuple[int, int]) -> Tower:
        """Refuse: the number of tokens does not say how many tiles the tower saw."""
        raise UsageError("the cost of a LLaVA-NeXT picture is not counted: its tiles decide it")

    @classmethod
    def raster_of(cls, config: Any, width: int, height: int) -> tuple[int, int]:
        """Count the tokens of a picture; they are one row, for they form no single raster."""
        side = config.vision_config.image_size // config.vision_config.patch_size
        rows, columns = _tile_grid(config, (height, width))
        joint = torch.empty(1, rows * side, columns * side)
        _, rows, columns = unpad_image(joint, (height, width)).shape
        return 1, side * side + rows * (columns + 1)

    @classmethod
    def default_options(cls) -> dict[str, tuple[str, ...]]:
        """`template`: Vicuna v1 or the processor's own."""
        return {"template": super().default_options()["template"]}

    # Pictures ---------------------------------------------------------------------------------

    def preprocess(self, pictures: Sequence[Image.Image], keys: list[str]) -> Pixels:
        """Resize each picture to the whole and to its tiles, and normalise."""
        batch = self.processor.image_processor(images=list(pictures), return_tensors="pt")
        tensors = {name: batch[name] for name in ("pixel_values", "image_sizes")}
        config = self.model.config
        rasters = [self.raster_of(config, w, h) for h, w in tensors["image_sizes"].tolist()]
        return Pixels(tensors, torch.tensor(rasters), keys)

    def view(self, picture: Image.Image) -> Image.Image:
        """Show the whole picture."""
        return picture

    def encode(self, pixels: Pixels, grid: Tensor | None = None) -> TiledStates:
        """Run CLIP on every tile."""
        if grid is not None:
            raise UsageError(
                f"{self.spec.name} cuts pictures into tiles; no method may reduce them"
            )
        config, sizes = self.model.config, pixels.tensors["image_sizes"]
        side = config.vision_config.image_size
        counts = [
            image_size_to_num_patches(size, config.image_grid_pinpoints, side)
            for size in sizes.tolist()
        ]
        padded = pixels.tensors["pixel_values"]
        values = torch.cat([tiles[:count] for tiles, count in zip(padded, counts, strict=True)])
        patches = side // config.vision_config.patch_size
        rasters = torch.full((len(values), 2), patches)
        owners = [key for key, count in zip(pixels.keys, counts, strict=True) for _ in range(count)]
        states = super().encode(Pixels({"pixel_values": values}, rasters, owners))
        return TiledStates(**vars(states), counts=counts, sizes=sizes, pictures=pixels.keys)

    def resampled(self, vision: VisionStates, compressor: Compressor, asked: list[str]) -> Visual:
        """Refuse: a picture is several rasters here."""
        raise UsageError(
            f"{compressor.name()} resamples one raster of patches, and {self.spec.name} cuts "
            "pictures into tiles; use it with llava or qwen3_vl models"
        )

    def project(self, vision: VisionStates, selection: Selection | None) -> Visual:
        """Project the tiles' tokens and put those of a picture into one sequence."""
        assert isinstance(vision, TiledStates)
        if selection is None:
            features = vision.features[:, 1:]
            tiles = self._projected(features).split(vision.counts)
            packed, _ = self.model.model.pack_image_features(
                tiles, vision.sizes, "default", image_newline=self.model.model.image_newline
            )
            places = [torch.arange(len(tokens), device=self.device) for tokens in packed]
        else:
            packed, places = self._selected(vision, selection)
        rasters = [
            self.raster_of(self.model.config, width, height)
            for height, width in vision.sizes.tolist()
        ]
        return Visual(
            pad_sequence(list(packed), batch_first=True).to(self.dtype),
            pad_sequence(list(places), batch_first=True, padding_value=-1),
            torch.tensor(rasters, device=self.device),
        )

    def _selected(
        self, vision: TiledStates, selection: Selection
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Order what a method has selected of each tile (spec selective 4.4).

        A token's place is its tile's number times the tokens of a tile, plus its place there.
        """
        tokens = vision.features.shape[1]
        side = int(vision.grid[0, 1])
        embeds = self._projected(selection.apply(vision.features))
        index, behind = selection.index, _behind(selection)
        packed, places = [], []
        begin = 0
        for count, size in zip(vision.counts, vision.sizes.tolist(), strict=True):
            own = index[begin : begin + count]
            tile = torch.arange(count, device=own.device)[:, None].expand_as(own)
            columns = _tile_grid(self.model.config, size)[1]
            patch = (own - 1).clamp_min(0)
            row = (tile - 1).clamp_min(0) // columns * side + patch // side
            column = (tile - 1).clamp_min(0) % columns * side + patch % side
            slot = torch.arange(own.shape[1], device=own.device).expand_as(own)
            # What stands first: patches by raster, CLS tokens by tile, the rest by tile and slot.
            last = behind[begin : begin + count]
            block = torch.where(last, 2, (own == 0).long())
            raster = row * columns * side + column
            within = torch.where(block == 0, raster, tile * own.shape[1] + slot)
            order = torch.where(tile == 0, slot, (block + 1) * count * tokens**2 + within)
            kept = (own >= 0).flatten()
            chosen = order.flatten().masked_fill(~kept, torch.iinfo(torch.long).max).argsort()
            chosen = chosen[: int(kept.sum())]
            place = tile * tokens + torch.where(own == 0, tokens - 1, own - 1)
            packed.append(embeds[begin : begin + count].flatten(0, 1)[chosen])
            places.append(place.flatten()[chosen])
            begin += count
        return packed, places


def _behind(selection: Selection) -> Tensor:
    """Mark slots from the first that leaves the raster order or that others are merged into."""
    index = selection.index
    leaves = index < index.cummax(1).values
    if selection.extra is not None:
        leaves[selection.extra[0], selection.extra[1]] = True
    return leaves.long().cummax(1).values.bool()


def _tile_grid(config: Any, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of tiles for a picture of (height, width) pixels."""
    rows, columns = get_anyres_image_grid_shape(
        tuple(size), config.image_grid_pinpoints, config.vision_config.image_size
    )
    return rows, columns


BACKBONE = LlavaNextBackbone
