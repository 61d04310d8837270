"""Figures of `etcbench measure`: counts from sizes, Table 4, times, memory, the command."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import cli  # noqa: F401 - a fixture
from tiny import save_tiny_qwen3_vl, tiny_llava

import etcbench
from etcbench import registry
from etcbench.budget import Budget
from etcbench.compressor import Compressor
from etcbench.efficiency import phases as phases_module
from etcbench.efficiency.closed_form import Request, close, kv_bytes
from etcbench.efficiency.measure import measure_all
from etcbench.efficiency.memory import PEAK_RESET, peaks_on_cpu
from etcbench.efficiency.methods import build
from etcbench.efficiency.paper import READINGS, TABLE_4, Reading, table_4
from etcbench.efficiency.phases import PHASES, Spread, Stopwatch, Timed, throughput
from etcbench.efficiency.requests import Trial, Workload
from etcbench.efficiency.shapes import KNOWN, Shape, has_weights
from etcbench.errors import UsageError

LLAVA, QWEN = "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen3-VL-2B-Instruct"
SMALL = Workload(picture=(24, 24), new_tokens=3)


def form_of(model: str, name: str, tokens: str | None = None, **options: Any) -> Any:
    shape = Shape.named(model)
    budget = None if tokens is None else Budget.parse(tokens)
    method = registry.load("baselines", name).from_budget(budget, shape.spec, **options)
    return close(shape, method, Request(shape.raster(768, 768), 35, 0, 25))


# Spec selective 1.4, LLaVA-1.5-7B: tera-MAC of the decoder on visual tokens alone.
FLOP_TABLE = [
    ("full", None, {}, 3.817),
    *[("visionzip", n, {}, v) for n, v in (("192", 1.253), ("128", 0.833), ("64", 0.416))],
    *[("random", n, {}, v) for n, v in (("192", 1.253), ("128", 0.833), ("64", 0.416))],
    ("fastv", None, {"ratio": 0.5}, 2.007),
    *[("fastv", f"kept:{n}", {}, v) for n, v in ((166, 1.253), (98, 0.836), (30, 0.421))],
    *[("fastv", n, {}, v) for n, v in (("192", 1.253), ("128", 0.836), ("64", 0.421))],
    *[
        ("fastv", f"kept:{n}", {"layer": 3}, v)
        for n, v in ((144, 1.208), (152, 1.255), (82, 0.841), (11, 0.422))
    ],
    ("pdrop", "270", {}, 1.777),
    *[
        ("sparsevlm", n, {}, v)
        for n, v in (("192", 1.353), ("128", 0.954), ("96", 0.749), ("64", 0.541))
    ],
    *[
        ("sparsevlm", n, {"version": "2.0"}, v)
        for n, v in (("192", 1.355), ("128", 0.945), ("96", 0.748), ("64", 0.538))
    ],
    *[("twigvlm", n, {}, v) for n, v in (("192", 1.259), ("128", 0.838), ("64", 0.421))],
    *[
        ("lightkv", None, {"layers": "12-18-24", "first_short_layer": first}, v)
        for first, v in (("listed", 2.08), ("next", 2.19))
    ],
    *[("explainc", n, {}, v) for n, v in (("192", 1.253), ("128", 0.833), ("64", 0.416))],
]


@pytest.mark.parametrize("name, tokens, options, printed", FLOP_TABLE)
def test_flop_table_of_the_selective_methods(
    name: str, tokens: str | None, options: dict[str, Any], printed: float
) -> None:
    """To 0.1 %, or to the last digit that the table prints where that is more."""
    found = form_of(LLAVA, name, tokens, **options).visual_macs / 1e12
    digit = 10.0 ** -len(str(printed).partition(".")[2])
    assert abs(found - printed) <= max(0.001 * printed, digit / 2)


def test_the_table_in_the_docs_is_what_is_counted() -> None:
    """To its last digit; nobody reads it again when a price changes."""
    text = (Path(__file__).parents[1] / "docs" / "efficiency.md").read_text(encoding="utf-8")
    lines = text.partition("60 text tokens (`--closed-form`):")[2].split("\n\n")[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert len(rows) == 7
    for name, tokens, *printed in rows:
        method = {"PyramidDrop": "pdrop"}.get(name, name.lower())
        form = etcbench.measure(LLAVA, method, tokens or None).form
        macs = form.macs
        found = [sum(form.kv_bytes("bfloat16")) / 2**20, form.peak_kv_bytes("bfloat16") / 2**20]
        found += [2 * part / 1e12 for part in (macs.method, macs.total, macs.again)]
        for text, value in zip(printed, [*found, form.visual_macs / 1e12], strict=True):
            digit = 10.0 ** -len(text.partition(".")[2])
            assert abs(value - float(text)) <= digit / 2 + 1e-12, (name, text, value)


def test_twig_costs_three_full_layers_more() -> None:
    """Spec selective 7.3: 1.616, 1.196 and 0.779 with the twig, on visual tokens alone."""
    shape = Shape.named(LLAVA)
    for tokens, printed in ((192, 1.616), (128, 1.196), (64, 0.779)):
        method = registry.load("baselines", "twigvlm").from_budget(Budget(tokens), shape.spec)
        form = close(shape, method, Request((24, 24), 0, 0, 0))
        rows = form.case.score_rows(1, 576, keys_of=576)
        assert (form.visual_macs + form.macs.method - rows) / 1e12 == pytest.approx(printed, 1e-3)


def test_kv_figures_of_both_backbones() -> None:
    """Spec abstractive 0.2 and selective 1.2: bytes that a token takes in half precision."""
    for model, per_token in ((LLAVA, 524_288), (QWEN, 114_688)):
        spec = Shape.named(model).spec
        assert spec.layers * kv_bytes(spec, 1, "bfloat16") == per_token
    assert sum(form_of(LLAVA, "full").kv_bytes("float16")) == (576 + 60) * 524_288
    spec = Shape.named("llava-hf/llava-1.5-13b-hf").spec
    assert spec.layers * kv_bytes(spec, 1, "float16") == 800 * 1024
    etc = form_of(LLAVA, "etc", "1")
    # Hidden prefix (register E9): of 60 text tokens, those behind the picture and one learned.
    assert etc.cached == (25 + 1,) * 32
    assert etc.peak_kv_bytes("float16") == (576 + 60 + 1) * 524_288
    assert sum(form_of(QWEN, "etc", "1").kv_bytes("float32")) == 61 * 2 * 114_688


def test_sizes_of_the_towers() -> None:
    """CLIP ViT-L/14-336 takes 0.38 TFLOP a picture, Qwen's tower four patches a token."""
    tower = Shape.named(LLAVA).tower((24, 24))
    assert 2 * tower.encode / 1e12 == pytest.approx(0.382, abs=5e-4)
    assert tower.project == 1024 * 4096 + 4096**2
    qwen = Shape.named(QWEN)
    assert qwen.raster(1024, 512) == (16, 32)
    assert qwen.tower((32, 32)).attention == 24 * 2 * 4096**2 * 1024


