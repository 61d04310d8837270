from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import pytest

import etcbench.recorded
from etcbench.errors import UsageError
from etcbench.paper_sheets import mean_of_ratios, published_table, retention
from etcbench.paper_tables import PAPER_TABLES, Column
from etcbench.published import Published, load_published
from etcbench.tables import HEADING, Sheet

ETC_AVERAGES = {
    "etc-1": {("etc", "4"): "95.33", ("etc", "2"): "94.55", ("etc", "1"): "92.22"},
    "etc-2": {
        ("llama-vid", "4"): "37.36",
        ("quecc", "4"): "37.47",
        ("voco", "4"): "90.75",
        ("etc", "4"): "95.68",
        ("llama-vid", "2"): "37.15",
        ("voco", "2"): "88.85",
        ("etc", "2"): "94.02",
        ("quecc", "1"): "37.43",
        ("voco", "1"): "86.93",
        ("etc", "1"): "93.15",
    },
}


def row(sheet: Sheet, method: str, tokens: str, **more: str) -> dict[str, str]:
    wanted = {
        "method": method,
        "tokens": tokens,
        **{k.replace("_", " "): v for k, v in more.items()},
    }
    found = [r for r in sheet.frame.to_dict("records") if wanted.items() <= r.items()]
    assert len(found) == 1, (wanted, found)
    return found[0]


def marked(sheet: Sheet, text: str) -> list[tuple[int, int]]:
    """Cells that carry the note with this text."""
    (number,) = [n for n, note in enumerate(sheet.notes, 1) if text in note]
    return sorted(place for place, numbers in sheet.marks.items() if number in numbers)


# averages


@pytest.mark.parametrize("name", ETC_AVERAGES)
def test_the_averages_of_the_paper_come_out_of_its_scores(name: str) -> None:
    sheet = published_table(name)
    shown = {(r["method"], r["tokens"]): r["avg %"] for r in sheet.frame.to_dict("records")}
    printed = {
        (n.method, n.tokens): n.value
        for n in load_published()
        if (n.paper, n.table, n.task) == ("etc", f"Table {name[-1]}", "average")
    }
    for key, value in ETC_AVERAGES[name].items():
        assert shown.pop(key) == printed.pop(key) == value, key
    # the two reference rows are averages too; every other row lacks a score or mixes two scales
    assert printed == {("full", "576" if name == "etc-1" else "all"): "100"}
    assert {key for key, value in shown.items() if value != "-"} == {*printed, ("blind", "0")}
    assert row(sheet, "blind", "0")["avg %"] == {"etc-1": "52.96", "etc-2": "55.09"}[name]


def test_a_row_that_mixes_protocols_has_no_average() -> None:
    voco = row(published_table("etc-1"), "voco", "1")
    assert voco["MME (total)"] == "1323.30 (perception)"
    assert "-" not in [value for key, value in voco.items() if not key.endswith("%")]
    assert voco["avg %"] == voco["retention %"] == "-"


def test_retention_is_the_rejected_reading_of_the_paper_s_average() -> None:
    assert row(published_table("etc-1"), "etc", "4")["retention %"] == "89.67"


@pytest.mark.parametrize(
    ("tokens", "printed"),
    [("128", "97.7"), ("64", "93.7"), ("32", "92.6"), ("16", "91.3")],
)
def test_voco_s_retention_over_four_benchmarks(tokens: str, printed: str) -> None:
    value = row(published_table("voco"), "voco", tokens)["retention % of 4"]
    assert float(value) == pytest.approx(float(printed), abs=0.051)


def test_voco_s_retention_with_one_token() -> None:
    sheet = published_table("voco")
    voco = row(sheet, "voco", "1")
    assert voco["retention % of 7"] == "83.69"  # printed as 83.7
    assert f"{float(voco['retention % of 4']):.1f}" == "83.8"
    assert row(sheet, "q-former", "1")["retention % of 7"] == "57.22"
    assert row(sheet, "avg-pool+linear", "1")["retention % of 7"] == "64.09"
    at = list(sheet.frame.columns).index("retention % of 7")
    assert not [place for place in sheet.marks if place[1] == at], "nothing to correct"


def test_an_average_that_differs_from_the_printed_one_says_so() -> None:
    sheet = published_table("voco")
    at = list(sheet.frame.columns).index("retention % of 4")
    assert [column for _, column in marked(sheet, "the paper prints 90.4")] == [at]


@pytest.mark.parametrize("method", ["twigvlm", "twigvlm++"])
def test_twigvlm_s_averages_come_out_of_its_scores(method: str) -> None:
    sheet = published_table("selective")
    printed = [
        n
        for n in load_published()
        if (n.paper, n.table, n.method, n.task) == ("twigvlm", "main results", method, "average")
    ]
    assert len(printed) == 3
    for number in printed:
        value = row(sheet, method, number.tokens)["avg % of 6"]
        assert f"{float(value):.1f}" == number.value


