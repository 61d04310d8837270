"""Draw every table and figure of a comparison from its records, without a model."""

from __future__ import annotations

from pathlib import Path

from etcbench.console import notice
from etcbench.curves import AXES, IN_COSTS, draw, points, read_costs
from etcbench.errors import UsageError
from etcbench.html_report import html_report
from etcbench.measured import measured_numbers, read_runs
from etcbench.paper_sheets import measured_tables
from etcbench.paper_tables import PAPER_TABLES
from etcbench.places import read_places
from etcbench.plan import RUNS
from etcbench.report import in_order, render, tabulate_runs
from etcbench.store import RunDirectory
from etcbench.tables import render_sheet


def redraw(folder: Path, title: str, baseline: str) -> list[Path]:
    """Draw what belongs to a comparison into its folder.

    ``tables/`` gets the scores of each model and every table of a paper that the runs can fill,
    as Markdown and csv; ``figures/`` the curves, as PNG and SVG; ``report.html`` all of it with
    samples. Costs come from ``costs-<model>.json``, kept places from ``places.json``.

    Parameters
    ----------
    folder : Path
        Of a plan; has ``runs/``.
    title : str
        Heading of the report.
    baseline : str
        Row to which scores are compared.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    UsageError
        If there are no runs, or none of them is the baseline.
    """
    runs = in_order([run for run in read_runs([folder / RUNS]) if run.finished])
    for run in runs:
        run.path = run.path.relative_to(folder)  # what is written must not name this machine
    if not runs:
        raise UsageError(f"{folder / 'runs'} has no finished run")
    models = list(dict.fromkeys(str(run.manifest["config"]["model"]["name"]) for run in runs))
    files = []
    for model in models:
        mine = [run for run in runs if run.manifest["config"]["model"]["name"] == model]
        files += _tables(folder / "tables", model, mine, baseline)
        files += _figures(folder, model, mine)
    page = folder / "report.html"
    page.write_text(
        html_report(
            runs, title=title, baseline=baseline, places=read_places(folder / "places.json")
        ),
        encoding="utf-8",
    )
    return [*files, page]


def _tables(folder: Path, model: str, runs: list[RunDirectory], baseline: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    table = tabulate_runs(runs, baseline=baseline, hard=True)
    for form in ("md", "csv"):
        written[folder / f"{model}-scores.{form}"] = render(table, form)
    numbers = measured_numbers(runs, baseline)
    for name, paper in PAPER_TABLES.items():
        tasks = {column.task for column in paper.columns}
        mine = [number for number in numbers if number.task in tasks and paper.takes(number.method)]
        # A table of what was varied says nothing as long as nothing was.
        if not mine or (paper.varied and not any("[" in number.method for number in mine)):
            continue
        (sheet,) = measured_tables(name, numbers, baseline)
        for form in ("md", "csv"):
            written[folder / f"{model}-{name}.{form}"] = render_sheet(sheet, form)
    for file, text in written.items():
        file.write_text(text + "\n", encoding="utf-8")
    return list(written)


def _figures(folder: Path, model: str, runs: list[RunDirectory]) -> list[Path]:
    (folder / "figures").mkdir(exist_ok=True)
    costs = folder / f"costs-{model}.json"
    micro = any(run.summary and run.summary["micro"] for run in runs)
    files = []
    for axis in AXES:
        if axis in IN_COSTS and not costs.is_file():
            notice(f"{model}: no {costs.name}, so no figure over {axis}")
            continue
        found = points(runs, axis, read_costs(costs) if axis in IN_COSTS else None)
        both = [folder / "figures" / f"{model}-{axis}.{form}" for form in ("png", "svg")]
        draw(found, axis, both, micro)
        files += both
    return files
