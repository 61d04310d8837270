"""``etcbench reproduce``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from etcbench.cli.app import app, examples


@app.command(
    epilog=examples("etcbench reproduce", "etcbench reproduce my-plan.yaml --batch-size 64")
)
def reproduce(
    plan: Annotated[
        Path | None, typer.Argument(help="Plan (YAML); default: the micro comparison.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; default: that of the plan.")
    ] = None,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Run nothing; draw tables and figures from records.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.", min=1)] = 32,
) -> None:
    """Run a whole comparison, or what is missing of it, and draw its tables and figures.

    A plan lists methods, budgets, models and benchmarks, and may include other plans. The same
    command again continues where it stopped; finished runs are read, not repeated. With another
    --out everything is measured again. Exit code: 0 done, 1 something failed.
    """
    from etcbench.console import notice, quiet_libraries
    from etcbench.places import find_places
    from etcbench.plan import RUNS, load_plan
    from etcbench.plan import reproduce as run_plan
    from etcbench.recorded import results_folder
    from etcbench.redraw import redraw as draw_all
    from etcbench.sweep import exit_code

    quiet_libraries()
    chosen = load_plan(plan or results_folder("measured") / "micro" / "plan.yaml")
    folder = out or chosen.file.parent
    outcomes = []
    for part, inside in chosen.parts(folder):
        if redraw:
            print(*draw_all(inside, part.title, part.baseline), sep="\n")
            continue
        outcomes += run_plan(part, inside / RUNS, batch_size)
        places = find_places(part.sweeps(inside / RUNS, batch_size))
        (inside / "places.json").write_text(json.dumps(places, sort_keys=True) + "\n")
        draw_all(inside, part.title, part.baseline)
    if redraw:
        return
    finished = sum(o.run is not None and o.run.finished for o in outcomes)
    for reason in sorted(
        {f"{o.cell.method} {o.cell.tokens}: {o.reason}" for o in outcomes if o.error}
    ):
        notice(f"not run: {reason}")
    print(f"{finished} of {len(outcomes)} cells finished, in {folder}")
    raise typer.Exit(exit_code(outcomes))
