"""Names and configuration of LLaMA-VID's released checkpoints (spec abstractive 4.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etcbench.eva import EVA_KEYS
from etcbench.released import LLAVA_LANGUAGE, PROJECTOR, TOWER, KeyMap

BERT = "model.vlm_att_encoder.bert."
LAYER, OURS = f"{BERT}encoder.layer.*.", "compressor.qformer.encoder.layer.*."


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the method that a release's ``config.json`` determines."""
    compress = str(config.get("compress_type") or "null")
    small = any("224" in str(config.get(key, "")) for key in ("image_processor", "_name_or_path"))
    return {
        "tower": "eva-g",
        "text": "bert",
        "compress": "mean" if "mean" in compress else compress,
        "queries": int(config.get("num_query") or config.get("num_qformer") or 32),
        "image": 224 if small else 336,
    }


KEYS = KeyMap(
    {
        **LLAVA_LANGUAGE,
        f"{BERT}embeddings.LayerNorm.*": "compressor.qformer.embeddings.layernorm.*",
        f"{BERT}embeddings.*": "compressor.qformer.embeddings.*",
        f"{LAYER}attention.self.*": f"{OURS}attention.attention.*",
        f"{LAYER}crossattention.self.*": f"{OURS}crossattention.attention.*",
        f"{LAYER}*": f"{OURS}*",
        "model.vlm_att_query": "compressor.query_tokens",
        "model.vlm_att_ln.*": "compressor.ln_vision.*",
        "model.vlm_att_projector.*": "compressor.W_q.*",
        "model.vlm_att_key_projector.*": "compressor.W_k.*",
        "model.vlm_att_val_projector.*": "compressor.W_v.*",
        "model.mm_projector.*": "compressor.content_mlp.*",
    },
    unused=(TOWER, PROJECTOR),
    options=options_of,
    companion=("eva_vit_g", "compressor.eva.", EVA_KEYS),
)
