"""MME: two yes/no questions per picture in 14 subtasks (spec tasks 4.2).

One row: ``Is there a train in this image? Please answer yes or no.``, gold ``Yes``; in LLaVA's
style the model reads ``Is there a train in this image?`` and, on the next line, ``Answer the
question using a single word or phrase.``
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from etcbench.doc import Row
from etcbench.errors import UsageError
from etcbench.scoring.choices import mme_answer, mme_answer_lmms
from etcbench.scoring.statistics import Floats, ratio
from etcbench.task import UNPARSED, Breakdown, Doc, HubSource, Parsed, Scored, Task, by_category

PERCEPTION = (
    "existence", "count", "position", "color", "posters",
    "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
SUBTASKS = PERCEPTION + COGNITION
SUFFIX = " Please answer yes or no."


class Mme(Task):
    """MME; ``official`` reads the raw response, the default strips it first."""

    name = "mme"
    columns = ("question_id", "image", "question", "answer", "category")
    source = HubSource(("lmms-lab-encoder/MME", "lmms-lab/MME"), split="test")
    styles = ("llava", "lmms", "official", "gpt4v", "qwen_vl")
    modes: ClassVar = ("etcbench", "official", "lmms")
    max_new_tokens = 16
    unit = "points"
    hit_rate = False

    def doc(self, row: Row, index: int) -> Doc:
        """Group the two questions of a picture by (category, question_id)."""
        key = str(row["question_id"])
        category = str(row["category"])
        if category not in SUBTASKS:
            raise UsageError(f"mme row {index}: no subtask {category!r}; one of {SUBTASKS}")
        return Doc(
            id=f"{key}#{index}",
            group=f"{category}:{key}",
            pictures=self.pictures(row),
            fields={"question": row["question"], "question_id": key},
            gold=str(row["answer"]).strip().lower(),
            categories={"subtask": category},
        )

    def key(self, text: str) -> str:
        """Drop the folder that LLaVA's ids have between subtask and file."""
        return text.replace("/images/", "/")

    def render(self, doc: Doc, style: str) -> str:
        """Replace the official suffix by the style's own."""
        question = doc.fields["question"]
        if style == "official":
            return question
        bare = question.removesuffix(SUFFIX)
        if style == "llava":
            # LLaVA's file has no space here in the seven rows with a doubled one
            return f"{bare.rstrip()}\nAnswer the question using a single word or phrase."
        if style == "gpt4v":
            return f"{bare}\nAnswer the question with Yes or No."
        if style == "qwen_vl":
            return f"{bare} Answer:"
        return f"{bare}\nAnswer the question using a single word or phrase."

    def parse(self, response: str, doc: Doc, mode: str) -> Parsed:
        """Yes, no or, for anything else, unparsed ("other" in the official script)."""
        if mode == "lmms":
            answer = mme_answer_lmms(response)
        else:
            answer = mme_answer(response if mode == "official" else response.strip())
        return UNPARSED if answer is None else Parsed(answer)

    def headline(self, rows: Sequence[Scored], mode: str) -> dict[str, float]:
        """Sum subtask scores; a subtask that is not in the data adds nothing."""
        scores = {name: f["score"] for name, f in self.breakdown(rows, mode)["subtask"].items()}
        perception = sum(scores[name] for name in PERCEPTION if name in scores)
        cognition = sum(scores[name] for name in COGNITION if name in scores)
        return {
            "total": perception + cognition, "perception": perception, "cognition": cognition,
        }  # fmt: skip

    def breakdown(self, rows: Sequence[Scored], mode: str) -> Breakdown:
        """acc, acc+, their sum and the number of unreadable answers per subtask."""
        found = {}
        for subtask, part in by_category(rows)["subtask"].items():
            right = sum(row.outcome for row in part)
            both = sum(hits == 2 for hits in _hits(part).values())
            acc, acc_plus = 100 * right / len(part), 100 * both / (len(part) // 2)
            other = sum(row.parsed.status == "unparsed" for row in part)
            found[subtask] = {
                "score": acc + acc_plus, "acc": acc, "acc_plus": acc_plus,
                "n": len(part), "n_other": other,
            }  # fmt: skip
        return {"subtask": {name: found[name] for name in SUBTASKS if name in found}}

    def table(self, rows: Sequence[Scored], mode: str) -> Floats:
        """Per subtask: points and ones; a pair answered right adds to both of its rows."""
        hits = _hits(rows)
        table = np.zeros((len(rows), 2 * len(SUBTASKS)))
        for i, row in enumerate(rows):
            column = 2 * SUBTASKS.index(row.doc.categories["subtask"])
            table[i, column] = 100 * (row.outcome + (hits[row.doc.group] == 2))
            table[i, column + 1] = 1
        return table

    def statistic(self, sums: Floats) -> Floats:
        """Total points from the column sums."""
        return ratio(sums[:, ::2], sums[:, 1::2]).sum(1)

    def strata(self, rows: Sequence[Scored]) -> list[str]:
        """Resample within subtasks, which the score weights equally."""
        return [row.doc.categories["subtask"] for row in rows]


def _hits(rows: Sequence[Scored]) -> Counter[str]:
    sizes = Counter(row.doc.group for row in rows)
    for group, size in sizes.items():
        if size != 2:
            raise UsageError(f"mme: {group} has {size} rows; every picture needs exactly two")
    hits = Counter(dict.fromkeys(sizes, 0))
    for row in rows:
        hits[row.doc.group] += int(row.outcome)
    return hits


TASK = Mme