def test_a_further_question_costs_what_the_method_cannot_share() -> None:
    full, fast, zipped = (
        form_of(LLAVA, *which).macs for which in (("full",), ("fastv", "192"), ("visionzip", "192"))
    )
    assert zipped.again < full.again < fast.again < fast.total
    assert fast.again == fast.question + fast.head + fast.method


def test_table_4() -> None:
    """All that sizes give is within 2.1 % of the paper's figures, or 1.1 points."""
    rows = {(row.method, row.metric): row for row in table_4()}
    assert len(rows) == 9
    assert rows["full", "kv_cache_mb"].published == 223.54
    assert rows["etc", "tflop"].residual == pytest.approx(1.3646 / 1.37 - 1, abs=1e-4)
    for (_, metric), row in rows.items():
        if metric.startswith("time"):
            assert row.residual is None
        else:
            assert row.residual is not None
            assert abs(row.residual) < (1.1 if metric.endswith("percent") else 0.021)


def test_the_reading_of_table_4_is_the_nearest() -> None:
    """Of all that were tried; the next one misses a figure by twice as much."""

    def worst(reading: Reading) -> float:
        rows = [row for row in table_4(reading) if row.metric == "tflop"]
        return max(abs(row.residual or 0) for row in rows)

    ranked = sorted(READINGS, key=worst)
    assert len(set(READINGS)) == len(READINGS) == 54
    assert ranked[0] == TABLE_4
    assert worst(ranked[1]) > 1.9 * worst(TABLE_4)


