"""LLaMA-VID's Q-Former and EVA tower are those of InstructBLIP."""

from __future__ import annotations

import torch
from transformers import (
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
)

from etcbench import eva
from etcbench.eva import EvaShape, EvaTower
from etcbench.qformer import QFormer, QFormerShape

Q, DEPTH, QUERIES = 8, 3, 4


def test_the_q_former_is_that_of_instructblip() -> None:
    config = InstructBlipQFormerConfig(
        vocab_size=50, hidden_size=Q, num_hidden_layers=DEPTH, num_attention_heads=2,
        intermediate_size=4 * Q, encoder_hidden_size=12,
    )  # fmt: skip
    reference = InstructBlipQFormerModel(config).eval()
    ours = QFormer(QFormerShape(Q, DEPTH, 2, 12, 50, True, 0.1)).eval()
    state = reference.state_dict()
    state.pop("embeddings.position_ids", None)
    ours.load_state_dict(state)
    queries, words = torch.randn(2, QUERIES, Q), torch.randint(0, 50, (2, 6))
    present = torch.tensor([[1] * 6, [1] * 4 + [0] * 2]).bool()
    pictures, seen = torch.randn(2, 9, 12), torch.ones(2, 9).bool()
    seen[1, 7:] = False
    with torch.inference_mode():
        expected = reference(
            input_ids=words, query_embeds=queries, encoder_hidden_states=pictures,
            attention_mask=torch.cat([torch.ones(2, QUERIES), present], 1).long(),
            encoder_attention_mask=seen.long(),
        ).last_hidden_state[:, :QUERIES]  # fmt: skip
        found = ours(queries, words, present, pictures, seen, torch.tensor([0, 1]))
    assert torch.allclose(found, expected, atol=1e-5)


def test_eva_is_the_tower_of_instructblip() -> None:
    config = InstructBlipVisionConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=14, layer_norm_eps=1e-6,
    )  # fmt: skip
    reference = InstructBlipVisionModel(config).eval()
    ours = EvaTower(EvaShape(16, 3, 2, 20, 2)).eval()
    theirs = {f"vision_model.{key}": value for key, value in reference.state_dict().items()}
    wanted = {f"compressor.eva.{key}": value for key, value in ours.state_dict().items()}
    renamed = eva.EVA_KEYS.rename(theirs, wanted, "instructblip")
    ours.load_state_dict({k.removeprefix("compressor.eva."): v for k, v in renamed.items()})
    pixels = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        out = reference(pixels, output_hidden_states=True)
        assert torch.allclose(ours(pixels), out.hidden_states[-1], atol=1e-5)
        assert ours(torch.randn(1, 3, 56, 42)).shape == (1, 13, 16)
