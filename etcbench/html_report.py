"""A comparison as one self-contained HTML file: tables, curves, and a browser of samples.

Nothing is loaded from elsewhere. What a model answered is data: it enters the page as text, and
cannot become markup.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

from etcbench.controls import pictures_shuffled
from etcbench.curves import draw, points
from etcbench.doc import Doc, UnreadableImage
from etcbench.measured import label_of
from etcbench.paired import questions_of
from etcbench.report import tabulate_runs
from etcbench.store import RunDirectory
from etcbench.summary import MICRO

SAMPLES = 8  # of each benchmark
SIDE = 320  # pixels of a picture's longer side, at most
LABELS = 2  # columns of words at the left of the tables
Places = Mapping[str, Any]


def html_report(
    runs: Sequence[RunDirectory],
    *,
    title: str = "etcbench",
    baseline: str | None = None,
    places: Places | None = None,
    samples: int = SAMPLES,
    curves: bool = True,
) -> str:
    """Write the report.

    Parameters
    ----------
    runs : sequence of RunDirectory
        Finished runs, in the order of the tables' rows; of one or several models.
    title : str
        Heading of the page.
    baseline : str, optional
        Row to which every score is compared.
    places : mapping, optional
        Kept and merged places by model, method, benchmark and sample, from
        `etcbench.places.find_places`.
    samples : int
        How many samples of each benchmark can be looked at.
    curves : bool
        Whether to draw scores against tokens.

    Raises
    ------
    UsageError
        If the data of a run is not there, or the baseline is not among the runs.
    """
    models = list(dict.fromkeys(_model(run) for run in runs))
    tables: list[dict[str, Any]] = []
    figures: list[dict[str, str]] = []
    shown: dict[str, Any] = {}
    notes: list[str] = []
    for model in models:
        mine = [run for run in runs if _model(run) == model]
        plain = [run for run in mine if not pictures_shuffled(run.manifest["config"]["data"])]
        table = tabulate_runs(mine, baseline=baseline)
        rows = [row[1:] for row in table.rows]
        heading = f"{model}: scores"
        tables.append({"heading": heading, "columns": table.columns[1:], "rows": rows})
        notes += [note for note in table.notes if note not in notes]
        if curves:
            for axis in ("tokens", "layer_average"):
                heading = f"{model}: score against {axis.replace('_', ' ')}"
                figures.append({"heading": heading, "data": _curve(plain, axis)})
        shown[model] = _browsable(plain, samples, (places or {}).get(model, {}))
    environment = Environment(loader=PackageLoader("etcbench"), autoescape=True)
    page = environment.get_template("report.html.j2")
    return page.render(
        title=title,
        notes=notes,
        labels=LABELS,
        tables=tables,
        curves=figures,
        samples=_script(shown) if any(shown.values()) else "",
    )


def sampled(docs: Sequence[Doc], count: int) -> list[Doc]:
    """Choose the samples to look at: the first of each group, in order."""
    first: dict[str, Doc] = {}
    for doc in docs:
        first.setdefault(doc.group, doc)
        if len(first) == count:
            break
    return list(first.values())


def _model(run: RunDirectory) -> str:
    return str(run.manifest["config"]["model"]["name"])


def _curve(runs: Sequence[RunDirectory], axis: str) -> str:
    micro = any(run.summary and run.summary["micro"] == MICRO for run in runs)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "curve.svg"
        draw(points(runs, axis), axis, [file], micro)
        return base64.b64encode(file.read_bytes()).decode()


def _browsable(
    runs: Sequence[RunDirectory], count: int, places: Places
) -> dict[str, list[dict[str, Any]]]:
    """Give samples of every benchmark with each method's answer."""
    by_task: dict[str, list[RunDirectory]] = {}
    for run in runs:
        by_task.setdefault(run.manifest["config"]["task"], []).append(run)
    found = {}
    for name, members in by_task.items():
        task, docs = questions_of(members[0], pictures=True)
        style = members[0].manifest["config"]["style"]
        found[name] = [
            {
                "id": doc.id,
                "picture": _data_uri(doc),
                "prompt": task.prompt(doc, style),
                "gold": _plain(doc.gold),
                "answers": list(_answers(members, doc, name, places)),
            }
            for doc in sampled(docs, count)
        ]
    return found


def _answers(
    runs: Sequence[RunDirectory], doc: Doc, task: str, places: Places
) -> Iterator[dict[str, Any]]:
    configs = [run.manifest["config"] for run in runs]
    names = [" ".join(filter(None, (label_of(c), c["tokens"]))) for c in configs]
    for run, name, config in zip(runs, names, configs, strict=True):
        if (record := run.records.get(doc.id)) is None:
            continue
        # Trainings of the same method are told apart by their checkpoints.
        several = names.count(name) > 1 and config["weights"].get("checkpoint")
        yield {
            "method": f"{name} ({several})" if several else name,
            "response": record["response"] if record["status"] == "ok" else "(error)",
            "correct": record["correct"],
            "places": places.get(name, {}).get(task, {}).get(doc.id),
        }


def _data_uri(doc: Doc) -> str:
    if not doc.pictures:
        return ""
    try:
        image = doc.pictures[0].open()
    except UnreadableImage:
        return ""
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # small pictures keep every pixel; photos would be large that way
    small = max(image.size) < SIDE
    image.save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _plain(gold: Any) -> str:
    if isinstance(gold, str):
        return gold
    return json.dumps(gold, ensure_ascii=False, default=str)


def _script(content: Any) -> Markup:
    """Write JSON that cannot end the script element it stands in."""
    text = json.dumps(content, ensure_ascii=False, default=str)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)
