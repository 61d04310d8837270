"""Weights that others released: how the names in their files become ours.

A method says in ``released`` which names its original checkpoints use (`KeyMap`). Loading is strict
both ways: a name without a rule, and a weight that no name gives, are errors that name it.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from etcbench.errors import UsageError

# Original LLaVA format to transformers' `LlavaForConditionalGeneration` (spec abstractive 0.5).
LLAVA_LANGUAGE: Mapping[str, str | None] = {
    "*.rotary_emb.inv_freq": None,
    "*.embeddings.position_ids": None,
    "model.embed_tokens.weight": "model.model.language_model.embed_tokens.weight",
    "model.layers.*": "model.model.language_model.layers.*",
    "model.norm.weight": "model.model.language_model.norm.weight",
    "lm_head.weight": "model.lm_head.weight",
}
LLAVA_TOWER: Mapping[str, str | None] = {
    "model.vision_tower.vision_tower.vision_model.*": "model.model.vision_tower.*",
}
LLAVA_PROJECTOR: Mapping[str, str | None] = {
    "model.mm_projector.0.*": "model.model.multi_modal_projector.linear_1.*",
    "model.mm_projector.2.*": "model.model.multi_modal_projector.linear_2.*",
}
TOWER, PROJECTOR = "model.model.vision_tower.", "model.model.multi_modal_projector."
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


def _no_options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _as_it_is(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(state)


@dataclass(frozen=True)
class KeyMap:
    """Names of a released format, and what they are called here.

    Attributes
    ----------
    rules : mapping of str to str or None
        Released name to ``compressor.<parameter of the method>`` or ``model.<parameter of the
        transformers model>``; ``*`` stands for any text and is copied; None drops the weight. The
        first rule that fits counts.
    optional : tuple of str
        Beginnings of our names that a file may leave out altogether (a tower that was frozen).
    unused : tuple of str
        Beginnings of our names that the method does not use, which no file has.
    before : callable
        Splits or joins released weights first.
    options : callable
        Options of the method that the release's ``config.json`` determines.
    companion : tuple or None
        A file that comes from elsewhere and is put beside the release's: its name without ending,
        the beginning of our names for what it holds, and its own names.
    """

    rules: Mapping[str, str | None]
    optional: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    before: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = field(default=_as_it_is)
    options: Callable[[Mapping[str, Any]], dict[str, Any]] = field(default=_no_options)
    companion: tuple[str, str, KeyMap] | None = None

    def load(self, folder: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read a release's folder and give its weights our names.

        Parameters
        ----------
        folder : Path
            Weight files, as released.
        wanted : mapping of str to Tensor
            See `rename`.

        Raises
        ------
        UsageError
            As `rename`; if there are no weights, or a companion is not there.
        """
        if self.companion is None:
            return self.rename(_read(weight_files(folder)), wanted, str(folder))
        name, prefix, keys = self.companion
        files = weight_files(folder, name)
        beside = [folder / f"{name}{end}" for end in (".safetensors", ".pth", ".bin")]
        if not (found := [file for file in beside if file.is_file()]):
            raise UsageError(
                f"{folder} lacks {name}: put {beside[0].name} or {beside[1].name} there"
            )
        theirs = {key: value for key, value in wanted.items() if key.startswith(prefix)}
        rest = {key: value for key, value in wanted.items() if key not in theirs}
        return {
            **self.rename(_read(files), rest, str(folder)),
            **keys.rename(_read(found[:1]), theirs, str(found[0])),
        }

    def rename(
        self, released: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str
    ) -> dict[str, Tensor]:
        """Give released weights our names.

        Parameters
        ----------
        released : mapping of str to Tensor
            As in the file.
        wanted : mapping of str to Tensor
            Every weight there is, ``compressor.*`` and ``model.*``, with its present value.
        source : str
            Where the weights come from, for errors.

        Returns
        -------
        dict of str to Tensor
            Released values under our names. Token embeddings with fewer rows than ours (released
            models know no image or padding token) keep our rows behind theirs.

        Raises
        ------
        UsageError
            If a name has no rule or no place, a weight is missing, or a shape differs.
        """
        found: dict[str, Tensor] = {}
        for key, value in self.before(released).items():
            ours = self._ours(key, source)
            if ours is None:
                continue
            if ours not in wanted:
                raise UsageError(f"{source}: {key} would be {ours}, which the model does not have")
            found[ours] = _fitted(key, value, ours, wanted[ours], source)
        for name in wanted:
            if name not in found and not self._may_miss(name, found):
                raise UsageError(f"{source} lacks {self._theirs(name)} (here {name})")
        return found

    def _ours(self, key: str, source: str) -> str | None:
        for pattern, target in self.rules.items():
            if parts := _fits(pattern, key):
                return None if target is None else _filled(target, parts)
        raise UsageError(f"{source}: {key} is not part of this format")

    def _theirs(self, name: str) -> str:
        """Name in the release of a weight of ours, for errors."""
        for pattern, target in self.rules.items():
            if target is not None and (parts := _fits(target, name)):
                return _filled(pattern, parts)
        return name

    def _may_miss(self, name: str, found: Mapping[str, Tensor]) -> bool:
        if name.startswith(self.unused):
            return True
        return any(
            name.startswith(part) and not any(key.startswith(part) for key in found)
            for part in self.optional
        )


