"""TextVQA: questions about text in pictures, ten answers each (spec tasks 4.9).

One row: ``what is the brand of this camera?``, gold ten answers such as ``dakota`` and ``dakota
digital``; in LLaVA's style the lines ``Reference OCR token: DAKOTA, DIGITAL`` and ``Answer the
question using a single word or phrase.`` follow.
"""

from __future__ import annotations

from etcbench.doc import Row
from etcbench.errors import UsageError
from etcbench.scoring.answers import consensus, evalai_norm
from etcbench.task import Doc, HubSource, Parsed, Task


class TextVqa(Task):
    """TextVQA validation; the style says whether the model was shown the OCR tokens.

    ``llava`` and ``lmms-ocr`` show them, ``llava-no-ocr`` and ``lmms`` do not. The line is worth
    about ten points, so figures of the two kinds are not comparable.
    """

    name = "textvqa"
    columns = ("image_id", "question_id", "question", "answers", "image")
    source = HubSource(("lmms-lab-encoder/textvqa", "lmms-lab/textvqa"), split="validation")
    styles = ("llava", "llava-no-ocr", "lmms", "lmms-ocr", "official")
    max_new_tokens = 16

    def doc(self, row: Row, index: int) -> Doc:
        """Group by picture; gold is the tuple of raw answers."""
        return Doc(
            id=str(row["question_id"]),
            group=str(row.get("image_id", row["question_id"])),
            pictures=self.pictures(row),
            fields={
                "question": row["question"],
                "question_id": row["question_id"],
                "image_id": str(row.get("image_id", "")),
                "ocr_tokens": tuple(row.get("ocr_tokens") or ()),
            },
            gold=tuple(str(answer) for answer in row.get("answers") or ()),
        )

    def render(self, doc: Doc, style: str) -> str:
        """Ask for a word or phrase, below the OCR tokens where the style has them."""
        question = doc.fields["question"]
        if style == "official":
            return question
        if style.startswith("lmms"):
            # lmms-eval lower-cases everything after the first character
            question = question.capitalize()
        if style in ("llava", "lmms-ocr"):
            question += f"\nReference OCR token: {', '.join(doc.fields['ocr_tokens'])}"
        return f"{question}\nAnswer the question using a single word or phrase."

    def parse(self, response: str, doc: Doc, mode: str) -> Parsed:
        """Normalise as EvalAI does; blank text names no answer."""
        return Parsed(evalai_norm(response), "ok" if response.strip() else "unparsed")

    def outcome(self, parsed: Parsed, doc: Doc, mode: str) -> float:
        """Agreement with the ten normalised answers."""
        if not doc.gold:
            raise UsageError(f"textvqa: question {doc.id} has no public answers; use validation")
        return consensus(parsed.value, [evalai_norm(answer) for answer in doc.gold])


TASK = TextVqa
