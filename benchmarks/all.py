"""Run the benchmarks of the engine; write a json each, and README.md over all, to results/.

Those of one method or of scoring run by themselves: speculative, vid_cost, explainc_gates, scoring.

Run ``python benchmarks/all.py`` on a machine that does nothing else; about half an hour on two
cores. ``--only throughput,costs`` runs some of them; ``--table`` only writes README.md anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NAMES = ("throughput", "overhead", "costs", "scaling", "samples", "pictures")


def cell(value: Any) -> str:
    """Write a figure; of repeated ones the median with the extremes."""
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:g} ({value['min']:g} to {value['max']:g}, n={value['n']})"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(entry)}" for key, entry in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Write records of the same form as a markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("|" + "---|" * len(names))
    return lines + ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in rows]


def readme() -> str:
    """Write all results as one document."""
    lines = [
        "# Results of the benchmarks",
        "",
        "Written by `python benchmarks/all.py`; each script says what it measures. Medians with",
        "the smallest and largest round. `wall` is the clock, `cpu` the processor time of the",
        "process, which other programs on the machine disturb less; `load` says how many there",
        "were. Micro models and data: comparable with nothing else.",
    ]
    for name in NAMES:
        if not (RESULTS / f"{name}.json").is_file():
            continue
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        lines += ["", f"## {result.pop('benchmark')}", ""]
        tables = {key: value for key, value in result.items() if isinstance(value, list)}
        for key, value in result.items():
            if key not in tables:
                lines.append(f"* {key.replace('_', ' ')}: {cell(value)}")
        for key, rows in tables.items():
            if rows and isinstance(rows[0], dict):
                lines += ["", f"### {key.replace('_', ' ')}", "", *table(rows)]
            else:
                lines.append(f"* {key.replace('_', ' ')}: {', '.join(map(str, rows)) or 'none'}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--table", action="store_true")
    chosen, passed_on = parser.parse_known_args()
    failed = []
    for name in [] if chosen.table else chosen.only.split(","):
        print(f"{name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), "--save", *passed_on]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            failed.append(name)
    (RESULTS / "README.md").write_text(readme(), encoding="utf-8")
    print(f"{RESULTS / 'README.md'}; over a limit or broken: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
