"""What Table 4 of the ETC paper (arXiv 2606.00543) appears to count.

The paper states neither what its FLOPs and its cache contain nor in which precision. Of the
readings that were tried (docs/efficiency.md lists them) this one is nearest to all of its figures
and is what a counter that looks at modules reports:

* the KV cache is float32 and its MB are 2**20 bytes;
* a multiply-accumulate counts once, not twice;
* linear and convolution layers count, products of attention do not;
* the vision tower counts, and the head at every position, not at the last alone;
* a token that is not in the cache behind the prefill does not count in the decoder: the pass that
  reads the picture's visual tokens into the compressed ones is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from etcbench import registry
from etcbench.budget import Budget
from etcbench.costs import layer_macs
from etcbench.efficiency.closed_form import ClosedForm, Request, close
from etcbench.efficiency.shapes import Shape
from etcbench.published import load_published

MODEL = "Qwen/Qwen3-VL-2B-Instruct"
DTYPE, MIB, TERA = "float32", 2**20, 1e12
# 975 visual and 47 text tokens fit both entries of the cache column; 25 x 39 patches are 975.
REQUEST = Request(grid=(25, 39), before=4, bridge=0, after=43)


@dataclass(frozen=True)
class Reading:
    """One way to understand what a table counts.

    Attributes
    ----------
    flops_per_mac : int
        1 or 2.
    tower, tower_attention : bool
        Whether the vision tower counts, and its products of attention.
    attention : float
        Share of the decoder's products of attention that counts: none, the half that causality
        leaves, or all.
    head : {"all", "last", "none"}
        Positions at which the head counts.
    """

    flops_per_mac: int = 1
    tower: bool = True
    tower_attention: bool = False
    attention: float = 0.0
    head: Literal["all", "last", "none"] = "all"


TABLE_4 = Reading()
READINGS = tuple(
    Reading(flops_per_mac, tower, tower and tower_attention, attention, head)
    for flops_per_mac in (1, 2)
    for tower, tower_attention in ((True, False), (True, True), (False, False))
    for attention in (0.0, 0.5, 1.0)
    for head in get_args(Literal["all", "last", "none"])
)


@dataclass(frozen=True)
class PaperFigures:
    """Cache and cost of a method as Table 4 appears to count them."""

    kv_mib: float
    tera_flops: float


def paper_figures(form: ClosedForm, vocabulary: int, reading: Reading = TABLE_4) -> PaperFigures:
    """Count a method on a request as the paper appears to."""
    spec, macs = form.case.spec, form.macs
    per_pair = 2 * spec.heads * spec.head_dim
    per_token = layer_macs(spec, 1, 0)
    decoder = sum(n * per_token + reading.attention * n * n * per_pair for n in form.cached)
    positions = {"all": form.cached[-1], "last": 1, "none": 0}[reading.head]
    vision = macs.tower + macs.projector
    if macs.tower and not reading.tower_attention:
        vision -= form.case.tower.attention
    total = reading.tower * vision + decoder + positions * spec.hidden * vocabulary
    kv_mib = sum(form.kv_bytes(DTYPE)) / MIB
    return PaperFigures(kv_mib, reading.flops_per_mac * total / TERA)


@dataclass(frozen=True)
class Residual:
    """A figure of Table 4 beside ours.

    Attributes
    ----------
    method, metric : str
        Row and column of the table.
    published : float
        As printed.
    counted : float or None
        By the reading above; None for a time, which sizes do not give.
    """

    method: str
    metric: str
    published: float
    counted: float | None

    @property
    def residual(self) -> float | None:
        """(counted - published) / published; for a change in percent, percentage points."""
        if self.counted is None:
            return None
        if self.metric.endswith("percent"):
            return self.counted - self.published
        return self.counted / self.published - 1


def table_4(reading: Reading = TABLE_4) -> list[Residual]:
    """Count what Table 4 measures and put it beside the published figures."""
    shape = Shape.named(MODEL)
    counted: dict[tuple[str, str], float] = {}
    for name, budget in (("full", None), ("etc", Budget(1))):
        method = registry.load("baselines", name).from_budget(budget, shape.spec)
        figures = paper_figures(close(shape, method, REQUEST), shape.vocabulary, reading)
        counted[name, "kv_cache_mb"] = figures.kv_mib
        counted[name, "tflop"] = figures.tera_flops
    for column, change in (("kv_cache_mb", "kv_cache"), ("tflop", "tflop")):
        ratio = counted["etc", column] / counted["full", column]
        counted["etc", f"{change}_change_percent"] = 100 * (ratio - 1)
    return [
        Residual(method, metric, value, counted.get((method, metric)))
        for method, metric, value in _published()
    ]


def _published() -> list[tuple[str, str, float]]:
    """Rows of Table 4 in `results/published`."""
    return [
        (number.method, number.metric, float(number.value))
        for number in load_published()
        if (number.paper, number.table) == ("etc", "Table 4")
    ]
