"""MMBench dev, English and Chinese: every question asked once per rotation of its options (4.1).

One row: ``Identify the question that Madelyn and Tucker's experiment can best answer.`` with two
options, gold ``B``; in LLaVA's style the model reads the hint, the question, the lines ``A. ...``
and ``B. ...`` and ``Answer with the option's letter from the given choices directly.``
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import ClassVar

import numpy as np

from etcbench.doc import Row, absent
from etcbench.errors import UsageError
from etcbench.scoring.choices import all_right, mmbench_lmms, mmbench_vlmeval
from etcbench.scoring.statistics import Floats, Interval, wilson
from etcbench.task import (
    UNPARSED,
    Breakdown,
    Doc,
    HubSource,
    Parsed,
    Scored,
    Task,
    by_category,
    percent,
)

ROTATION = 1_000_000
_LETTER = "Answer with the option's letter from the given choices directly."
ASK = {
    ("llava", "en"): _LETTER,
    ("lmms", "en"): _LETTER,
    ("llava", "cn"): "请直接回答选项字母。",
    ("lmms", "cn"): "请直接使用所提供的选项字母作为答案回答。",
}


class MmBench(Task):
    """MMBench; a question counts in ``circular`` when all its rotations are right.

    Parameters
    ----------
    language : str
        ``"en"`` or ``"cn"``.
    compat : bool
        Keep two defects of lmms-eval's Chinese prompt in style ``lmms``: the English header and
        a literal ``nan`` for an absent hint.
    """

    name = "mmbench"
    columns = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image")
    styles = ("llava", "lmms", "official")
    modes: ClassVar = ("vlmeval", "lmms")
    variants: ClassVar = {"en": {"language": "en"}, "cn": {"language": "cn"}}

    def __init__(self, language: str = "en", compat: bool = True) -> None:
        if language not in ("en", "cn"):
            raise UsageError(f"mmbench has no language {language!r}; choose en or cn")
        self.language, self.compat = language, compat
        ids = ("lmms-lab-encoder/MMBench", "lmms-lab/MMBench")
        self.source = HubSource(ids, language, "dev")
        if language == "cn":
            self.name = self.stem = "mmbench_cn"

    def doc(self, row: Row, index: int) -> Doc:
        """Group the rotations of a question: equal indices modulo a million."""
        number = int(row["index"])
        there = takewhile(lambda letter: not absent(row.get(letter)), "ABCD")
        options = {letter: str(row[letter]) for letter in there}
        level2 = row.get("L2-category", row.get("l2-category"))
        kinds = {"category": row.get("category"), "l2_category": level2}
        return Doc(
            id=str(number),
            group=str(number % ROTATION),
            pictures=self.pictures(row),
            fields={
                "question": row["question"],
                "hint": "" if absent(row.get("hint")) else str(row["hint"]),
                "options": options,
                "question_id": number,
            },
            gold=str(row["answer"]).strip(),
            categories={kind: str(value) for kind, value in kinds.items() if not absent(value)},
        )

    def render(self, doc: Doc, style: str) -> str:
        """Write hint, question, options and the request for a letter."""
        hint, question = doc.fields["hint"], doc.fields["question"]
        lines = "\n".join(f"{letter}. {text}" for letter, text in doc.fields["options"].items())
        if style == "official":
            first = f"Hint: {hint}\n" if hint else ""
            ask = "Please select the correct answer from the options above. \n"
            return f"{first}Question: {question}\nOptions:\n{lines}\n{ask}"
        ask = ASK[style, self.language]
        if style == "llava":
            return "\n".join([*([hint] if hint else []), question, lines, ask])
        header = "There are several options:"
        if self.language == "cn":
            header = header if self.compat else "以下有几个选项："
            hint = hint or ("nan" if self.compat else "")
        return f"{f'{hint} ' if hint else ''}{question} {header}\n{lines}\n\n{ask}"

    def parse(self, response: str, doc: Doc, mode: str) -> Parsed:
        """Infer a letter without a judge; Z stands for a refusal."""
        options = doc.fields["options"]
        if mode == "lmms":
            # lmms-eval keeps the text "nan" of absent options among the texts it looks for
            letter = mmbench_lmms(response, {x: options.get(x, "nan") for x in "ABCD"})
        else:
            letter = mmbench_vlmeval(response, options)
        return UNPARSED if letter is None else Parsed(letter)

    def headline(self, rows: Sequence[Scored], mode: str) -> dict[str, float]:
        """Circular accuracy, then the accuracies of all rows and of the unrotated ones."""
        first = [row for row in rows if int(row.doc.id) < ROTATION]
        return {"circular": _circular(rows), "per_row": percent(rows), "first_pass": percent(first)}

    def breakdown(self, rows: Sequence[Scored], mode: str) -> Breakdown:
        """Circular and per-row accuracy per category of the unrotated row; n counts questions."""
        origin: dict[str, Scored] = {}
        for row in sorted(rows, key=lambda row: int(row.doc.id)):
            origin.setdefault(row.doc.group, row)
        found: Breakdown = {}
        for kind, parts in by_category(list(origin.values())).items():
            found[kind] = {}
            for value, firsts in parts.items():
                groups = {row.doc.group for row in firsts}
                part = [row for row in rows if row.doc.group in groups]
                found[kind][value] = {
                    "circular": _circular(part), "per_row": percent(part), "n": len(groups),
                }  # fmt: skip
        return found

    def table(self, rows: Sequence[Scored], mode: str) -> Floats:
        """Give each rotation its share of its question."""
        passed, sizes = _questions(rows), Counter(row.doc.group for row in rows)
        return np.array(
            [(passed[r.doc.group] / sizes[r.doc.group], 1 / sizes[r.doc.group]) for r in rows]
        )

    def interval(self, rows: Sequence[Scored], mode: str) -> Interval:
        """Wilson over questions, which are independent."""
        passed = _questions(rows)
        return wilson(sum(passed.values()), len(passed))


def _questions(rows: Sequence[Scored]) -> dict[str, bool]:
    return all_right((row.doc.group, row.outcome) for row in rows)


def _circular(rows: Sequence[Scored]) -> float:
    passed = _questions(rows)
    return 100 * sum(passed.values()) / len(passed) if passed else 0.0


TASK = MmBench
