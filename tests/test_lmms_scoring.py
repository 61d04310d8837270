"""The ``lmms`` modes against lmms-eval's own functions (spec tasks 6.5), on random answers."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from etcbench.loading import make_task
from etcbench.scoring.answers import evalai_norm, lmms_vqa_norm
from etcbench.scoring.boxes import iou, read_box_lmms
from etcbench.scoring.captions import cider_of
from etcbench.task import Doc

pytest.importorskip("lmms_eval", reason='needs lmms-eval: pip install "etcbench[lmms]"')

from lmms_eval.api.metrics import exact_match_hf_evaluate
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from lmms_eval.tasks.mme import utils as mme
from lmms_eval.tasks.pope import utils as pope
from lmms_eval.tasks.qbench import utils as qbench
from lmms_eval.tasks.refcoco import utils_rec
from lmms_eval.tasks.scienceqa.utils import sqa_process_results
from lmms_eval.tasks.seedbench.utils import seed_aggregation_result, seed_process_result
from lmms_eval.tasks.textvqa.utils import textvqa_process_results
from lmms_eval.tasks.vqav2.utils import vqav2_process_results

PIECES = (
    "yes", "Yes", "NO", "no", "y", "A", "b", "C", "D", "(B)", "A.", "B)", "C:", "the answer is",
    "two", "2", "dogs", "a", "an", "banana", "red", "black", "T-shirt", "1,000", "it's", "dont",
    "$3.50", "5 p.m.", ".", ",", "?", "!", ":", "\n", "\t", "  ", "", "'s", "none", "é", "狗",
)  # fmt: skip
OPTIONS = ("red", "two dogs", "a banana", "black", "Left", "finance", "7 km", "it's late")


def texts(seed: int, number: int) -> Iterator[str]:
    """Draw answers: pieces of plausible ones, joined with and without blanks."""
    source = random.Random(seed)
    for _ in range(number):
        pieces = source.choices(PIECES, k=source.choice((0, 1, 1, 1, 2, 3, 5, 9)))
        yield source.choice(("", " ")).join(pieces)


def answer(task: Any, row: dict[str, Any]) -> Doc:
    return task.doc({"question": "?", "image": None, **row}, row.get("place", 0))


def test_vqa_normalisers():
    theirs = EvalAIAnswerProcessor()
    for text in texts(0, 3000):
        assert evalai_norm(text) == theirs(text)
        flat = text.replace("\n", " ").replace("\t", " ").strip()
        # lmms-eval's VQAv2 calls the two inner steps by themselves
        inner = theirs.process_digit_article(theirs.process_punctuation(flat))
        assert lmms_vqa_norm(text) == inner


@pytest.mark.parametrize("name", ["vqav2", "textvqa"])
def test_vqa(name):
    task, source = make_task(name), random.Random(1)
    drawn = list(texts(1, 400))
    process = {"vqav2": vqav2_process_results, "textvqa": textvqa_process_results}[name]
    mode = {"vqav2": "lmms", "textvqa": "official"}[name]
    for _ in range(400):
        pool = source.choices(drawn, k=4)
        said, golds = source.choice(pool), source.choices(pool, k=10)
        answers: Any = golds
        if name == "vqav2":
            answers = [{"answer": gold, "answer_id": n} for n, gold in enumerate(golds)]
        row = {"question_id": 7, "image_id": 1, "answer_type": "other", "answers": answers}
        theirs = process(copy.deepcopy(row), [said.strip()])["exact_match"]
        assert task.score([(answer(task, row), said)], mode).value == pytest.approx(100 * theirs)


def test_mme():
    task, source = make_task("mme"), random.Random(2)
    said = iter(texts(2, 2000))
    pairs, found = [], {"mme_perception_score": [], "mme_cognition_score": []}
    for number in range(300):
        category = source.choice(("existence", "OCR", "color", "code_reasoning"))
        for gold in ("Yes", "No"):
            row = {"question_id": f"{number}.png", "category": category, "answer": gold}
            response = next(said)
            pairs.append((answer(task, {**row, "place": len(pairs)}), response))
            for name, payload in mme.mme_process_results(row, [response.strip()]).items():
                found[name].append(payload)
    headline = task.score(pairs, "lmms").headline
    for name, payloads in found.items():
        ours = headline[name.split("_")[1]]
        assert ours == pytest.approx(mme.mme_aggregate_results(payloads), abs=1e-9) != 0


def test_pope():
    task, source = make_task("pope"), random.Random(3)
    pairs, found = [], []
    for number, text in enumerate(texts(3, 800)):
        row = {"question_id": number, "answer": source.choice(("yes", "no"))}
        about = {"id": number, "image_source": str(number), "category": "random"}
        pairs.append((answer(task, {**row, **about}), text))
        found.append(pope.pope_process_results(row, [text.strip()])["pope_f1_score"])
    headline = task.score(pairs, "lmms").headline
    for name, figure in (
        ("f1", pope.pope_aggregate_f1_score),
        ("accuracy", pope.pope_aggregate_accuracy),
        ("precision", pope.pope_aggregate_precision),
        ("recall", pope.pope_aggregate_recall),
        ("yes_rate", pope.pope_aggregate_yes_ratio),
    ):
        assert headline[name] == pytest.approx(100 * figure(found), abs=1e-9) != 0


def test_seedbench():
    task, source = make_task("seedbench"), random.Random(4)
    pairs, found = [], {"seed_image": [], "seed_video": [], "seed_all": []}
    for number, text in enumerate(texts(4, 800)):
        medium = source.choice(("image", "video"))
        row = {"question_id": str(number), "answer": source.choice("ABCD"), "data_type": medium}
        about = {"data_id": str(number), "question_type_id": 1, "place": number}
        pairs.append((answer(task, {**row, **about}), text))
        for name, payload in seed_process_result(row, [text]).items():
            found[name].append(payload)
    headline = task.score(pairs, "lmms").headline
    for name, payloads in found.items():
        ours = headline[name.removeprefix("seed_")]
        assert ours == pytest.approx(100 * seed_aggregation_result(payloads), abs=1e-9) != 0


def test_scienceqa():
    task, source = make_task("scienceqa"), random.Random(5)
    for text in texts(5, 1500):
        count = source.randint(2, 5)
        row = {"choices": list(OPTIONS[:count]), "answer": source.randrange(count), "hint": ""}
        theirs = sqa_process_results(row, [text.strip()])["exact_match"]
        assert task.score_one(answer(task, row), text, "lmms").outcome == theirs


def test_qbench(monkeypatch, capsys):
    # a letter drawn at random is no answer: both sides then have none
    monkeypatch.setattr(qbench.random, "choice", lambda choices: None)
    task, source = make_task("qbench"), random.Random(6)
    pairs, found = [], []
    for number, text in enumerate(texts(6, 1500)):
        options = [*source.sample(OPTIONS, source.randint(2, 4)), "N/A", "N/A"][:4]
        gold = source.choice("ABCD"[: 4 - options.count("N/A")])
        row = {f"option{k}": option for k, option in enumerate(options)}
        row |= {"id": number, "correct_choice": gold}
        row |= {"question_type": source.randrange(3), "question_concern": source.randrange(4)}
        doc = answer(task, row)
        payload = qbench.q_bench_process_results(row, [text])["qbench_acc"]
        assert task.parse(text, doc, "lmms").value == payload["parsed_pred"]
        pairs.append((doc, text))
        found.append(payload)
    theirs = 100 * qbench.q_bench_aggregate_results(found)
    # five decimals of a fraction are all that lmms-eval keeps
    assert task.score(pairs, "lmms").value == pytest.approx(theirs, abs=1e-3) != 0


def test_mmbench(capsys):
    task, source = make_task("mmbench"), random.Random(7)
    drawn = iter(texts(7, 4000))
    pairs, rows = [], []
    for question in range(200):
        count = source.randint(2, 4)
        options = source.sample(OPTIONS, count)
        for turn in range(count):
            turned = options[turn:] + options[:turn]
            gold = "ABCD"[turned.index(options[0])]
            lucky = source.random() < 0.6
            text = source.choice((gold, f"{gold}.", options[0])) if lucky else next(drawn)
            row = {x: (turned[k] if k < count else "nan") for k, x in enumerate("ABCD")}
            row |= {"index": question + 1_000_000 * turn, "answer": gold, "category": "c"}
            rows.append({**row, "question": "?", "L2-category": "l", "prediction": text.strip()})
            pairs.append((answer(task, {**row, "hint": None}), text))
    theirs = 100 * MMBench_Evaluator().eval_result(rows, "static")[0]
    assert task.score(pairs, "lmms-static").value == pytest.approx(theirs, abs=1e-9) != 0


def test_gqa():
    task, golds = make_task("gqa"), ("yes", "no", "two dogs", "t-shirt", "A.")
    source = random.Random(8)
    for text in texts(8, 1500):
        gold = source.choice(golds)
        settings = {"ignore_case": True, "ignore_punctuation": True}
        theirs = exact_match_hf_evaluate([text.strip()], [gold], **settings)["exact_match"]
        doc = answer(task, {"id": "1", "answer": gold})
        assert task.score_one(doc, text, "lmms").outcome == theirs


def box_texts(source: random.Random, numbers: tuple[str, ...]) -> Iterator[str]:
    """Write four numbers in many notations, few of which lmms-eval reads."""
    for _ in range(1500):
        shown = source.choices(numbers, k=4)
        gap = source.choice((", ", ",", " , ", ",\n", "; "))
        opening, closing = source.choice((("[", "]"), ("[ ", " ]"), ("(", ")"), ("", "")))
        yield f"It is {opening}{gap.join(shown)}{closing}, yes"


def same_boxes(drawn: Iterator[str]) -> int:
    read = 0
    for text in drawn:
        ours = read_box_lmms(text)
        assert list(ours or (0, 0, 0, 0)) == utils_rec.parse_float_sequence_within(text)
        read += ours is not None
    return read


def test_boxes():
    assert same_boxes(box_texts(random.Random(9), ("0.25", "1", "12.5", ".5", "0"))) > 100


def test_boxes_with_negative_numbers():
    assert same_boxes(box_texts(random.Random(9), ("0.25", "-1", "-0.5"))) > 100


def test_iou():
    source = random.Random(11)

    def box() -> tuple[float, ...]:
        x, y = sorted(source.sample(range(100), 2)), sorted(source.sample(range(100), 2))
        return x[0] / 100, y[0] / 100, x[1] / 100, y[1] / 100

    for _ in range(1500):
        first, second = box(), box()
        assert iou(first, second) == pytest.approx(utils_rec.compute_iou(first, second), abs=1e-12)


@pytest.mark.skipif(shutil.which("java") is None, reason="caption metrics need Java")
def test_cider():
    from lmms_eval.tasks.refcoco.utils import refcoco_cider

    source, words = random.Random(10), ("man", "red shirt", "left", "dog", "on the", "a")

    def caption() -> str:
        return " ".join(source.choices(words, k=source.randint(1, 6)))

    said = [caption() for _ in range(40)]
    golds = [[caption() for _ in range(source.randint(1, 3))] for _ in said]
    payloads = [
        {"pred": text, "answer": gold, "ann_id": number}
        for number, (text, gold) in enumerate(zip(said, golds, strict=True))
    ]
    samples, _ = cider_of(tuple(said), tuple(map(tuple, golds)))
    assert samples.mean() == pytest.approx(refcoco_cider(payloads), abs=1e-9) != 0
