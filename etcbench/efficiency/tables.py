"""Measurements as tables for people, and what has to be said below them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from etcbench.efficiency.closed_form import FLOPS_PER_MAC
from etcbench.efficiency.measure import Convention, Measurement
from etcbench.efficiency.paper import MIB, REQUEST, Residual, paper_figures, table_4
from etcbench.efficiency.phases import PHASES, Spread

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
ETCBENCH = (
    "etcbench convention: 2 FLOPs per multiply-accumulate; every matrix product and convolution "
    "counts, products of attention whole (masked entries too); norms, softmaxes and sorting do not."
)
PAPER = (
    "paper convention, as Table 4 of the ETC paper appears to count: cache as float32, 2**20 bytes "
    "a MB; 1 FLOP per multiply-accumulate of linear and convolution layers; no products of "
    "attention; the head at every position; only tokens that stay in the cache."
)


@dataclass(frozen=True)
class Printed:
    """A table as strings."""

    columns: list[str]
    rows: list[list[str]]


def tables(measurements: Sequence[Measurement], convention: Convention) -> list[Printed]:
    """Lay out tokens and cache, FLOPs, and times; tables without figures are left out."""
    found = [_cache(measurements, convention)]
    if convention == "etcbench":
        found.append(_flops(measurements))
    if any(m.latency or m.throughput for m in measurements):
        found.append(_times(measurements))
    return found


def _names(measurement: Measurement) -> list[str]:
    return [measurement.method, measurement.tokens or ""]


def _cache(measurements: Sequence[Measurement], convention: Convention) -> Printed:
    columns = ["method", "tokens", "entering", "layer average"]
    rows = [[*_names(m), str(m.form.entering), f"{m.form.layer_average:.1f}"] for m in measurements]
    if convention == "paper":
        columns += ["KV MB", "TFLOP (1 per MAC)"]
        for row, m in zip(rows, measurements, strict=True):
            figures = paper_figures(m.form, m.vocabulary)
            row += [_number(figures.kv_mib), _number(figures.tera_flops)]
        return Printed(columns, rows)
    columns += ["KV MiB", "before eviction", "KV tokens by layer"]
    for row, m in zip(rows, measurements, strict=True):
        cache = _number(sum(m.kv_bytes) / MIB)
        if m.branch_kv_bytes:
            cache += f" + {_number(m.branch_kv_bytes / MIB)}"
        row += [cache, _number(m.form.peak_kv_bytes(m.dtype) / MIB), _runs(m.form.cached)]
    if any(m.peak for m in measurements):
        columns += ["peak memory MiB"]
        for row, m in zip(rows, measurements, strict=True):
            row.append("" if m.peak is None else _number(m.peak.growth / MIB))
    return Printed(columns, rows)


def _flops(measurements: Sequence[Measurement]) -> Printed:
    unit, prefix = _unit(max(FLOPS_PER_MAC * m.form.macs.total for m in measurements))
    parts = ["tower", "projector", "method", "prefill", "head", "total", "again", "decode"]
    titles = {"total": "to first token", "again": "next question", "decode": "per token"}
    columns = ["method", "tokens", *(titles.get(part, part) for part in parts)]
    columns = [f"{c} {prefix}FLOP" if n > 1 else c for n, c in enumerate(columns)]
    rows = []
    for m in measurements:
        macs = m.form.macs
        later = {"decode": macs.decode + macs.head}
        values = [FLOPS_PER_MAC * later.get(part, getattr(macs, part)) for part in parts]
        rows.append(
            [
                *_names(m),
                *(_number(value / unit) for value in values),
                _number(m.form.visual_macs / unit),
            ]
        )
    return Printed([*columns, f"visual {prefix}MAC"], rows)


def _times(measurements: Sequence[Measurement]) -> Printed:
    columns, rows = ["method", "tokens"], [_names(m) for m in measurements]
    if any(m.latency for m in measurements):
        columns += [f"{name} ms" for name in PHASES]
        for row, m in zip(rows, measurements, strict=True):
            row += [_spread(m.latency[name]) for name in PHASES]
    if any(m.throughput for m in measurements):
        columns += ["answers/s", "at batch"]
        for row, m in zip(rows, measurements, strict=True):
            best = m.throughput
            row += ["", ""] if best is None else [_spread(best.answers), str(best.batch)]
    return Printed(columns, rows)


def table_of_residuals(rows: Sequence[Residual] | None = None) -> Printed:
    """Table 4 of the ETC paper beside what is counted."""
    printed = []
    for row in rows or table_4():
        residual = row.residual
        points = row.metric.endswith("percent")
        counted = "" if row.counted is None else f"{row.counted:.2f}"
        shown = "depends on the machine"
        if residual is not None:
            shown = f"{residual:+.2f} points" if points else f"{residual:+.2%}"
        printed.append([row.method, row.metric, f"{row.published:.2f}", counted, shown])
    return Printed(["method", "Table 4", "published", "counted", "residual"], printed)


def notes(
    measurements: Sequence[Measurement], convention: Convention, about: Sequence[str]
) -> list[str]:
    """Say under which conventions the figures hold."""
    lines = [PAPER if convention == "paper" else ETCBENCH, *about]
    if convention == "paper":
        lines.append(
            f"Table 4 is counted on Qwen3-VL-2B with {REQUEST.grid[0] * REQUEST.grid[1]} visual "
            f"and {REQUEST.before + REQUEST.after} text tokens, which fit its cache column."
        )
    lines += [
        f"{m.label}: the cache holds {sum(m.kv_bytes)} bytes, the closed form says {expected}"
        for m in measurements
        if sum(m.kv_bytes) != (expected := sum(m.form.kv_bytes(m.dtype)))
    ]
    if random := [m.label for m in measurements if m.untrained]:
        lines.append(
            f"Random weights: {', '.join(random)}; no figure depends on them but the time per "
            "token of a method that drafts."
        )
    return [*lines, "How each figure is defined: docs/efficiency.md."]


def _unit(value: float) -> tuple[float, str]:
    return next(((size, prefix) for size, prefix in PREFIXES if value >= size), PREFIXES[-1])


def _number(value: float) -> str:
    """Four significant digits, without an exponent."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = max(3 - len(str(int(abs(value)))) + 1, 0) if abs(value) >= 1 else 4
    return f"{value:.{digits}f}"


def _spread(spread: Spread) -> str:
    return f"{_number(spread.median)} ({_number(spread.p10)}-{_number(spread.p90)})"


def _runs(counts: Sequence[int]) -> str:
    """Write equal neighbours once: ``2 x 103, 6 x 59``."""
    runs = [(count, len(list(group))) for count, group in groupby(counts)]
    return ", ".join(f"{length} x {count}" for count, length in runs)
