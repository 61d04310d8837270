"""The tables of the papers: which rows and columns, and what each column asks for.

Columns name a benchmark and the protocol its scores must have been measured under, so the same
tables serve published and measured numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Column:
    """A column of scores.

    Attributes
    ----------
    heading : str
        What is printed above it.
    task, protocol : str
        Benchmark, and how it is scored, in the words of the published numbers.
    metric : str, optional
        Needed where a task has several figures.
    """

    heading: str
    task: str
    protocol: str
    metric: str | None = None


@dataclass(frozen=True)
class Average:
    """A column of averages, computed from the scores of its row.

    Attributes
    ----------
    heading, metric, protocol : str
        What is printed above it; metric and protocol as in the published numbers.
    over : tuple of str
        Headings of the columns that enter; all if empty.
    low : str, optional
        Method whose row is the lower reference; without one the average is of score / full.
    """

    heading: str
    metric: str = "percent of full"
    protocol: str = "mean of ratios"
    over: tuple[str, ...] = ()
    low: str | None = None


@dataclass(frozen=True)
class Part:
    """Published numbers that a table takes in; what is not given may be anything."""

    table: str
    paper: str | None = None
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaperTable:
    """A table.

    Attributes
    ----------
    name, caption : str
        How it is asked for, and its title.
    parts : tuple of Part
        Where its published rows come from.
    columns : tuple of Column
        Its scores.
    averages : tuple of Average
        Averages, printed behind the scores.
    by_tokens : bool
        Order the rows by budget and name who measured them.
    varied : tuple of str
        For ablations: patterns of the changed options that its measured rows may have, as
        ``"alpha=*"``; empty for a table of all methods.
    remarks : tuple of str
        Lines that belong below it.
    """

    name: str
    caption: str
    parts: tuple[Part, ...]
    columns: tuple[Column, ...]
    averages: tuple[Average, ...] = ()
    by_tokens: bool = False
    varied: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def takes(self, label: str) -> bool:
        """Whether a measured row belongs here, by its label (`etcbench.measured.label_of`)."""
        if not self.varied:
            return True
        method, _, inside = label.removesuffix("]").partition("[")
        if method in ("full", "blind"):
            return True
        changed = inside.split(", ") if inside else []
        return method == "etc" and all(
            any(fnmatchcase(option, pattern) for pattern in self.varied) for option in changed
        )


MMBENCH = Column("MMBench (circular)", "mmbench_en", "circular")
MMBENCH_EN = Column("MMB-EN (per row)", "mmbench_en", "per_row")
MMBENCH_CN = Column("MMB-CN (per row)", "mmbench_cn", "per_row")
MME = Column("MME (total)", "mme", "total")
MME_P = Column("MME (perception)", "mme", "perception")
SEED = Column("SEED (all)", "seedbench", "all")
SEED_I = Column("SEED (image)", "seedbench", "image")
SQA = Column("SQA (img)", "scienceqa", "img")
VQAV2 = Column("VQAv2 (test-dev)", "vqav2", "test-dev")
QBENCH = Column("QBench (dev)", "qbench", "dev")
GQA = Column("GQA", "gqa", "testdev-balanced")
POPE = Column("POPE (F1)", "pope", "f1")
TEXTVQA = Column("TextVQA (OCR tokens)", "textvqa", "val, OCR tokens")
TEXTVQA_PLAIN = Column("TextVQA", "textvqa", "not stated")
CAPTION_A = Column("RefCOCO testA (CIDEr)", "refcoco_caption_testA", "cider")
CAPTION_B = Column("RefCOCO testB (CIDEr)", "refcoco_caption_testB", "cider")

_RETENTION = "(score - low) / (full - low)"
_ABLATION = "Qwen3-VL-2B, one token"
_AVERAGES = (
    Average("avg %"),
    Average("retention %", "retention", _RETENTION, low="blind"),
)
_ABOUT_AVERAGES = (
    "avg %: mean over the columns of score / full, as the paper averages. retention %: mean of "
    "(score - low) / (full - low), as VoCo averages, with low = blind. Both are computed from the "
    "printed scores.",
)
_SIX = tuple(column.heading for column in (GQA, MMBENCH, MME, SQA, VQAV2, TEXTVQA))
_FOUR = tuple(column.heading for column in (MMBENCH, GQA, VQAV2, SEED))


def _efficiency(heading: str, metric: str) -> Column:
    return Column(heading, "efficiency", "as printed, scope not stated", metric)


def _ablation(number: int, caption: str, varied: tuple[str, ...], *columns: Column) -> PaperTable:
    return PaperTable(
        f"etc-{number}",
        f"ETC, Table {number}: {caption}; {_ABLATION}",
        (Part(f"Table {number}", "etc"),),
        columns,
        varied=varied,
    )


_TABLES = (
    PaperTable(
        "etc-1",
        "ETC, Table 1: LLaVA-1.5-7B",
        (Part("Table 1", "etc"),),
        (MMBENCH, MME, SEED, SQA, VQAV2),
        _AVERAGES,
        remarks=_ABOUT_AVERAGES,
    ),
    PaperTable(
        "etc-2",
        "ETC, Table 2: Qwen3-VL-2B",
        (Part("Table 2", "etc"),),
        (SQA, MMBENCH_CN, MMBENCH_EN, MME, SEED_I, QBENCH),
        _AVERAGES,
        remarks=_ABOUT_AVERAGES,
    ),
    PaperTable(
        "etc-3",
        "ETC, Table 3: RefCOCO region captions, Qwen3-VL-2B",
        (Part("Table 3", "etc"),),
        (CAPTION_A, CAPTION_B),
    ),
    PaperTable(
        "etc-4",
        "ETC, Table 4: efficiency, Qwen3-VL-2B",
        (Part("Table 4", "etc"),),
        (
            _efficiency("KV cache, MB", "kv_cache_mb"),
            _efficiency("change %", "kv_cache_change_percent"),
            _efficiency("time, ms", "time_ms"),
            _efficiency("change % (time)", "time_change_percent"),
            _efficiency("TFLOP", "tflop"),
            _efficiency("change % (TFLOP)", "tflop_change_percent"),
        ),
        remarks=("The paper does not say what time and FLOPs cover.",),
    ),
    _ablation(
        5, "alpha, weight of the attention", ("alpha=*",), SQA, MMBENCH_CN, MMBENCH_EN, QBENCH
    ),
    _ablation(
        6, "lambda, weight of the VID loss", ("lambda_vid=*",), SQA, MMBENCH_CN, MMBENCH_EN, QBENCH
    ),
    # without its weight the objective is the cross-entropy alone
    _ablation(7, "objective", ("auxiliary=*", "lambda_vid=0", "lambda_vid=0.0"), SQA, MME, QBENCH),
    _ablation(8, "layer of the VID loss", ("layer=*", "z_layer=*"), SQA, MMBENCH_EN, MME),
    _ablation(9, "decoder", ("decoder=*",), SQA, MMBENCH_EN, MME),
    PaperTable(
        "etc-fig3",
        "ETC with one token against selective methods with 64, LLaVA-1.5-7B",
        (
            Part("Figure 3", "etc"),
            Part("selective", tokens=("576", "64")),
            Part("selective re-run", tokens=("64",)),
        ),
        (GQA, MMBENCH, SEED),
        by_tokens=True,
        remarks=(
            "Of the figure only ETC's values are printed; the others are those of the methods' "
            "own papers, of the first paper that measured them, or of an independent re-run.",
        ),
    ),
    PaperTable(
        "etc-fig4",
        "ETC over token budgets, Qwen3-VL-2B",
        (Part("Figure 4", "etc"),),
        (SQA, TEXTVQA_PLAIN),
        remarks=("Only the values that the figure or its text prints.",),
    ),
    PaperTable(
        "selective",
        "Selective methods at 192, 128 and 64 tokens, LLaVA-1.5-7B",
        (Part("selective"), Part("selective re-run")),
        (GQA, MMBENCH, MME, POPE, SQA, VQAV2, TEXTVQA, SEED),
        (Average("avg % of 6", over=_SIX),),
        by_tokens=True,
        remarks=(
            "avg % of 6: mean of score / full over the columns that TwigVLM averages (without "
            "POPE and SEED), computed from the printed scores.",
        ),
    ),
    PaperTable(
        "voco",
        "VoCo-LLaMA: LLaVA-1.5-7B",
        (Part("main results", "voco-llama"),),
        (GQA, MMBENCH, MME_P, POPE, SEED, SQA, VQAV2),
        (
            Average("retention % of 7", "retention", _RETENTION, low="lower bound"),
            Average("retention % of 4", "retention", _RETENTION, over=_FOUR, low="lower bound"),
        ),
        remarks=(
            "retention %: mean of (score - low) / (full - low), with low = lower bound, computed "
            "from the printed scores over all columns and over MMBench, GQA, VQAv2 and SEED.",
        ),
    ),
)
PAPER_TABLES: dict[str, PaperTable] = {table.name: table for table in _TABLES}
