"""What selecting costs, and how far measured speed-ups follow the counted ones.

Two models: micro-llava, whose layers are so thin that every Python call shows, and a random LLaVA
with the tokens and the depth of LLaVA-1.5-7B, a quarter as wide. The depth matters: a staged method
pays for its rows at three layers, however many there are; and the width: narrow layers are done
before Python is. A share is the time in the method's hooks over the time of its whole prefill; a
speed-up is the time to the first token of ``full`` over that of the method, beside the ratio of
their counted FLOPs.

Run ``python benchmarks/costs.py``; it exits with 1 when a one-row method costs over 2 % of the
prefill of the wide model.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from _bench import arguments, random_llava, report

from etcbench.backbones import Backbone, load_backbone
from etcbench.efficiency.measure import Measurement, measure_all
from etcbench.efficiency.methods import build
from etcbench.efficiency.requests import Workload
from etcbench.errors import BudgetError

# Methods that recompute the attention of one row, or of none at all.
ONE_ROW = ("fastv", "pdrop", "visionzip", "random", "pool", "downsample", "etc", "voco")
OTHERS = ("sparsevlm", "lightkv")
LIMIT = 0.02
WIDE = {
    "side": 336,
    "patch": 14,
    "layers": 32,
    "kv_heads": 8,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
}
BUDGETS = {"micro-llava": (24, 40), "wide": (192, 288)}
LEARNED = (1, 4)


def shares(found: Measurement) -> dict[str, Any]:
    """Time in the hooks as a share of the prefill, and of the time to the first token."""
    times = {name: spread.median for name, spread in found.latency.items()}
    prefill = times["compress"] + times["prefill"]
    return {
        "method": found.label,
        "share_of_prefill": round(times["compress"] / prefill, 4),
        "share_to_first_token": round(times["compress"] / times["first token"], 4),
        "compress_ms": round(times["compress"], 3),
        "prefill_ms": round(prefill, 3),
    }


def speedup(found: Measurement, full: Measurement) -> dict[str, Any]:
    """Compare counted and measured time to the first token."""
    counted = full.form.macs.total / found.form.macs.total
    own, base = found.latency["first token"], full.latency["first token"]
    # Several questions on a picture pay for it once.
    again, again_base = found.latency["next question"], full.latency["next question"]
    return {
        "method": found.label,
        "counted": round(counted, 3),
        "measured": round(base.median / own.median, 3),
        "measured_low": round(base.p10 / own.p90, 3),
        "measured_high": round(base.p90 / own.p10, 3),
        "next_question_counted": round(full.form.macs.again / found.form.macs.again, 3),
        "next_question_measured": round(again_base.median / again.median, 3),
    }


def measured(model: Backbone, budgets: tuple[int, ...], rounds: int) -> list[Measurement]:
    """Measure every method at every budget in turn, ``full`` first."""
    methods = [build("full", None, model)]
    for name in ONE_ROW + OTHERS:
        for tokens in LEARNED if name in ("etc", "voco") else budgets:
            try:
                methods.append(build(name, str(tokens), model))
            except BudgetError as error:
                print(f"left out: {error}", file=sys.stderr)
    side = model.spec.grid[0] if model.spec.grid else 24
    workload = Workload(picture=(8 * side, 8 * side), new_tokens=2)
    return measure_all(model, methods, workload, ("latency",), rounds, 1)


def main() -> int:
    chosen = arguments(__doc__)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "micro-llava": load_backbone("micro-llava", device="cpu"),
            "wide": load_backbone(str(random_llava(Path(folder) / "wide", **WIDE)), device="cpu"),
        }
        for name, model in models.items():
            full, *found = measured(model, BUDGETS[name], chosen.rounds)
            result[f"selection_{name}"] = [shares(one) for one in found]
            result[f"speedup_{name}"] = [speedup(one, full) for one in found]
    dear = [
        entry["method"]
        for entry in result["selection_wide"]
        if entry["method"].split()[0] in ONE_ROW and entry["share_of_prefill"] > LIMIT
    ]
    report("costs", {"one_row_methods_over_2_percent": dear, **result, "wide": WIDE}, chosen)
    return int(bool(dear))


if __name__ == "__main__":
    sys.exit(main())
