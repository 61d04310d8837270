"""``etcbench reproduce``."""

from __future__ import annotations

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
        Path | None, typer.Option(help="Folder of the runs; default: runs/ beside the plan.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.", min=1)] = 32,
) -> None:
    """Run a whole comparison, or what is missing of it.

    A plan lists methods, budgets, models and benchmarks. The same command again continues where
    it stopped; finished runs are read, not repeated. With another --out everything is measured
    again. Exit code: 0 done, 1 something failed.
    """
    from etcbench.console import notice, quiet_libraries
    from etcbench.plan import load_plan
    from etcbench.plan import reproduce as run_plan
    from etcbench.recorded import results_folder
    from etcbench.sweep import exit_code

    quiet_libraries()
    chosen = load_plan(plan or results_folder("measured") / "micro" / "plan.yaml")
    outcomes = run_plan(chosen, out, batch_size)
    finished = sum(o.run is not None and o.run.finished for o in outcomes)
    for reason in sorted(
        {f"{o.cell.method} {o.cell.tokens}: {o.reason}" for o in outcomes if o.error}
    ):
        notice(f"not run: {reason}")
    print(f"{finished} of {len(outcomes)} cells finished, in {out or chosen.kept}")
    raise typer.Exit(exit_code(outcomes))
