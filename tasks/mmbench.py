"""MMBench dev, English and Chinese: every question asked once per rotation of its options (4.1).

One row: ``Identify the question that Madelyn and Tucker's experiment can best answer.`` with two
options, gold ``B``; in LLaVA's style the model reads the hint, the question, the lines ``A. ...``
and ``B. ...`` and ``Answer with the option's letter from the given choices directly.``
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import ClassVar

import numpy as np

from etcbench.doc import Row, absent
from etcbench.errors import UsageError
from etcbench.scoring.choices import mmbench_lmms, mmbench_lmms_static, mmbench_vlmeval
from etcbench.scoring.statistics import Floats, Interval, wilson
from etcbench.task import UNPARSED, Breakdown, Doc, HubSource, Parsed, Scored, Task, percent

ROTATION = 1_000_000
ASK = "Answer with the option's letter from the given choices directly."
ASK_CN = {"llava": "请直接回答选项字母。", "lmms": "请直接使用所提供的选项字母作为答案回答。"}


class MmBench(Task):
    """MMBench; a question counts in ``circular`` when all its rotations are right.

    ``vlmeval`` are the rules of the current official toolkit, ``lmms`` those of lmms-eval,
    ``lmms-static`` these and then its fallback without a judge.

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
    modes: ClassVar = ("vlmeval", "lmms", "lmms-static")
    metric = "circular"
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
        kinds = {"category": row.get("category")}
        kinds["l2_category"] = row.get("L2-category", row.get("l2-category"))
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
        ask = ASK_CN[style] if self.language == "cn" else ASK
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
        if mode.startswith("lmms"):
            # lmms-eval keeps the text "nan" of absent options among the texts it looks for
            options = {x: options.get(x, "nan") for x in "ABCD"}
            letter = mmbench_lmms(response, options)
            if letter is None and mode == "lmms-static":
                letter = mmbench_lmms_static(response, options)
        else:
            letter = mmbench_vlmeval(response, options)
        return UNPARSED if letter is None else Parsed(letter)

    def headline(self, rows: Sequence[Scored], mode: str) -> dict[str, float]:
        """Circular accuracy, then the accuracies of all rows and of the unrotated ones."""
        first = [row for row in rows if int(row.doc.id) < ROTATION]
        return {
            "circular": percent(_questions(rows)),
            "per_row": percent(rows),
            "first_pass": percent(first),
        }

    def breakdown(self, rows: Sequence[Scored], mode: str) -> Breakdown:
        """Circular accuracy per category; n counts questions."""
        return super().breakdown(_questions(rows), mode)

    def table(self, rows: Sequence[Scored], mode: str) -> Floats:
        """Give each rotation its share of its question."""
        passed = {question.doc.group: question.outcome for question in _questions(rows)}
        sizes = Counter(row.doc.group for row in rows)
        return np.array([(passed[r.doc.group], 1) for r in rows]) / [
            [sizes[r.doc.group]] for r in rows
        ]

    def interval(self, rows: Sequence[Scored], mode: str) -> Interval:
        """Wilson over questions, which are independent."""
        questions = _questions(rows)
        return wilson(sum(question.outcome for question in questions), len(questions))


def _questions(rows: Sequence[Scored]) -> list[Scored]:
    """Per question its unrotated row, right if all rotations are."""
    passed: dict[str, Scored] = {}
    for row in sorted(rows, key=lambda row: int(row.doc.id)):
        first = passed.setdefault(row.doc.group, row)
        passed[row.doc.group] = replace(first, outcome=min(first.outcome, row.outcome))
    return list(passed.values())


TASK = MmBench
