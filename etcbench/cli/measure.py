"""``etcbench measure``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from etcbench.cli.app import (
    AttentionBackend,
    Budgets,
    Checkpoint,
    Device,
    Dtype,
    Json,
    MethodOptions,
    Methods,
    Model,
    app,
    examples,
    split_list,
)
from etcbench.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from etcbench.efficiency.measure import Measurement
    from etcbench.efficiency.requests import Workload
    from etcbench.sweep import Sweep

NONE = "none"
Problems = list[tuple[str, str]]


@app.command(
    epilog=examples(
        "etcbench measure --method full,fastv,etc --tokens 16,1",
        "etcbench measure --method full,fastv,visionzip --tokens 192,128,64 "
        "--model llava-hf/llava-1.5-7b-hf --closed-form",
        "etcbench measure --method full,etc --tokens 1 --model Qwen/Qwen3-VL-2B-Instruct "
        "--convention paper --closed-form",
    )
)
def measure(
    method: Methods,
    tokens: Budgets = None,
    model: Model = None,
    convention: Annotated[
        str, typer.Option(help="etcbench, or paper: as Table 4 of the ETC paper appears to count.")
    ] = "etcbench",
    phases: Annotated[
        list[str] | None,
        typer.Option(help="latency, throughput, memory (default: all), or none: one run."),
    ] = None,
    closed_form: Annotated[
        bool, typer.Option("--closed-form", help="Count from the sizes alone; load no weights.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Timed runs of each method.", min=1)] = 10,
    warmup: Annotated[int, typer.Option(help="Runs before them.", min=0)] = 2,
    new_tokens: Annotated[int, typer.Option(help="Length of an answer.", min=2)] = 16,
    picture: Annotated[str, typer.Option(help="Width x height in pixels.")] = "768x768",
    text: Annotated[
        str, typer.Option(help="Text tokens before + behind the picture, without a tokenizer.")
    ] = "35+25",
    checkpoint: Checkpoint = None,
    option: MethodOptions = None,
    device: Device = None,
    dtype: Dtype = None,
    attention: AttentionBackend = "sdpa",
    as_json: Json = False,
) -> None:
    """Measure what methods cost: tokens, KV cache, FLOPs, time, throughput, memory.

    One question on one picture. A model whose weights are on this machine is run; of another one
    everything is counted that follows from its sizes. No trained weights are needed. A method
    that cannot serve a budget is listed with the reason.
    """
    from etcbench.compressor import Budget
    from etcbench.console import notice, quiet_libraries
    from etcbench.options import pairs

    methods = split_list(method)
    if not methods:
        raise UsageError("nothing to measure; name at least one --method")
    budgets = [Budget.parse(budget) for budget in split_list(tokens)]
    options = pairs(option or (), "--option")
    size, lengths = _two(picture, "x", "--picture"), _two(text, r"\+", "--text")
    quiet_libraries()
    from etcbench.backbones.loading import default_model, micro_models
    from etcbench.efficiency.measure import Convention
    from etcbench.efficiency.paper import DTYPE as PAPER_DTYPE
    from etcbench.efficiency.requests import Workload
    from etcbench.efficiency.shapes import has_weights
    from etcbench.environment import check_device
    from etcbench.summary import MICRO
    from etcbench.sweep import Sweep

    if convention not in get_args(Convention):
        raise unknown_name("convention", convention, get_args(Convention))
    wanted = _phases(phases)
    if closed_form and ((phases and wanted) or checkpoint):
        flag = "--checkpoint" if checkpoint else "--phases"
        raise UsageError(f"--closed-form runs nothing, so {flag} means nothing; leave out one")
    check_device(device, dtype, attention)
    name = model or default_model()
    sweep = Sweep(
        methods=methods,
        tasks=(),
        budgets=budgets,
        model=name,
        options=options,
        checkpoint=checkpoint,
        device=device,
        dtype=dtype,
        attention=attention,
    )
    workload = Workload(picture=size, text=lengths, new_tokens=new_tokens)
    # the dtype of a cache that is only counted; one that exists has the model's
    counted = dtype or (PAPER_DTYPE if convention == "paper" else "bfloat16")
    if closed_form or not has_weights(name):
        found, about, problems = _counted(sweep, workload, counted, closed_form)
    else:
        found, about, problems = _measured(sweep, workload, wanted, repeats, warmup)
    if name in micro_models():
        about.append(f"{name}; {MICRO}")
    if not found and len(problems) == 1:
        raise UsageError(problems[0][1])
    _show(found, convention, about, problems, as_json)
    if not as_json:
        for cell, reason in problems:
            notice(f"not measured: {cell}: {reason}")
    raise typer.Exit(0 if found else 2)


def _two(text: str, sign: str, flag: str) -> tuple[int, int]:
    """Read two whole numbers around a sign."""
    match = re.fullmatch(rf"\s*(\d+)\s*{sign}\s*(\d+)\s*", text)
    if match is None or not int(match[2]):
        shape = "WIDTHxHEIGHT" if sign == "x" else "BEFORE+BEHIND"
        raise UsageError(f"{flag} {text!r} is not of the form {shape}")
    if sign == "x" and not int(match[1]):
        raise UsageError(f"{flag} {text!r}: a picture has at least one pixel")
    return int(match[1]), int(match[2])


def _phases(texts: list[str] | None) -> list[str]:
    """Which phases are measured."""
    from etcbench.efficiency.measure import Phase

    known = get_args(Phase)
    wanted = split_list(texts) or list(known)
    if wanted == [NONE]:
        return []
    if NONE in wanted:
        raise UsageError(f"--phases {NONE} stands alone, not beside other phases")
    for phase in wanted:
        if phase not in known:
            raise unknown_name("phase", phase, [*known, NONE])
    return wanted


def _each(
    sweep: Sweep, make: Callable[[str, str | None, dict[str, Any]], Measurement]
) -> tuple[list[Measurement], Problems]:
    """Make a measurement of every cell; those that cannot be, with the reason."""
    variants, options = sweep.variants(), sweep.method_options()
    found: list[Measurement] = []
    problems: Problems = []
    for method, budget in variants:
        text = None if budget is None else str(budget)
        try:
            found.append(make(method, text, options[method]))
        except UsageError as error:
            problems.append((" ".join(filter(None, (method, text))), str(error)))
    return found, problems


def _counted(
    sweep: Sweep, workload: Workload, dtype: str, asked: bool
) -> tuple[list[Measurement], list[str], Problems]:
    """Count every cell from the model's sizes: what was found, what to say, what was not."""
    from etcbench.efficiency.measure import count
    from etcbench.efficiency.methods import sized
    from etcbench.efficiency.shapes import Shape

    assert sweep.model is not None
    shape = Shape.named(sweep.model)
    found, problems = _each(
        sweep, lambda m, b, o: count(shape, sized(m, b, shape.spec, o), workload, dtype)
    )
    why = "" if asked else ", because its weights are not on this machine"
    about = (
        f"{shape.spec.name}, {dtype}: counted from its sizes{why}; a picture of "
        f"{_size(workload)} pixels, {workload.text[0]} + {workload.text[1]} text tokens."
    )
    return found, [about], problems