LLAVA = KeyMap({**LLAVA_LANGUAGE, **LLAVA_TOWER, **LLAVA_PROJECTOR}, optional=(TOWER,))


@cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("(.+)".join(re.escape(part) for part in text.split("*")))


def _fits(pattern: str, key: str) -> tuple[str, ...] | None:
    """Find what the stars of a pattern stand for, behind the whole key; None where it differs."""
    match = _pattern(pattern).fullmatch(key)
    return None if match is None else (key, *match.groups())


def _filled(target: str, parts: tuple[str, ...]) -> str:
    pieces = target.split("*")
    return "".join(
        piece + star for piece, star in zip(pieces, [*parts[1 : len(pieces)], ""], strict=True)
    )


def _fitted(key: str, value: Tensor, ours: str, present: Tensor, source: str) -> Tensor:
    """Check a shape; fill up the rows of a shorter vocabulary with the model's own."""
    if value.shape == present.shape:
        return value
    more = len(present) - len(value)
    if ours.endswith(VOCABULARY) and value.shape[1:] == present.shape[1:] and more > 0:
        return torch.cat([value, present[len(value) :].to(value)])
    raise UsageError(
        f"{source}: {key} has shape {list(value.shape)} instead of {list(present.shape)}"
    )


def _read(files: Sequence[Path]) -> dict[str, Tensor]:
    """Read weight files; what is no safetensors with ``weights_only``, so nothing is executed."""
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                part: Any = load_file(file)
            else:
                part = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"{file} does not load as plain weights: {reason}") from error
        if not isinstance(part, Mapping) or not all(isinstance(v, Tensor) for v in part.values()):
            raise UsageError(f"{file} holds something else than named tensors")
        state.update(part)
    return state


def weight_files(folder: Path, companion: str = "") -> Sequence[Path]:
    """List the weight files of a folder, of the safest kind there is, without a companion."""
    others = ("training_args", companion)
    for kind in ("*.safetensors", "*.bin", "*.pth"):
        if files := sorted(path for path in folder.glob(kind) if path.stem not in others):
            return files
    raise UsageError(f"{folder} has no weights: neither *.safetensors nor *.bin")


def read_config(folder: Path) -> dict[str, Any]:
    """Read a release's ``config.json``; a folder without one has an empty one."""
    file = folder / "config.json"
    try:
        return dict(json.loads(file.read_text())) if file.exists() else {}
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise UsageError(f"{file} does not parse: {error}") from error