def test_models_by_name(tmp_path: Path) -> None:
    for name in KNOWN:
        assert not has_weights(name) or (tmp_path / name).exists()
        assert Shape.named(name).spec.name == name.partition("/")[2]
    assert has_weights("micro-llava")
    with pytest.raises(UsageError, match="did you mean micro-llava"):
        Shape.named("micro-lava")
    with pytest.raises(UsageError, match=r"no config\.json"):
        Shape.named(str(tmp_path))
    save_tiny_qwen3_vl(tmp_path / "tiny")
    assert has_weights(str(tmp_path / "tiny"))
    assert Shape.named(str(tmp_path / "tiny")).spec.layers == 4


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    spread = Spread.of([float(n) for n in range(11)])
    assert (spread.median, spread.p10, spread.p90, spread.n) == (5.0, 1.0, 9.0, 11)


def test_a_stopwatch_gives_each_phase_its_own_time() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with watch.phase("outer"):
        with watch.phase("inner"):
            time.sleep(0.02)
        time.sleep(0.01)
    own, whole = watch.read()
    assert whole["inner"] >= 20 and whole["outer"] >= 30
    assert own["outer"] == pytest.approx(whole["outer"] - whole["inner"])
    assert watch.read() == ({}, {})


def test_only_hooks_of_a_method_are_timed() -> None:
    class Slow(Compressor):
        def select_hidden(self, state: Any) -> None:
            time.sleep(0.01)

    watch = Stopwatch(torch.device("cpu"))
    timed = Timed(Slow(), watch)
    assert timed.reuse == "prefix" and timed.select_hidden(None) is None
    assert watch.read()[1]["compress"] >= 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_llava(tmp_path_factory.mktemp("measured"))


def test_measuring_a_loaded_model(model: Any) -> None:
    """Every phase is timed, and the parts do not exceed the whole."""
    methods = [build("full", None, model), build("fastv", "20", model), build("etc", "1", model)]
    found = measure_all(model, methods, SMALL, ("latency",), repeats=2, warmup=1)
    assert [m.label for m in found] == ["full", "fastv 20", "etc 1"]
    for m in found:
        assert m.kv_bytes == m.form.kv_bytes("float32")
        assert set(m.latency) == set(PHASES) and all(s.n == 2 for s in m.latency.values())
        parts = sum(m.latency[name].p10 for name in ("vision", "compress", "prefill"))
        assert 0 < parts <= m.latency["first token"].p90
        figures = m.figures()
        assert len({row["figure"] for row in figures}) == len(figures)
        assert {(r["convention"], r["dtype"], r["attention"]) for r in figures} == {
            ("etcbench", "float32", "sdpa")
        }
    assert found[1].latency["compress"].median > found[0].latency["compress"].median
    assert (found[0].untrained, found[2].untrained) == (False, True)
    with pytest.raises(UsageError, match="unknown phase"):
        measure_all(model, methods, SMALL, ("latncy",))  # type: ignore[arg-type]


def test_measure_from_python(model: Any) -> None:
    alone = etcbench.measure(LLAVA, "fastv", 192)
    assert alone.attention == "none" and not alone.latency
    assert alone.form.layer_average == pytest.approx(191.6, abs=0.05)
    run = etcbench.measure(model, "random", 9, workload=SMALL, repeats=1, warmup=0)
    assert run.form.entering == 9 and run.latency["per token"].median > 0


def test_every_answer_of_a_batch_has_its_own_picture(model: Any) -> None:
    pixels = Trial(model, build("full", None, model).compressor, SMALL, batch=3).pixels
    assert len(set(pixels.keys)) == 3
    assert not torch.equal(pixels.tensors["pixel_values"][0], pixels.tensors["pixel_values"][1])


