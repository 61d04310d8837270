"""FLOPs and KV entries of one question on one picture, from sizes alone.

The formulae follow what the engine runs, pass by pass; docs/efficiency.md writes them out. Spec
selective 1.3, 1.4; abstractive 0.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from etcbench.compressor import Compressor, ModelSpec
from etcbench.costs import Case, layer_macs
from etcbench.efficiency.shapes import Shape
from etcbench.selection import Kind, Layout

FLOPS_PER_MAC = 2
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Request:
    """What is asked: one question on one picture.

    Attributes
    ----------
    grid : tuple of int
        Raster (rows, columns) of the uncompressed picture's visual tokens.
    before, bridge, after : int
        Text tokens in front of the picture, between picture and learned tokens, behind them.
    entered : tuple of int or None
        Visual tokens at each layer's input as a run has found them; None: the method's own table.
    question : int or None
        Tokens of the bare question; None: the text behind the picture.
    marked : int or None
        Positions that the method's `mark` has marked in a run; None: half of the text behind.
    """

    grid: tuple[int, int]
    before: int
    bridge: int
    after: int
    entered: tuple[int, ...] | None = None
    question: int | None = None
    marked: int | None = None


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one question on one picture, part by part.

    Attributes
    ----------
    tower, projector : int
        The vision side.
    method : int
        The method's own work (`Compressor.own_macs`).
    prefill : int
        All decoder layers over the whole prompt in a single pass.
    head : int
        The language-model head on one token.
    shared : int
        The part of the prefill that serves every question on the picture.
    question : int
        The prefill of a question behind it.
    again : int
        A further question on the picture, up to its first token: `question`, the head, and what
        depends on the question of the method's own work.
    decode : int
        All decoder layers for the first generated token.
    """

    tower: int
    projector: int
    method: int
    prefill: int
    head: int
    shared: int
    question: int
    again: int
    decode: int

    @property
    def total(self) -> int:
        """Up to the first token, in a single pass: everything but `decode`."""
        return self.tower + self.projector + self.method + self.prefill + self.head


@dataclass(frozen=True)
class ClosedForm:
    """Counts of one method on one request.

    Attributes
    ----------
    case : Case
        The sizes.
    entering : int
        Tokens through which the text sees the picture: visual tokens entering layer 0, or the
        learned tokens that replace them.
    cached : tuple of int
        KV entries of each layer after prefill, text included.
    peak : tuple of int
        KV entries of each layer before the method evicts any.
    macs : Macs
        FLOPs are twice these.
    """

    case: Case
    entering: int
    cached: tuple[int, ...]
    peak: tuple[int, ...]
    macs: Macs

    @property
    def layer_average(self) -> float:
        """Visual tokens at the layers' inputs, averaged over the layers (spec selective 1.3)."""
        return sum(self.case.entered) / len(self.case.entered)

    @property
    def output_average(self) -> float:
        """Visual tokens that leave the layers, averaged: SparseVLM's count (spec selective 1.3)."""
        entered = self.case.entered
        return sum((*entered[1:], entered[-1])) / len(entered)

    @property
    def visual_macs(self) -> int:
        """Decoder layers on the visual tokens alone, as papers count (spec selective 1.4)."""
        return visual_macs(self.case.spec, self.case.entered)

    def kv_bytes(self, dtype: str) -> list[int]:
        """Bytes of the KV cache after prefill, layer by layer."""
        return [kv_bytes(self.case.spec, count, dtype) for count in self.cached]

    def peak_kv_bytes(self, dtype: str) -> int:
        """Bytes of the KV cache before the method evicts any, all layers."""
        return sum(kv_bytes(self.case.spec, count, dtype) for count in self.peak)


def visual_macs(spec: ModelSpec, inputs: Sequence[int]) -> int:
    """Sum f(n) over the layers for n visual tokens at each one's input (spec selective 1.4)."""
    return sum(layer_macs(spec, count, count) for count in inputs)


def kv_bytes(spec: ModelSpec, tokens: int, dtype: str) -> int:
    """Bytes that so many tokens take in the KV cache of one layer."""
    return tokens * 2 * spec.kv_heads * spec.head_dim * DTYPE_BYTES[dtype]


def close(shape: Shape, method: Compressor, request: Request) -> ClosedForm:
    """Count tokens, KV entries and multiply-accumulates of a method on a request."""
    spec = shape.spec
    grid = method.image_grid(request.grid) or request.grid
    visual = grid[0] * grid[1] if method.uses_image else 0
    tower = shape.tower(grid)
    entered = request.entered or tuple(method.schedule(visual, spec.layers))
    tokens = method.learned_tokens()
    case = Case(
        spec=spec,
        tower=tower,
        visual=visual,
        grid=grid,
        entered=tuple(entered) if visual else (0,) * spec.layers,
        before=request.before,
        bridge=request.bridge,
        learned=0 if tokens is None else len(tokens),
        after=request.after,
        question=request.after if request.question is None else request.question,
        marked=request.after // 2 if request.marked is None else request.marked,
    )
    peak = tuple(case.length(layer) for layer in range(spec.layers))
    cached = _cached(method, case) if visual else peak
    prefix, behind = _passes(method, case, cached)
    own = method.own_macs(case) if visual else 0
    head = spec.hidden * shape.vocabulary
    macs = Macs(
        tower=tower.encode if visual else 0,
        projector=method.projected(visual) * tower.project if visual else 0,
        method=own,
        prefill=sum(case.decoder_layer(length) for length in peak),
        head=head,
        shared=prefix,
        question=behind,
        again=behind + head + (_own_again(method, case) if visual else 0),
        decode=sum(case.decoder_layer(1, length + 1) for length in cached),
    )
    entering = case.learned or case.entered[0]
    return ClosedForm(case, entering, cached, peak, macs)


def _own_again(method: Compressor, case: Case) -> int:
    """Price what of a method's own work a further question needs."""
    if method.reuse == "prefix":
        return 0
    if method.reuse == "layers":
        return method.own_macs(replace(case, shared=case.prefix(0)))
    return method.own_macs(case) + method.projected(case.visual) * case.tower.project


def _cached(method: Compressor, case: Case) -> tuple[int, ...]:
    """Ask the method what stays of each layer's entries, on a layout of the right sizes."""
    found: dict[int, int] = {}
    for visual in set(case.entered):
        kinds = (
            [Kind.PREFIX] * case.before
            + [Kind.VISUAL] * visual
            + [Kind.PREFIX] * case.bridge
            + [Kind.LEARNED] * case.learned
            + [Kind.SUFFIX] * case.after
        )
        kind = torch.tensor([kinds], dtype=torch.int8)
        places = torch.arange(len(kinds)).expand(case.spec.planes, 1, -1)
        kept = method.evict(Layout.build(kind, places))
        found[visual] = len(kinds) if kept is None else int((kept.index >= 0).sum())
    return tuple(found[visual] for visual in case.entered)


def _passes(method: Compressor, case: Case, cached: Sequence[int]) -> tuple[int, int]:
    """Price the part of the prefill that is shared, and a question behind it."""
    layers = range(case.spec.layers)
    whole_prefix = method.reuse == "prefix"
    stop = len(layers) if whole_prefix else min(method.shared_layers, len(layers))
    shared = sum(case.decoder_layer(case.prefix(layer)) for layer in layers[:stop])
    if whole_prefix:
        return shared, sum(case.decoder_layer(case.after, count) for count in cached)
    own = sum(case.decoder_layer(case.after, case.length(layer)) for layer in layers[:stop])
    return shared, own + sum(case.decoder_layer(case.length(layer)) for layer in layers[stop:])