def _measured(
    sweep: Sweep, workload: Workload, phases: list[Any], repeats: int, warmup: int
) -> tuple[list[Measurement], list[str], Problems]:
    """Run every cell: what was found, what to say about it, what could not be measured."""
    from etcbench.backbones import load_backbone
    from etcbench.console import waiting
    from etcbench.efficiency.measure import add_phases, observe
    from etcbench.efficiency.methods import build
    from etcbench.environment import device_name
    from etcbench.run import LoadedMethod

    with waiting("loading the model"):
        backbone = load_backbone(
            sweep.model, device=sweep.device, dtype=sweep.dtype, attention=sweep.attention
        )
    loaded: list[LoadedMethod] = []

    def run(name: str, budget: str | None, chosen: dict[str, Any]) -> Measurement:
        method = build(name, budget, backbone, chosen, sweep.checkpoint_of(name))
        measurement = observe(backbone, method, workload)
        loaded.append(method)
        return measurement

    found, problems = _each(sweep, run)
    if not found:
        return [], [], problems
    add_phases(backbone, loaded, found, workload, phases, repeats, warmup)
    about = [
        f"{backbone.spec.name}, {found[0].dtype}, attention {backbone.attention} for every method, "
        f"on {device_name(backbone.device)}; a picture of {_size(workload)} pixels, "
        f"{found[0].form.case.text} text tokens, {workload.new_tokens} generated."
    ]
    if "latency" in phases:
        about.append(f"Times: median (10th-90th percentile) of {repeats} runs in turn, batch 1.")
    about += [f"{m.label}: {m.throughput.end}." for m in found if m.throughput]
    return found, about, problems


def _size(workload: Workload) -> str:
    return "x".join(map(str, workload.picture))


def _show(
    found: list[Measurement],
    convention: Any,
    about: list[str],
    problems: Problems,
    as_json: bool,
) -> None:
    from etcbench.console import show
    from etcbench.efficiency.paper import DTYPE as PAPER_DTYPE
    from etcbench.efficiency.paper import table_4
    from etcbench.efficiency.tables import notes, table_of_residuals, tables

    said = notes(found, convention, about)
    residuals = table_4() if convention == "paper" else []
    if as_json:
        content = {
            "convention": convention,
            "figures": [figure for m in found for figure in m.figures(convention)],
            "notes": said,
            "not_measured": [{"cell": cell, "reason": reason} for cell, reason in problems],
        }
        if residuals:
            how = {"convention": convention, "dtype": PAPER_DTYPE, "attention": "none"}
            content["table_4"] = [
                {**vars(row), "residual": row.residual, **how} for row in residuals
            ]
        print(json.dumps(content, indent=2))
        return
    printed = tables(found, convention) if found else []
    if residuals:
        printed.append(table_of_residuals(residuals))
    for number, table in enumerate(printed):
        last = number + 1 == len(printed)
        show(table.columns, table.rows, said if last else [""])