def test_throughput_doubles_until_it_does_not_help(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build("full", None, model).compressor
    real = throughput(model, method, SMALL, repeats=1, largest=2)
    assert set(real.tried) == {1, 2} and real.answers.median == max(real.tried.values())

    def rates(*values: float, words: str = "") -> None:
        given = iter(values)

        def next_rate(trial: Trial, repeats: int) -> Spread:
            if (value := next(given)) < 0:
                raise RuntimeError(words)
            return Spread.of([value])

        monkeypatch.setattr(phases_module, "_answers_per_second", next_rate)

    rates(1, 2, 1.9, 4, 4.1, 4.0)  # one that does not help is chance, two are not
    found = throughput(model, method, SMALL)
    assert (found.batch, set(found.tried)) == (16, {1, 2, 4, 8, 16, 32})
    assert found.end == "neither a batch of 16 nor of 32 helps"
    for words in ("not enough memory: you tried to", "DefaultCPUAllocator: can't allocate memory"):
        rates(1, 2, -1, words=words)
        assert throughput(model, method, SMALL).end == "no memory for a batch of 4"


@pytest.mark.skipif(not os.access(PEAK_RESET, os.W_OK), reason="peak memory is not reported here")
def test_peak_memory_in_a_fresh_process(tmp_path: Path) -> None:
    """256 tokens need more than 4 of them."""
    methods = {"all": ("full", None, {}), "few": ("downsample", "4", {})}
    save_tiny_qwen3_vl(tmp_path)
    peaks = peaks_on_cpu(str(tmp_path), methods, Workload((64, 64)), "float32", "sdpa", 1)
    assert peaks is not None
    assert peaks["all"].growth > peaks["few"].growth + 2**20
    assert peaks["few"].resident > 2**26


# The command ----------------------------------------------------------------------------------


def test_command_without_weights(cli: Any) -> None:  # noqa: F811
    result = cli("measure", "--method", "full,fastv", "--tokens", "192", "--model", LLAVA)
    assert result.code == 0
    assert "2 x 636, 30 x 226" in result.out and "3.817" in result.out
    assert "weights are not on this machine" in result.out
    convention = ("--convention", "paper", "--json")
    paper = cli("measure", "--method", "etc", "--tokens", "1", "--closed-form", *convention)
    content = json.loads(paper.out)
    assert paper.code == 0 and len(content["table_4"]) == 9
    assert {row["convention"] for row in content["figures"] + content["table_4"]} == {"paper"}
    assert {row["dtype"] for row in content["figures"] + content["table_4"]} == {"float32"}


def test_command_on_a_model(cli: Any, model: Any) -> None:  # noqa: F811
    path = model.model.name_or_path
    how = ("--model", path, "--phases", "latency", "--repeats", "1", "--warmup", "0")
    result = cli("measure", "--method", "full,pool,etc", "--tokens", "9", *how, "--json")
    assert result.code == 0
    content = json.loads(result.out)
    cache = [row for row in content["figures"] if row["figure"] == "kv cache"]
    assert [row["method"] for row in cache] == ["full", "pool", "etc"]
    assert all(sum(row["layers"]) == row["value"] for row in cache)
    assert content["not_measured"] == []
    table = cli("measure", "--method", "full,fastv", "--tokens", "9", *how)
    assert table.code == 0 and "first token ms" in table.out
    assert "not measured: fastv 9" in table.err and "can serve" in table.err


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("--method", "fastw"), "unknown method 'fastw'; did you mean fastv"),
        (("--method", "fastv"), "needs a budget: add --tokens N"),
        (("--method", "fastv", "--tokens", "600"), "has only 576 visual tokens"),
        (("--method", "full", "--phases", "latency,speed"), "unknown phase 'speed'"),
        (("--method", "full", "--phases", "none,latency"), "--phases none stands alone"),
        (("--method", "full", "--phases", "latency", "--closed-form"), "so --phases means nothing"),
        (("--method", "full", "--checkpoint", "a", "--closed-form"), "so --checkpoint means noth"),
        (("--method", "full", "--convention", "papers"), "did you mean paper?"),
        (("--method", "full", "--picture", "768"), "--picture '768' is not of the form"),
        (("--method", "full", "--picture", "0x9"), "at least one pixel"),
        (("--method", "full", "--text", "35,25"), "not of the form BEFORE+BEHIND"),
        (("--method", "full", "--dtype", "int4"), "unknown dtype 'int4'"),
        (("--method", "full", "--repeats", "0"), "repeats"),
        (("--method", ","), "name at least one --method"),
    ],
)
def test_wrong_usage(cli: Any, arguments: tuple[str, ...], complaint: str) -> None:  # noqa: F811
    assert complaint in cli("measure", "--model", LLAVA, *arguments).complaint


def test_wrong_model(cli: Any) -> None:  # noqa: F811
    result = cli("measure", "--method", "full", "--model", "micro-lava")
    assert "unknown model 'micro-lava'" in result.complaint
