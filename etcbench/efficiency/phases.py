"""How long each phase of an answer takes, and how many answers a second are possible."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from etcbench.backbones import Backbone
from etcbench.compressor import Compressor
from etcbench.efficiency.requests import Trial, Workload
from etcbench.engine import out_of_memory

PHASES = ("vision", "compress", "prefill", "first token", "next question", "per token")
# Places where a method computes something of its own.
HOOKS = (
    "resample",
    "select_vision",
    "select_embeds",
    "mark",
    "select_prompt",
    "select_hidden",
    "evict",
)
WORTH_IT = 1.05  # a larger batch must bring this much, or the search ends
PATIENCE = 20.0  # seconds after which no larger batch is tried


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of repeated measurements."""

    median: float
    p10: float
    p90: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarise at least one value; percentiles are interpolated between neighbours."""
        ordered = sorted(values)
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0], 1)
        tenths = statistics.quantiles(ordered, n=10, method="inclusive")
        return cls(statistics.median(ordered), tenths[0], tenths[-1], len(ordered))


class Stopwatch:
    """Times nested phases: CUDA events on a GPU, the process clock elsewhere.

    The time of an inner phase is not part of the outer one's own.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._device = device
        self._spans: list[tuple[str, Any, Any, int | None]] = []
        self._open: list[int] = []

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block."""
        number, parent = len(self._spans), self._open[-1] if self._open else None
        start = self._now()
        self._spans.append((name, start, None, parent))
        self._open.append(number)
        try:
            yield
        finally:
            self._open.pop()
            self._spans[number] = (name, start, self._now(), parent)

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return milliseconds by phase, its own and with what is inside it, and start anew."""
        if self.on_gpu:
            torch.cuda.synchronize(self._device)
        own: dict[str, float] = defaultdict(float)
        whole: dict[str, float] = defaultdict(float)
        for name, start, end, parent in self._spans:
            took = start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)
            whole[name] += took
            own[name] += took
            if parent is not None:
                own[self._spans[parent][0]] -= took
        self._spans.clear()
        return dict(own), dict(whole)


class Timed:
    """A method whose hooks run under a stopwatch; everything else is the method's."""

    def __init__(self, method: Compressor, watch: Stopwatch) -> None:
        self._method, self._watch = method, watch

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._method, name)
        if name not in HOOKS:
            return value

        def timed(*arguments: Any) -> Any:
            with self._watch.phase("compress"):
                return value(*arguments)

        return timed


class Latency:
    """Repeated measurements of one method, a picture and a question at a time."""

    def __init__(self, backbone: Backbone, method: Compressor, workload: Workload) -> None:
        self.watch = Stopwatch(backbone.device)
        self.trial = Trial(
            backbone, method, workload, wrap=lambda m: cast(Compressor, Timed(m, self.watch))
        )
        self.times: dict[str, list[float]] = {name: [] for name in PHASES}

    @torch.inference_mode()
    def repeat(self, keep: bool = True) -> None:
        """Answer once; a warm-up is not kept."""
        trial, phase = self.trial, self.watch.phase
        trial.pixels  # noqa: B018 - preprocessing is not timed
        with phase("first token"):
            with phase("vision"):
                visual = trial.visual()
            with phase("prefill"):
                kv, logits = trial.prefill(trial.layout(visual))
        with phase("generate"):
            tokens = trial.generate(kv, logits)
        own, whole = self.watch.read()
        shared = trial.share(trial.prefix())
        self.watch.read()
        with phase("next question"):
            trial.ask(shared)
        behind = self.watch.read()[1]
        if keep:
            found = {"compress": 0.0, **own, "first token": whole["first token"]}
            found |= {"next question": behind["next question"]}
            # The first of them is the prefill's.
            found["per token"] = whole["generate"] / max(tokens - 1, 1)
            for name in PHASES:
                self.times[name].append(found[name])

    def spreads(self) -> dict[str, Spread]:
        """Summarise what was kept, milliseconds."""
        return {name: Spread.of(values) for name, values in self.times.items() if values}


def latency(
    backbone: Backbone,
    methods: Mapping[str, Compressor],
    workload: Workload,
    repeats: int,
    warmup: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, dict[str, Spread]]:
    """Time several methods in turn, so that what disturbs the machine disturbs all of them.

    Returns
    -------
    dict
        By method and phase, milliseconds.
    """
    runs = {name: Latency(backbone, method, workload) for name, method in methods.items()}
    for number in range(warmup + repeats):
        for run in runs.values():
            run.repeat(keep=number >= warmup)
            advance(1)
    return {name: run.spreads() for name, run in runs.items()}


@dataclass(frozen=True)
class Throughput:
    """Answers per second at the best of the batch sizes that were tried.

    Attributes
    ----------
    batch : int
        The best one.
    answers : Spread
        Answers per second there; every answer on a picture of its own.
    tried : dict of int to float
        Median of each batch size.
    end : str
        Why the search ended there.
    """

    batch: int
    answers: Spread
    tried: dict[int, float]
    end: str


@torch.inference_mode()
def throughput(
    backbone: Backbone,
    method: Compressor,
    workload: Workload,
    *,
    repeats: int = 3,
    largest: int = 256,
) -> Throughput:
    """Double the batch until it stops helping, or memory or ``largest`` ends it.

    From preprocessed pictures to answers of the workload's length, in a single pass each.
    """
    found: dict[int, Spread] = {}
    batch, best, idle, end = 1, 0.0, 0, f"no larger batch was tried than {largest}"
    started = time.perf_counter()
    while batch <= largest:
        if time.perf_counter() - started > PATIENCE:
            end = f"no batch of {batch} was tried: the search had taken {PATIENCE:.0f} s"
            break
        try:
            found[batch] = _answers_per_second(Trial(backbone, method, workload, batch), repeats)
        except (MemoryError, RuntimeError) as error:
            if not found or not out_of_memory(error):
                raise
            if backbone.device.type == "cuda":
                torch.cuda.empty_cache()
            end = f"no memory for a batch of {batch}"
            break
        helps = found[batch].median >= WORTH_IT * best
        best, idle = max(best, found[batch].median), 0 if helps else idle + 1
        if idle == 2:  # a single doubling that does not help may be chance
            end = f"neither a batch of {batch // 2} nor of {batch} helps"
            break
        batch *= 2
    size = max(found, key=lambda size: found[size].median)
    return Throughput(size, found[size], {n: s.median for n, s in found.items()}, end)


def _answers_per_second(trial: Trial, repeats: int) -> Spread:
    watch = Stopwatch(trial.backbone.device)
    trial.pixels  # noqa: B018 - preprocessing is not timed
    rates = []
    for number in range(repeats + 1):
        with watch.phase("answers"):
            trial.generate(*trial.prefill(trial.prefix()))
        took = watch.read()[1]["answers"]
        if number:  # the first one warms up
            rates.append(1e3 * trial.batch / took)
    return Spread.of(rates)
