"""Acceptance tests of trained methods that run a whole method (spec abstractive 6: 1, 2 and 12).

The others are in test_bottleneck (2, 3, 7), test_etc and test_etc_training (4 to 6), test_training
(6), test_qwen3_vl (7) and test_resamplers (8 to 11).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed import BACKBONES, samples
from tiny import picture

from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.backbones.stream import Stream
from etcbench.compressor import Budget, Compressor
from etcbench.decoder import Decoder
from etcbench.kv import Shared
from etcbench.packing import Packer
from etcbench.selection import Kind
from etcbench.training import CompressionModel

# name, budget, options
BOTTLENECKS: list[tuple[str, int, dict[str, Any]]] = [
    ("voco", 2, {}),
    ("voco", 3, {"keep_prefix": False, "keep_bos": True}),
    ("etc", 1, {}),
    ("etc", 3, {"keep_prefix": True, "prompt": "standard"}),
]
# On backbones with three position axes, and a marker behind the picture.
OF_QWEN: list[tuple[str, int, dict[str, Any]]] = [
    ("etc", 2, {"z_t_index": "0"}),
    ("voco", 2, {"z_t_index": "image_t", "prompt": "marker_first"}),
]
TRAINED: list[tuple[str, int, dict[str, Any]]] = [
    ("voco", 2, {}),
    ("etc", 1, {"canonical_grid": 5}),
    ("quecc", 4, {}),
    ("llama-vid", 2, {"queries": 3, "width": 24, "depth": 2, "heads": 2}),
    ("mqt-llava", 5, {}),
]


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return BACKBONES[request.param](tmp_path_factory.mktemp(request.param))


def build(backbone: Backbone, name: str, tokens: int | None, options: Any = None) -> Compressor:
    torch.manual_seed(1)
    budget = None if tokens is None else Budget(tokens)
    kind = registry.load("baselines", name)
    made: Compressor = kind.from_budget(budget, backbone.spec, **(options or {}))
    return made


def prefix_of(
    backbone: Backbone, method: Compressor, seed: int = 0
) -> tuple[Stream, tuple[int, ...]]:
    """Everything up to Z, and the tokens of a question."""
    prompt = backbone.prompt("what is it?", 1, method.prompt_layout)
    visual = backbone.visual(backbone.preprocess([picture(seed)], [str(seed)]), method)
    return backbone.assemble([prompt], [visual], method.learned_tokens()), prompt.after


@torch.inference_mode()
@pytest.mark.parametrize("case", [*BOTTLENECKS, *OF_QWEN], ids=str)
def test_the_masked_pass_is_prefill_evict_prefill_and_decoding(
    backbone: Backbone, case: tuple[str, int, dict[str, Any]]
) -> None:
    """Acceptance 1, and positions behind the evicted picture while decoding (spec 1.4)."""
    if case in OF_QWEN and backbone.planes == 1:
        pytest.skip("no time axis")
    method = build(backbone, *case)
    decoder = Decoder(backbone, method)
    prefix, question = prefix_of(backbone, method)
    kv, logits = decoder.question(decoder.share(prefix), [question])
    written: list[int] = []
    for _ in range(4):
        _, masked = decoder.whole(prefix, [[*question, *written]])
        assert torch.allclose(logits, masked, atol=1e-5, rtol=1e-5)
        token = logits.argmax(-1)
        written.append(int(token))
        logits = decoder.step(kv, token)
    # Where the library would count from what is left in the cache, the answer is another one.
    shared = decoder.share(prefix)
    shared.kv.next_position = shared.kv.next_position - 36
    _, moved = decoder.question(shared, [question])
    _, masked = decoder.whole(prefix, [question])
    assert not torch.allclose(moved, masked, atol=1e-3, rtol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("case", BOTTLENECKS, ids=str)
def test_an_evicted_picture_has_no_effect(
    backbone: Backbone, case: tuple[str, int, dict[str, Any]]
) -> None:
    """Acceptance 2: behind another picture, the states of Z alone give the first one's answer."""
    method = build(backbone, *case)
    decoder = Decoder(backbone, method)
    shared: list[Shared] = []
    for seed in (0, 1):
        prefix, question = prefix_of(backbone, method, seed)
        shared.append(decoder.share(prefix))
    one, other = shared
    expected = decoder.question(one.rows(torch.tensor([0])), [question])[1]
    assert not torch.allclose(
        decoder.question(other.rows(torch.tensor([0])), [question])[1], expected, atol=1e-3
    )
    pairs = zip(one.kv.entries, other.kv.entries, other.kv.layouts, strict=True)
    for source, target, layout in pairs:
        assert layout is not None
        learned = layout.is_kind(Kind.LEARNED)[0]
        assert int(learned.sum()) == case[1]
        target.keys[:, :, learned] = source.keys[:, :, learned]
        target.values[:, :, learned] = source.values[:, :, learned]
    assert torch.allclose(decoder.question(other, [question])[1], expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case[0])
def test_text_only_samples_train_as_the_model_alone(
    backbone: Backbone, case: tuple[str, int, dict[str, Any]]
) -> None:
    """Acceptance 12 in training: alone, and beside a sample with a picture."""
    method = build(backbone, *case)
    model = CompressionModel(backbone, method)
    plain = CompressionModel(backbone, build(backbone, "full", None))
    shown = samples(1, blind=False)
    text = [{"picture": None, "turns": [("only words", "g"), ("and more?", "hhh")]}]
    for conversation in (False, True):
        packer = Packer(backbone, method.prompt_layout, conversation=conversation)
        expected = plain(**Packer(backbone, conversation=conversation)(text))["ce"]
        alone = model(**packer(text))
        assert "auxiliary" not in alone
        assert torch.allclose(alone["ce"], expected, atol=1e-5)
        batches = [packer(part)["batch"] for part in (shown, text, [*shown, *text])]
        losses = [model(batch)["ce"] for batch in batches]
        weight = batches[1].answers / batches[2].answers
        mixed = (1 - weight) * losses[0] + weight * losses[1]
        assert torch.allclose(losses[2], mixed, atol=1e-5)


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case[0])
def test_every_weight_of_a_method_learns(
    backbone: Backbone, case: tuple[str, int, dict[str, Any]]
) -> None:
    """A training step on conversations, on both backbones: the method's weights and the model's."""
    method = build(backbone, *case)
    model = CompressionModel(backbone, method)
    packer = Packer(
        backbone, method.prompt_layout, conversation=True, separate=method.separate_turns
    )
    result = model(**packer(samples()))
    assert bool(torch.isfinite(result["loss"]))
    result["loss"].backward()
    # What the question's words become behind the last attention reaches no query.
    idle = ("qformer.encoder.layer.1.intermediate.", "qformer.encoder.layer.1.output.")
    learns = {
        name: value.grad is not None and bool(value.grad.abs().sum() > 0)
        for name, value in model.compressor.named_parameters()
    }
    assert learns == {name: not name.startswith(idle) for name in learns}
    layers = [p for n, p in backbone.model.named_parameters() if "language_model.layers" in n]
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in layers)
    model.zero_grad()
