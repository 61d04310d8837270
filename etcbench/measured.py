"""Runs on disk in the terms of published numbers, so that both fill the same tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from etcbench import registry
from etcbench.checkpoints import CONFIG, shipped
from etcbench.controls import pictures_shuffled
from etcbench.errors import UsageError
from etcbench.figures import digits_of
from etcbench.paired import Difference, Pairing
from etcbench.published import Published
from etcbench.store import RunDirectory, find_runs
from etcbench.summary import MICRO

MEASURED = "measured"
# Benchmark of a run to the figures that tables know: task, metric, protocol, and the name of
# the figure in the run's headline.
_MME = (("mme", "total", "total", "total"), ("mme", "perception", "perception", "perception"))
_SEED = (("seedbench", "accuracy", "all", "all"), ("seedbench", "accuracy", "image", "image"))
_SQA = (("scienceqa", "accuracy", "img", "img"),)


def _mmbench(language: str) -> tuple[tuple[str, str, str, str], ...]:
    names = ("circular", "per_row")
    return tuple((f"mmbench_{language}", "accuracy", name, name) for name in names)


def _plain(task: str, protocol: str, name: str = "accuracy") -> tuple[tuple[str, str, str, str]]:
    return ((task, name, protocol, name),)


FIGURES: Mapping[str, tuple[tuple[str, str, str, str], ...]] = {
    "mme": _MME,
    "seedbench": _SEED,
    "scienceqa": _SQA,
    "scienceqa_img": _SQA,
    "mmbench": _mmbench("en"),
    "mmbench_en": _mmbench("en"),
    "mmbench_cn": _mmbench("cn"),
    "vqav2": _plain("vqav2", "val"),
    "gqa": _plain("gqa", "testdev-balanced"),
    "pope": _plain("pope", "f1", "f1"),
    "qbench": _plain("qbench", "dev"),
    "textvqa": _plain("textvqa", "val, OCR tokens"),
    **{
        f"refcoco_caption{part}": (
            (f"refcoco_caption{part or '_testA'}", "cider", "cider", "cider_x100"),
        )
        for part in ("", "_testA", "_testB", "_val")
    },
}
# What papers call the models.
PUBLISHED_MODELS = {
    "llava-hf/llava-1.5-7b-hf": "LLaVA-1.5-7B",
    "llava-hf/llava-1.5-13b-hf": "LLaVA-1.5-13B",
    "Qwen/Qwen3-VL-2B-Instruct": "Qwen3-VL-2B",
}


@dataclass(frozen=True)
class Measured(Published):
    """A figure of one run, or the mean over runs that differ in the seed of training alone.

    Attributes
    ----------
    low, high : float
        95 % interval (of the headline; equal to the value for other figures).
    n : int
        Samples.
    seeds : int
        Runs behind it.
    spread : float
        Standard deviation over the seeds.
    difference : Difference or None
        To the baseline row.
    micro : bool
        Whether model or data are the embedded ones.
    """

    low: float = 0.0
    high: float = 0.0
    n: int = 0
    seeds: int = 1
    spread: float = 0.0
    difference: Difference | None = None
    micro: bool = False

    @property
    def text(self) -> str:
        """Cell: value, interval or spread, difference."""
        digits = len(self.value.partition(".")[2])
        shown = self.value
        if self.seeds > 1:
            shown += f" ± {self.spread:.{digits}f}"
        elif self.low < self.high:
            shown += f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        if (apart := self.difference) is not None:
            low, high = f"{apart.low:+.{digits}f}", f"{apart.high:+.{digits}f}"
            shown += f"; {apart.value:+.{digits}f} [{low}, {high}]"
        return shown


def measured_numbers(
    runs: Sequence[RunDirectory], baseline: str | None = None, partial: bool = False
) -> list[Measured]:
    """Turn runs into numbers for the tables.

    Parameters
    ----------
    runs : sequence of RunDirectory
        Runs; those on shuffled pictures and of benchmarks that no table knows are left out.
    baseline : str, optional
        Row to which every headline is compared, paired on the same samples.
    partial : bool
        Whether runs with failed samples are shown.

    Raises
    ------
    UsageError
        If a run is unfinished or has failed samples, and ``partial`` is not given.
    """
    usable = []
    for run in runs:
        config = run.manifest["config"]
        if config["task"] not in FIGURES or pictures_shuffled(config["data"]):
            continue
        if run.summary is None or (not run.finished and not partial):
            raise UsageError(
                f"{run.path} has missing samples; the same command continues it"
                + ("" if run.summary is None else ", --partial shows its score")
            )
        usable.append(run)
    apart = Pairing(usable).differences(baseline) if baseline else {}
    grouped: dict[tuple[str, ...], list[Measured]] = {}
    for run in usable:
        for number in _numbers(run, apart.get(run.path)):
            key = (number.model, number.method, number.tokens, number.task, number.protocol)
            grouped.setdefault(key, []).append(number)
    return [_mean(numbers) for numbers in grouped.values()]


def _numbers(run: RunDirectory, apart: Difference | None) -> list[Measured]:
    config, summary = run.manifest["config"], run.summary
    assert summary is not None
    name = config["model"]["name"]
    tokens = config["tokens"] or f"{summary['tokens']['entering'] or 0:g}"
    found = []
    for task, metric, protocol, figure in FIGURES[config["task"]]:
        if figure not in summary["headline"]:
            continue
        value = summary["headline"][figure]
        first = figure == next(iter(summary["headline"]))
        digits = max(digits_of(summary["unit"]), 2 if summary["unit"] == "points" else 1)
        found.append(
            Measured(
                paper=MEASURED,
                table="",
                method=label_of(config),
                model=PUBLISHED_MODELS.get(name, name),
                tokens=tokens,
                task=task,
                metric=metric,
                value=f"{value:.{digits}f}",
                protocol=_protocol(config, protocol),
                source=str(run.path),
                note="",
                low=summary["interval"]["low"] if first else value,
                high=summary["interval"]["high"] if first else value,
                n=summary["n"],
                difference=apart if first else None,
                micro=summary["micro"] is not None,
            )
        )
    return found


def _protocol(config: Mapping[str, Any], usual: str) -> str:
    """Name the protocol of a run; a prompt may leave out the OCR tokens that papers give."""
    if config["task"] == "textvqa" and config["style"] not in ("llava", "lmms-ocr"):
        return "val"
    return usual


def label_of(config: Mapping[str, Any]) -> str:
    """Name a method as published rows do: with the options that are not its defaults.

    What comes trained with an embedded model has the options of its recipe for defaults: sizes
    and weights of losses that suit a model of that size.

    Parameters
    ----------
    config : mapping
        Config of a run's manifest.
    """
    kind = registry.load("baselines", config["method"])
    usual = {f.name: _default(f) for f in fields(kind) if f.init}
    if kind.trained:
        usual |= _shipped_options(config["model"]["name"], config["method"])
    changed = {
        name: value
        for name, value in config["options"].items()
        if name in usual
        and name != "seed"
        and _plainly(usual[name]) != value
        and usual[name] is not None
    }
    inside = ", ".join(f"{name}={value}" for name, value in sorted(changed.items()))
    if "untrained" in config["weights"]:
        inside = ", ".join(filter(None, (inside, "untrained")))
    return config["method"] + (f"[{inside}]" if inside else "")


@cache
def _shipped_options(model: str, method: str) -> dict[str, Any]:
    configs = [json.loads((folder / CONFIG).read_text()) for folder in shipped(model)]
    own = [found["options"] for found in configs if found["method"] == method]
    return {name: value for options in own for name, value in options.items()}


def _default(option: Field[Any]) -> Any:
    """Give the default of an option; None where it has none."""
    if option.default is not MISSING:
        return option.default
    return None if option.default_factory is MISSING else option.default_factory()


def _plainly(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _mean(numbers: Sequence[Measured]) -> Measured:
    """Average over training seeds; one number stays as it is."""
    if len(numbers) == 1:
        return numbers[0]
    values = [float(number.value) for number in numbers]
    digits = len(numbers[0].value.partition(".")[2])
    return replace(
        numbers[0],
        value=f"{fmean(values):.{digits}f}",
        seeds=len(numbers),
        spread=stdev(values),
        difference=None,
        source=", ".join(sorted(number.source for number in numbers)),
    )


def remarks_on(numbers: Sequence[Measured], baseline: str | None) -> list[str]:
    """Say what a reader of measured cells must know."""
    found = []
    if any(number.micro for number in numbers):
        found.append(MICRO[0].upper() + MICRO[1:] + ".")
    samples: dict[str, set[int]] = {}
    for number in numbers:
        samples.setdefault(number.task, set()).add(number.n)
    counts = ", ".join(f"{t} {'/'.join(map(str, sorted(n)))}" for t, n in sorted(samples.items()))
    found.append(
        f"Measured: score [95 % interval], or mean ± standard deviation over seeds; n: {counts}."
    )
    if baseline:
        found.append(f"Behind ;: difference to {baseline}, paired on the same samples.")
    return found


def read_runs(paths: Sequence[Path]) -> list[RunDirectory]:
    """Read the runs at or below some folders, each once."""
    return [
        RunDirectory.read(p) for p in dict.fromkeys(p for path in paths for p in find_runs(path))
    ]
