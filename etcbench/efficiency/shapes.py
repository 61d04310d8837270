"""The sizes of a model from its config alone, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etcbench.backbones.base import Backbone
from etcbench.backbones.loading import MICRO_MODELS, families, micro_models
from etcbench.compressor import ModelSpec
from etcbench.costs import Tower
from etcbench.errors import UsageError, unknown_name

_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
_QWEN_TOWER = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "deepstack_visual_indexes": [5, 11, 17],
}


def _llava(layers: int, hidden: int, heads: int, mlp: int) -> dict[str, Any]:
    text = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": mlp,
        "vocab_size": 32064,
    }
    vision = {"model_type": "clip_vision_model", **_CLIP_LARGE}
    return {"model_type": "llava", "text_config": text, "vision_config": vision}


def _qwen(layers: int, hidden: int, heads: int, mlp: int) -> dict[str, Any]:
    text = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": mlp,
        "vocab_size": 151936,
    }
    vision = {**_QWEN_TOWER, "out_hidden_size": hidden}
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": {**text, "tie_word_embeddings": True},
        "vision_config": vision,
    }


# Models whose sizes are known without their files (specs selective 1.2, abstractive 0.2).
KNOWN: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": _llava(32, 4096, 32, 11008),
    "llava-hf/llava-1.5-13b-hf": _llava(40, 5120, 40, 13824),
    "Qwen/Qwen3-VL-2B-Instruct": _qwen(28, 2048, 16, 6144),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen(36, 2560, 32, 9728),
}


@dataclass(frozen=True)
class Shape:
    """A model as far as a closed form needs it.

    Attributes
    ----------
    spec : ModelSpec
        Decoder and tower sizes.
    vocabulary : int
        Rows of the language-model head.
    family : type of Backbone
        Prices the vision side.
    config : transformers config
        What it reads.
    """

    spec: ModelSpec
    vocabulary: int
    family: type[Backbone]
    config: Any

    @classmethod
    def of(cls, config: Any, name: str) -> Shape:
        """Read a transformers config.

        Raises
        ------
        UsageError
            If no backbone handles its ``model_type``.
        """
        known = families()
        if config.model_type not in known:
            raise UsageError(
                f"model {name!r} is of type {config.model_type!r}; supported: "
                f"{', '.join(sorted(known))} (docs/add-a-backbone.md says how to add one)"
            )
        family = known[config.model_type]
        return cls(family.spec_of(config, name), config.text_config.vocab_size, family, config)

    @classmethod
    def of_backbone(cls, backbone: Backbone) -> Shape:
        """Read the config of a loaded model."""
        config = backbone.model.config
        return cls(backbone.spec, config.text_config.vocab_size, type(backbone), config)

    @classmethod
    def named(cls, model: str) -> Shape:
        """Find a model's sizes by the name that ``--model`` takes; reads no weights.

        An embedded model, a directory with a config, a model of `KNOWN`, or a hub id whose
        config the hub or its cache has.

        Raises
        ------
        UsageError
            If there is none.
        """
        import transformers

        if model in KNOWN:
            name = model.rpartition("/")[2]
            return cls.of(transformers.AutoConfig.for_model(**KNOWN[model]), name)
        path = MICRO_MODELS / model if model in micro_models() else Path(model)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise UsageError(f"model directory {model} has no config.json")
            config = transformers.AutoConfig.from_pretrained(path)
            return cls.of(config, path.resolve().name)
        if "/" not in model:
            raise unknown_name("model", model, [*micro_models(), *KNOWN])
        try:
            config = transformers.AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"model {model!r}: its config is neither here nor to be had from the hub; "
                f"known without it: {', '.join(KNOWN)}"
            ) from error
        return cls.of(config, model.rpartition("/")[2])

    def tower(self, grid: tuple[int, int]) -> Tower:
        """Price the vision side for a picture of ``grid`` visual tokens."""
        return self.family.tower_of(self.config, grid)

    def raster(self, width: int, height: int) -> tuple[int, int]:
        """Raster of the visual tokens of a picture of so many pixels."""
        return self.family.raster_of(self.config, width, height)


def has_weights(model: str) -> bool:
    """Whether a model can be loaded without the hub: embedded, a directory, or in its cache."""
    from huggingface_hub import try_to_load_from_cache

    if model in micro_models():
        return True
    if Path(model).is_dir():
        return any(Path(model).glob("*.safetensors"))
    files = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(model, file), str) for file in files)
