"""The report is one file, safe against what models answer, and drawn again the same."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_paired import runs

from etcbench.errors import UsageError
from etcbench.html_report import html_report, sampled
from etcbench.paired import questions_of
from etcbench.places import read_places
from etcbench.redraw import redraw
from etcbench.store import RunDirectory, write_json

HOSTILE = "</script><img src=x onerror=alert(1)><!-- & \u2028 'quoted' \"too\""


class Tags(HTMLParser):
    """Every element with its attributes, and the data of the sample browser."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data


def compared() -> list[RunDirectory]:
    return runs("pope", "full", "voco-1")


def test_answers_are_data_and_never_markup() -> None:
    made = compared()
    _, docs = questions_of(made[1])
    first = sampled(docs, 1)[0]
    answered = {**made[1].records[first.id], "response": HOSTILE}
    made[1].records = {**made[1].records, first.id: answered}
    page = html_report(made, title=HOSTILE, samples=2, curves=False)
    tags = Tags(page)
    assert not [attrs for _, attrs in tags.found if "onerror" in attrs]
    assert [tag for tag, _ in tags.found].count("script") == 2
    shown = json.loads(tags.data)["micro-llava"]["pope"][0]
    assert [answer["response"] for answer in shown["answers"]][1] == HOSTILE
    assert shown["picture"].startswith("data:image/png;base64,")
    assert shown["prompt"].startswith("Is there") and shown["gold"] in ("yes", "no")


def test_it_loads_nothing_from_elsewhere() -> None:
    page = html_report(compared(), samples=1)
    addresses = [
        value
        for _, attrs in Tags(page).found
        for name, value in attrs.items()
        if name in ("src", "href") and value
    ]
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert not re.search(r"url\((?!data:)", page.split("<script", 1)[0])


def test_kept_places_reach_the_sample(tmp_path: Path) -> None:
    made = compared()
    _, docs = questions_of(made[0])
    first = sampled(docs, 1)[0]
    places = {"micro-llava": {"voco 1": {"pope": {first.id: ["after layer 1", 2, 2, [0], [1, 2]]}}}}
    write_json(tmp_path / "places.json", places)
    page = html_report(made, places=read_places(tmp_path / "places.json"), samples=1, curves=False)
    answers = json.loads(Tags(page).data)["micro-llava"]["pope"][0]["answers"]
    assert [answer["places"] for answer in answers] == [None, ["after layer 1", 2, 2, [0], [1, 2]]]
    (tmp_path / "places.json").write_text("{")
    with pytest.raises(UsageError, match="places"):
        read_places(tmp_path / "places.json")


def test_tables_are_drawn_again_byte_for_byte_wherever_the_folder_is(tmp_path: Path) -> None:
    written = []
    for name in ("here", "there"):
        folder = tmp_path / name
        for run in compared():
            target = folder / "runs" / run.path.parent.name / run.path.name
            target.mkdir(parents=True)
            for file in run.path.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
        files = redraw(folder, "Title", "full")
        written.append({f.relative_to(folder): f.read_bytes() for f in files if f.suffix != ".png"})
    assert written[0] == written[1]
    names = {file.name for file in written[0]}
    assert {"micro-llava-scores.md", "micro-llava-voco.csv", "micro-llava-tokens.svg"} <= names
    assert str(tmp_path).encode() not in b"".join(written[0].values())
    with pytest.raises(UsageError, match="not a directory"):
        redraw(tmp_path / "nowhere", "Title", "full")
