"""Measure methods on a model: what is counted, what is timed, and under which convention."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from etcbench.backbones import Backbone
from etcbench.compressor import Compressor
from etcbench.console import progress
from etcbench.efficiency.closed_form import FLOPS_PER_MAC, ClosedForm, close
from etcbench.efficiency.memory import Peak, peak_on_gpu, peaks_on_cpu
from etcbench.efficiency.methods import build, sized
from etcbench.efficiency.paper import DTYPE as PAPER_DTYPE
from etcbench.efficiency.paper import paper_figures
from etcbench.efficiency.phases import Spread, Throughput, latency, throughput
from etcbench.efficiency.requests import Trial, Workload, request_of
from etcbench.efficiency.shapes import Shape
from etcbench.errors import unknown_name
from etcbench.run import LoadedMethod

Convention = Literal["etcbench", "paper"]
Phase = Literal["latency", "throughput", "memory"]
LATENCY: tuple[Phase, ...] = ("latency",)


@dataclass
class Measurement:
    """What a method costs on a model.

    Attributes
    ----------
    method, tokens : str
        Name and budget as asked for; None for a method without one.
    form : ClosedForm
        Tokens, KV entries and FLOPs.
    vocabulary : int
        Rows of the head.
    dtype, attention : str
        Of the model; the attention backend is the same for every method, ``"none"`` where
        nothing was run.
    kv_bytes : list of int
        KV cache after prefill, layer by layer: from its tensors where the model was run.
    latency : dict of str to Spread
        Milliseconds by phase.
    throughput : Throughput or None
        At the best batch size.
    peak : Peak or None
        Memory of one answer.
    branch_kv_bytes : int
        KV cache of a branch that the method keeps beside the model's.
    untrained : bool
        Whether the method ran with random weights.
    """

    method: str
    tokens: str | None
    form: ClosedForm
    vocabulary: int
    dtype: str
    attention: str
    kv_bytes: list[int]
    latency: dict[str, Spread] = field(default_factory=dict)
    throughput: Throughput | None = None
    peak: Peak | None = None
    branch_kv_bytes: int = 0
    untrained: bool = False

    @property
    def label(self) -> str:
        """Method and budget."""
        return " ".join(filter(None, (self.method, self.tokens)))

    def figures(self, convention: Convention = "etcbench") -> list[dict[str, Any]]:
        """One flat record per figure, each with its convention, dtype and attention backend."""
        ran = self.attention != "none"
        rows: list[dict[str, Any]] = []

        def add(figure: str, value: Any, unit: str, source: str, **more: Any) -> None:
            rows.append({"figure": figure, "value": value, "unit": unit, "source": source, **more})

        form, counted = self.form, "closed form"
        add("tokens entering", form.entering, "tokens", "run" if ran else counted)
        add("layer average", form.layer_average, "tokens", "run" if ran else counted)
        add("layer average of outputs", form.output_average, "tokens", "run" if ran else counted)
        if convention == "paper":
            figures = paper_figures(form, self.vocabulary)
            add("kv cache", figures.kv_mib, "MiB", counted, dtype=PAPER_DTYPE)
            add("flops", figures.tera_flops, "TFLOP at 1 per MAC", counted)
        else:
            cache = "cache tensors" if ran else counted
            add("kv cache", sum(self.kv_bytes), "bytes", cache, layers=self.kv_bytes)
            add("kv cache before eviction", form.peak_kv_bytes(self.dtype), "bytes", counted)
            if self.branch_kv_bytes:
                add("kv cache of the branch", self.branch_kv_bytes, "bytes", cache)
            for name, macs in vars(form.macs).items():
                add(f"{name} flops", FLOPS_PER_MAC * macs, "FLOP", counted)
            add("total flops", FLOPS_PER_MAC * form.macs.total, "FLOP", counted)
            add("visual macs", form.visual_macs, "MAC", counted)
        for name, spread in self.latency.items():
            shown = {"p10": spread.p10, "p90": spread.p90, "n": spread.n}
            add(f"{name} time", spread.median, "ms", "run", **shown)
        if self.throughput is not None:
            best = self.throughput.answers
            add("throughput", best.median, "answers/s", "run", p10=best.p10, p90=best.p90, n=best.n)
            rows[-1] |= {
                "batch": self.throughput.batch,
                "tried": self.throughput.tried,
                "end": self.throughput.end,
            }
        if self.peak is not None:
            source = self.peak.source
            add("peak memory", self.peak.growth, "bytes", source, resident=self.peak.resident)
        about = {"method": self.method, "tokens": self.tokens}
        how = {"convention": convention, "dtype": self.dtype, "attention": self.attention}
        return [{**about, **how, **row} for row in rows]


def measure(
    model: Backbone | Shape | str,
    method: LoadedMethod | Compressor | str,
    tokens: int | str | None = None,
    *,
    workload: Workload | None = None,
    phases: Collection[Phase] = LATENCY,
    repeats: int = 10,
    warmup: int = 2,
    dtype: str = "bfloat16",
    **options: Any,
) -> Measurement:
    """Measure one method on one model.

    Parameters
    ----------
    model : Backbone, Shape or str
        A loaded model is run. A shape, or a name that `Shape.named` knows, gives the closed form
        alone and needs no weights.
    method : LoadedMethod, Compressor or str
        A method built for the model, or its name with ``tokens`` and ``options``.
    tokens : int or str, optional
        Budget.
    workload : Workload, optional
        What is asked.
    phases : collection of {"latency", "throughput", "memory"}
        What is measured beside the counts.
    repeats, warmup : int
        Runs that count and runs before them.
    dtype : str
        Of the KV cache where no model is loaded.

    Raises
    ------
    UsageError
        If there is no such model, method, budget, option or phase.
    """
    budget = None if tokens is None else str(tokens)
    if not isinstance(model, Backbone):
        shape = Shape.named(model) if isinstance(model, str) else model
        if isinstance(method, LoadedMethod):
            method = method.compressor
        if isinstance(method, str):
            method = sized(method, budget, shape.spec, options)
        return count(shape, method, workload or Workload(), dtype)
    if isinstance(method, str):
        method = build(method, budget, model, options)
    if isinstance(method, Compressor):
        method = LoadedMethod(method)
    return measure_all(model, [method], workload, phases, repeats, warmup)[0]


def count(shape: Shape, method: Compressor, workload: Workload, dtype: str) -> Measurement:
    """Count from sizes alone."""
    grid = shape.raster(*workload.picture)
    form = close(shape, method, workload.estimated(method, grid))
    budget = None if method.budget is None else str(method.budget)
    return Measurement(
        method.name(), budget, form, shape.vocabulary, dtype, "none", form.kv_bytes(dtype)
    )


def measure_all(
    model: Backbone,
    methods: Sequence[LoadedMethod],
    workload: Workload | None = None,
    phases: Collection[Phase] = LATENCY,
    repeats: int = 10,
    warmup: int = 2,
) -> list[Measurement]:
    """Measure several methods on a loaded model, their timed runs in turn.

    Raises
    ------
    UsageError
        If there is no such phase, or what a method costs cannot be counted.
    """
    workload = workload or Workload()
    found = [observe(model, method, workload) for method in methods]
    add_phases(model, methods, found, workload, phases, repeats, warmup)
    return found


@torch.inference_mode()
def observe(model: Backbone, method: LoadedMethod, workload: Workload) -> Measurement:
    """Answer once; count from what was seen.

    Raises
    ------
    UsageError
        If what the method costs cannot be counted.
    """
    compressor, shape = method.compressor, Shape.of_backbone(model)
    trial = Trial(model, compressor, workload)
    kv, _ = trial.prefill(trial.prefix())
    request = request_of(trial.prompt, trial.grid, kv, trial.question_tokens)
    form = close(shape, compressor, request)
    return Measurement(
        compressor.name(),
        None if compressor.budget is None else str(compressor.budget),
        form,
        shape.vocabulary,
        str(model.dtype).removeprefix("torch."),
        model.attention,
        kv.bytes(),
        branch_kv_bytes=0 if kv.branch is None else sum(kv.branch.bytes()),
        untrained="untrained" in method.weights,
    )


def add_phases(
    model: Backbone,
    methods: Sequence[LoadedMethod],
    found: Sequence[Measurement],
    workload: Workload,
    phases: Collection[Phase],
    repeats: int,
    warmup: int,
) -> None:
    """Fill in what takes time: latency, throughput, memory.

    Raises
    ------
    UsageError
        If there is no such phase.
    """
    for phase in phases:
        if phase not in get_args(Phase):
            raise unknown_name("phase", phase, get_args(Phase))
    built = {str(number): method.compressor for number, method in enumerate(methods)}
    if "latency" in phases:
        with progress("latency", (warmup + repeats) * len(built)) as advance:
            times = latency(model, built, workload, repeats, warmup, advance)
        for measurement, spreads in zip(found, times.values(), strict=True):
            measurement.latency = spreads
    if "throughput" in phases:
        with progress("throughput", len(built)) as advance:
            for measurement, compressor in zip(found, built.values(), strict=True):
                measurement.throughput = throughput(model, compressor, workload)
                advance(1)
    if "memory" in phases:
        for measurement, peak in zip(found, _peaks(model, methods, workload), strict=True):
            measurement.peak = peak


def _peaks(
    model: Backbone, methods: Sequence[LoadedMethod], workload: Workload
) -> Sequence[Peak | None]:
    """Measure memory on the model's own device."""
    if model.device.type == "cuda":
        return [peak_on_gpu(model, method.compressor, workload) for method in methods]
    jobs: dict[str, tuple[str, str | None, Mapping[str, Any]]] = {}
    for number, method in enumerate(methods):
        compressor, options = method.compressor, dict(method.options)
        budget = None if compressor.budget is None else str(compressor.budget)
        jobs[str(number)] = (compressor.name(), budget, options)
    peaks = peaks_on_cpu(
        model.model.name_or_path,
        jobs,
        workload,
        str(model.dtype).removeprefix("torch."),
        model.attention,
        torch.get_num_threads(),
    )
    return [None if peaks is None else peaks[key] for key in jobs]
