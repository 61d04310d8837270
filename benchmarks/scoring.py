"""Time and memory of scoring as many answers as VQAv2 validation has, made up from a fixed seed.

Run ``python benchmarks/scoring.py``; it exits with 1 when scoring takes 10 s or 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from etcbench.scoring.files import score_file
from etcbench.task import Report

QUESTIONS = 214_354
PER_PICTURE = 5
LIMIT_S = 10.0
LIMIT_BYTES = 1 << 30
COMMON = ["yes", "no", "1", "2", "two", "white", "a dog", "The man's", "blue and white", "T-shirt"]


def write_answers(folder: Path, questions: int) -> tuple[Path, Path]:
    """Write annotations and a submission in VQAv2's formats; one answer in three is rare."""
    draw = random.Random(0)
    annotations, submission = [], []
    for number in range(questions):
        own = f"thing {draw.randrange(60_000)}"
        pool = [draw.choice(COMMON), draw.choice(COMMON), own]
        people = draw.choices(pool, weights=(7, 2, 1), k=10)
        annotations.append(
            {
                "question_id": number,
                "image_id": number // PER_PICTURE,
                "answer_type": draw.choice(["yes/no", "number", "other"]),
                "question_type": f"type {number % 65}",
                "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(people, 1)],
            }
        )
        submission.append({"question_id": number, "answer": draw.choice(pool)})
    gold, predictions = folder / "annotations.json", folder / "submission.json"
    gold.write_text(json.dumps({"annotations": annotations}))
    predictions.write_text(json.dumps(submission))
    return predictions, gold


def score_in_child(folder: Path) -> tuple[Report, float, float, int]:
    """Score the files: report, seconds, processor seconds, peak resident bytes."""
    start = time.perf_counter()
    report = score_file("vqav2_full", folder / "submission.json", folder / "annotations.json")
    seconds = time.perf_counter() - start
    return (
        report,
        seconds,
        time.process_time(),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        import multiprocessing

        # a process of its own, so that making the answers up does not count
        with multiprocessing.get_context("spawn").Pool(1) as writer:
            writer.apply(write_answers, (Path(folder), arguments.questions))
        with multiprocessing.get_context("spawn").Pool(1) as scorer:
            report, seconds, busy, peak = scorer.apply(score_in_child, (Path(folder),))
    print(f"{report.n:,} answers in {seconds:.1f} s ({busy:.1f} s of processor time)")
    print(f"peak memory {peak / (1 << 20):.0f} MiB")
    print(f"accuracy {report.value:.2f}, {report.interval}")
    return int(seconds > LIMIT_S or peak > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
