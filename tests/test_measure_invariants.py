"""Invariant 8: FLOPs and KV bytes in closed form are those of what runs, for every method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_invariants import BACKBONES, METHODS, Row, prefix_of
from torch.utils.flop_counter import FlopCounterMode

from etcbench.backbones import Backbone
from etcbench.compressor import Compressor
from etcbench.decoder import Decoder
from etcbench.efficiency.closed_form import FLOPS_PER_MAC, close
from etcbench.efficiency.requests import request_of
from etcbench.efficiency.shapes import Shape
from etcbench.errors import UsageError

GRID = (6, 6)


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return BACKBONES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def eager(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """The same weights under the reference implementation of attention."""
    family = backbone.spec.family
    return BACKBONES[family](tmp_path_factory.mktemp(family), attention="eager")


@pytest.fixture(params=METHODS, ids=str)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


class Counted:
    """FLOPs and caches of each pass, as torch counts and holds them."""

    def __init__(self, backbone: Backbone, method: Compressor) -> None:
        decoder = Decoder(backbone, method)
        with FlopCounterMode(display=False) as vision:
            prefix, self.prompt = prefix_of(backbone, method)
        after = [self.prompt.after]
        with FlopCounterMode(display=False) as whole:
            self.kv, _ = decoder.whole(prefix, after)
        with FlopCounterMode(display=False) as share:
            shared = decoder.share(prefix)
        with FlopCounterMode(display=False) as question:
            fanned, _ = decoder.question(shared, after)
        self.bytes = self.kv.bytes(), fanned.bytes()
        with FlopCounterMode(display=False) as step:
            decoder.step(self.kv, torch.tensor([5]))
        self.flops = tuple(
            counter.get_total_flops() for counter in (vision, whole, share, question, step)
        )
        self.vision, self.whole, self.share, self.question, self.step = self.flops


@torch.inference_mode()
def test_closed_form_is_what_runs(backbone: Backbone, row: Row) -> None:
    """Exactly: tower, projector, the method's own work, prefill, head; both ways to prefill."""
    method = row.build(backbone)
    counted, shape = Counted(backbone, method), Shape.of_backbone(backbone)
    words = len(backbone.processor.tokenizer("what is it?")["input_ids"])
    request = request_of(counted.prompt, GRID, counted.kv, words)
    if row.options.get("scores") == "relevance":
        with pytest.raises(UsageError, match="not counted"):
            close(shape, method, request)
        return
    form = close(shape, method, request)
    macs = form.macs
    assert counted.vision + counted.whole == FLOPS_PER_MAC * macs.total
    shares_vision = method.reuse == "vision"
    asked = macs.again - (macs.method + macs.projector if shares_vision else 0)
    assert counted.question == FLOPS_PER_MAC * asked
    ahead = macs.tower + macs.projector + macs.shared
    if method.reuse == "layers":
        if method.branch is not None:
            ran = len(method.branch.layers) - (method.speculation is None)
            ahead += ran * form.case.decoder_layer(form.case.prefix(0))
    else:
        ahead += macs.method
    assert counted.vision + counted.share == FLOPS_PER_MAC * ahead
    assert counted.step == FLOPS_PER_MAC * (macs.decode + macs.head)
    for found in counted.bytes:
        assert found == form.kv_bytes("float32")
    if row.options.get("version") != "1.0":  # there the rank of the attention decides
        assert close(shape, method, replace(request, entered=None)) == form


@torch.inference_mode()
@pytest.mark.parametrize("name", ["full", "fastv", "visionzip", "etc", "twigvlm"])
def test_the_attention_backend_changes_no_count(
    backbone: Backbone, eager: Backbone, name: str
) -> None:
    """Products of attention count whole, whatever a kernel skips."""
    row = next(row for row in METHODS if row.name == name)
    ours, reference = (Counted(model, row.build(model)) for model in (backbone, eager))
    assert ours.flops == reference.flops
    assert ours.bytes == reference.bytes
