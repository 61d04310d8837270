from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pytest

from etcbench.errors import UsageError
from etcbench.paper_sheets import published_table
from etcbench.paper_tables import PAPER_TABLES
from etcbench.tables import HEADING, Sheet, render_sheet


@pytest.mark.parametrize("name", PAPER_TABLES)
@pytest.mark.parametrize("form", ["md", "csv", "latex", "html", "json"])
def test_every_table_can_be_written(name: str, form: str) -> None:
    sheet = published_table(name)
    text = render_sheet(sheet, form)
    assert {record["value"] for record in sheet.records if record["value"] not in text} == set()


def awkward() -> Sheet:
    frame = pd.DataFrame(
        [["a_b & c|d", "50%", "-"], ["<b>x</b>", r"\x{1}", "$2 #3 ~4 ^5"]],
        columns=["method", "50 % & <i>", "y"],
    )
    marks = {(HEADING, 1): [1], (0, 2): [1, 2]}
    return Sheet(
        "t", "A & B_C 100%", frame, marks, ["<&>", "n_2"], ["50 % more"], [{"value": "<1"}], 1
    )


def test_latex_is_one_booktabs_float_with_everything_escaped() -> None:
    text = render_sheet(awkward(), "latex")
    environments = re.findall(r"\\(begin|end)\{(\w+)\}", text)
    assert environments == [
        ("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table"),
    ]  # fmt: skip
    rules = [text.index(rf"\{rule}") for rule in ("toprule", "midrule", "bottomrule")]
    assert rules == sorted(rules)
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 3
    for line in lines:
        assert len(re.findall(r"(?<!\\)&", line)) == 2, line
    assert r"a\_b \& c|d & 50\% & -\textsuperscript{1,2} \\" in lines
    assert r"\textless{}b\textgreater{}x" in text
    assert r"\textbackslash{}x\{1\} & \$2 \#3 \textasciitilde{}4 \textasciicircum{}5" in text
    assert r"\begin{tabular}{lrr}" in text
    assert r"\caption{A \& B\_C 100\%}" in text
    assert re.findall(r"(?<!\\)[%#_$]", text) == []


@pytest.mark.parametrize("name", PAPER_TABLES)
def test_latex_rows_have_as_many_cells_as_columns(name: str) -> None:
    text = render_sheet(published_table(name), "latex")
    found = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)
    assert found
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(found[1])}
    assert text.count("{") == text.count("}")
    assert re.findall(r"(?<!\\)[%#_$]", text) == []


class Cells(HTMLParser):
    """Text of every table cell, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.inside = tag in ("td", "th")
        if self.inside:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


def test_html_shows_markup_as_text() -> None:
    page = Cells()
    page.feed(render_sheet(awkward(), "html"))
    assert page.cells == [
        "method", "50 % & <i> [1]", "y",
        "a_b & c|d", "50%", "- [1,2]",
        "<b>x</b>", r"\x{1}", "$2 #3 ~4 ^5",
    ]  # fmt: skip
    assert not page.tags & {"b", "i"}


def test_markdown_keeps_its_columns() -> None:
    text = render_sheet(awkward(), "md")
    heading, rule, *body = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in (heading, rule, *body)} == {4}
    assert rule.startswith("|:") and rule.endswith("-:|")
    assert text.splitlines()[-1] == "[2] n_2"


def test_csv_and_json_give_one_record_per_figure() -> None:
    sheet = published_table("etc-1")
    lines = list(csv.DictReader(io.StringIO(render_sheet(sheet, "csv"))))
    content = json.loads(render_sheet(sheet, "json"))
    assert len(lines) == len(content["records"]) == 50 + 2 * 5
    (mqt,) = [r for r in lines if (r["method"], r["tokens"], r["task"]) == ("mqt", "4", "mme")]
    assert mqt["value"] == "1176.10"
    assert (mqt["protocol"], mqt["comparable"]) == ("perception", "False")
    averages = [r for r in content["records"] if r["column"] == "avg %"]
    assert [r["value"] for r in averages] == ["100.00", "95.33", "94.55", "92.22", "52.96"]
    assert all(r["source"] == "computed from the printed scores" for r in averages)
    # decimals stay as printed
    assert "64.00" in [r["value"] for r in lines]


# wrong input


def test_an_unknown_table_or_format_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown table 'etc1'; did you mean etc-"):
        published_table("etc1")
    with pytest.raises(UsageError, match="md, csv, latex, html, json"):
        render_sheet(published_table("etc-3"), "xlsx")