def test_averages_are_means_of_ratios() -> None:
    assert mean_of_ratios([50, 1000], [100, 1000]) == 75
    assert mean_of_ratios([2, 1], [1, 1]) == 150, "no clipping"
    assert retention([60, 30], [20, 10], [100, 30]) == 75
    assert retention([20], [20], [100]) == 0
    with pytest.raises(ValueError, match="zip"):
        mean_of_ratios([1, 2], [1])


# the numbers


def test_no_number_is_given_twice() -> None:
    keys = Counter(
        (n.paper, n.table, n.method, n.model, n.tokens, n.task, n.metric) for n in load_published()
    )
    assert [key for key, times in keys.items() if times > 1] == []


def test_every_number_is_a_number_with_protocol_and_source() -> None:
    numbers = load_published()
    assert len(numbers) > 1000
    for number in numbers:
        float(number.value)
        blank = [name for name, text in vars(number).items() if name != "note" and not text.strip()]
        assert not blank, number
        assert all(text == text.strip() and text.isascii() for text in vars(number).values())


def test_methods_and_benchmarks_of_the_package_go_by_their_own_names() -> None:
    from etcbench.loading import task_names

    others = {
        "average", "efficiency", "vizwiz", "mmvet", "llava-bench-wild", "a-okvqa", "mmmu", "nocaps",
        "coco2014_caption", "coco2017_caption", "coco_caption", "flickr30k", "mmstar", "ocrbench",
    }  # fmt: skip
    assert {n.task for n in load_published()} <= others | set(task_names())
    # a protocol that is a figure of the headline has the headline's name
    assert {n.protocol for n in load_published() if n.task == "mme"} == {
        "perception", "cognition", "total",
    }  # fmt: skip
    assert {n.protocol for n in load_published() if n.task.startswith("mmbench")} == {
        "circular", "per_row",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("paper", "table", "count"),
    [
        ("etc", "Table 1", 13 * 5 - 15 + 4),
        ("etc", "Table 2", 12 * 6 + 11),
        ("etc", "Table 3", 8),
        ("etc", "Table 4", 9),
        ("etc", "Table 5", 28),
        ("etc", "Table 6", 28),
        ("etc", "Table 7", 9),
        ("etc", "Table 8", 9),
        ("etc", "Table 9", 9),
        ("etc", "Figure 3", 3),
        ("etc", "Figure 4", 5),
        ("voco-llama", "main results", 5 * 8 + 7 * 5),
        ("quecc", "main results", 6 * 8),
        ("mqt-llava", "main results", 3 * 9 + 2 * 7),
        ("mqt-llava", "independent re-evaluation", 12),
        ("independent re-run", "selective re-run", 12 * 8),
    ],
)
def test_no_cell_of_a_table_is_missing(paper: str, table: str, count: int) -> None:
    assert sum((n.paper, n.table) == (paper, table) for n in load_published()) == count


def test_every_selective_row_is_there() -> None:
    numbers = [n for n in load_published() if n.table == "selective"]
    rows = Counter((n.paper, n.method, n.tokens) for n in numbers)
    assert len(rows) == 1 + 9 * 3
    assert Counter(tokens for _, _, tokens in rows) == {"576": 1, "192": 9, "128": 9, "64": 9}
    assert sum(rows.values()) == 8 + 3 * (9 * 7 + 3) - 2
    frame = published_table("selective").frame
    assert list(frame["tokens"]) == ["576"] + ["192"] * 13 + ["128"] * 13 + ["64"] * 13


@pytest.mark.parametrize(
    ("name", "method", "tokens", "column", "words"),
    [
        ("etc-1", "mqt", "4", "MME (total)", "perception only"),
        ("etc-1", "full", "576", "method", "composed row"),
        ("etc-2", "etc", "4", "SQA (img)", "no number of right answers"),
        ("etc-2", "quecc", "1", "method", "did not train"),
        ("etc-5", "etc[alpha=1.0]", "1", "MMB-CN (per row)", "79.49"),
        ("etc-8", "etc[layer=32]", "1", "method", "28 layers"),
        ("etc-fig3", "etc", "1", "GQA", "57.0"),
        ("etc-fig4", "full", "all", "SQA (img)", "86.81"),
    ],
)
def test_a_doubt_is_marked_where_it_belongs(
    name: str, method: str, tokens: str, column: str, words: str
) -> None:
    sheet = published_table(name)
    frame = sheet.frame
    (at,) = frame.index[(frame["method"] == method) & (frame["tokens"] == tokens)]
    assert (at, list(frame.columns).index(column)) in marked(sheet, words)


def test_a_doubt_about_a_whole_column_is_marked_once() -> None:
    sheet = published_table("etc-2")
    places = marked(sheet, "k/4329")
    names = list(sheet.frame.columns)
    assert places == [(HEADING, names.index(f"MMB-{x} (per row)")) for x in ("CN", "EN")]


def test_rows_of_other_papers_are_contested_or_unconfirmed_as_the_notes_say() -> None:
    sheet = published_table("selective")
    frame = sheet.frame
    contested = {
        (frame.loc[r, "method"], frame.loc[r, "measured by"]) for r, _ in marked(sheet, "contested")
    }
    assert contested == {("fastv", "sparsevlm")}


# tables


@pytest.mark.parametrize("name", PAPER_TABLES)
def test_every_column_of_every_table_has_a_score_under_its_protocol(name: str) -> None:
    sheet = published_table(name)
    frame = sheet.frame
    assert frame.map(lambda cell: isinstance(cell, str)).all().all()
    assert frame.columns.is_unique
    for column in PAPER_TABLES[name].columns:
        values = [value for value in frame[column.heading] if value != "-"]
        assert any(re.fullmatch(r"-?[\d.]+", value) for value in values), column
    for record in sheet.records:
        assert record["value"] in {part.split(" ")[0] for part in frame[record["column"]]}


def write(folder: Path, numbers: list[Published], header: str | None = None) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(",") if header else vars(numbers[0]))
        writer.writerows(vars(number).values() for number in numbers)


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no published numbers in"):
        load_published(tmp_path)
    numbers = list(load_published()[:2])
    write(tmp_path / "header", numbers, "paper,value")
    with pytest.raises(UsageError, match=r"a\.csv: columns are paper, value; wanted paper, table"):
        load_published(tmp_path / "header")
    write(tmp_path / "short", numbers)
    with (tmp_path / "short" / "a.csv").open("a") as file:
        file.write("etc,Table 1\n")
    with pytest.raises(UsageError, match=r"a\.csv line 4: 2 fields"):
        load_published(tmp_path / "short")


def test_a_table_without_its_reference_row_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "no", [n for n in load_published() if n.method != "full"])
    with pytest.raises(UsageError, match="needs one row 'full'"):
        published_table("etc-1", tmp_path / "no")


def test_a_changed_score_changes_the_average(tmp_path: Path) -> None:
    from dataclasses import replace

    def change(number: Published) -> Published:
        wrong = (number.table, number.method, number.tokens, number.task) == (
            "Table 1", "etc", "1", "vqav2",
        )  # fmt: skip
        return replace(number, value="72.91") if wrong else number

    write(tmp_path / "other", [change(n) for n in load_published()])
    sheet = published_table("etc-1", tmp_path / "other")
    assert row(sheet, "etc", "1")["avg %"] == "92.37"
    assert marked(sheet, "the paper prints 92.22")


def test_an_installed_package_has_the_numbers_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "etcbench"
    package.mkdir(parents=True)
    monkeypatch.setattr(etcbench.recorded, "__file__", str(package / "recorded.py"))
    load_published.cache_clear()
    with pytest.raises(UsageError, match="install etcbench again"):
        load_published()
    numbers = [Published(*(["x"] * 11))]
    (package / "results").mkdir()
    write(package / "results" / "published", numbers)
    assert load_published() == tuple(numbers)
    load_published.cache_clear()


def test_a_column_prefers_its_own_protocol(tmp_path: Path) -> None:
    from etcbench.paper_sheets import _Row

    first = load_published()[0]
    numbers = [
        Published(**{**vars(first), "task": "mme", "metric": p, "protocol": p, "value": v})
        for p, v in (("perception", "1500"), ("total", "1800"))
    ]
    found = _Row("full", "576", "etc", numbers).find(Column("MME", "mme", "total"))
    assert found is not None and found.value == "1800"


# command line


def compare(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    import etcbench.cli

    with pytest.raises(SystemExit) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["etcbench", "compare", *arguments])
        etcbench.cli.main()
    output = capsys.readouterr()
    return int(str(caught.value.code)), output.out, output.err


@pytest.mark.parametrize("form", [None, "md", "csv", "latex", "html", "json"])
@pytest.mark.parametrize("name", ETC_AVERAGES)
def test_the_command_prints_the_averages(
    name: str, form: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--format", form] if form else []
    code, out, _ = compare(capsys, "--table", name, "--published-only", *options)
    assert code == 0
    assert [value for value in ETC_AVERAGES[name].values() if value not in out] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--table", "etc-1"], "--published-only, without runs"),
        (["--published-only"], "NAME is one of etc-1, etc-2"),
        (["runs", "--table", "etc-1", "--published-only"], "without runs"),
        (["--table", "etc-33", "--published-only"], "did you mean etc-3"),
    ],
)
def test_wrong_usage_of_the_command_is_one_line(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)  # where there are no runs
    code, out, err = compare(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err and len(err.splitlines()) == 1
