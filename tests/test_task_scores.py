"""Scores on small sets made by hand: what each benchmark counts, and how."""

from __future__ import annotations

import copy
import json
import random

import pytest
from etcbench.tasks.vqav2 import write_submission
from reference import REFERENCE, needs_reference

from etcbench import registry
from etcbench.errors import UsageError
from etcbench.loading import load_task, make_task
from etcbench.scoring.answers import consensus, vqa_norm
from etcbench.scoring.boxes import from_pixels, iou, read_boxes, tidy, to_pixels
from etcbench.scoring.captions import cider
from etcbench.scoring.choices import mmbench_lmms, mmbench_vlmeval
from etcbench.task import Doc

CHECKS = {
    "Two dogs": "2 dogs", "5-7": "5 7", "T-shirt, red": "t shirt red",
    "black / white": "black white", "3.": "3", "$3.50": "$3.50", "5 p.m.": "5 pm",
    "1,000": "1000", "12,34 56,78": "1234 5678", "1,,000": "1 000", "A.": "", "it's": "it's",
    "." * 40: "." * 8, "None.": "0", "dont": "don't", "Im": "im",
    "somebody'd": "somebodyd", "its": "its",
}  # fmt: skip


@pytest.mark.parametrize("text", CHECKS)
def test_vqa_normaliser(text):
    assert vqa_norm(text) == CHECKS[text]


@pytest.mark.parametrize(
    ("agree", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_consensus(agree, accuracy):
    answers = ["dog"] * agree + [f"cat{k}" for k in range(10 - agree)]
    assert consensus("dog", answers) == pytest.approx(accuracy, abs=1e-12)


def vqa(answers, kind="other"):
    row = {"question_id": 1, "image_id": 1, "question": "?", "answers": answers}
    return make_task("vqav2").doc({**row, "answer_type": kind}, 0)


@pytest.mark.parametrize(
    ("mode", "score"), [("official", 0), ("official+prenorm", 100), ("lmms", 100)]
)
def test_vqav2_unanimous_answers_are_compared_raw(mode, score):
    bare_strings = vqa(["yes"] * 10)
    records = vqa([{"answer": "yes", "answer_id": 1}] * 10)
    for doc in (bare_strings, records):
        assert make_task("vqav2").score([(doc, "Yes")], mode).value == score
    # nine others agree with each: equal answers must not all be left out
    assert make_task("vqav2").score([(bare_strings, "yes")], mode).value == 100


def test_vqav2_without_public_answers_writes_a_submission(tmp_path):
    task, doc = make_task("vqav2"), vqa(None)
    with pytest.raises(UsageError, match="no public answers"):
        task.score([(doc, "yes")])
    write_submission([(doc, "The Dog's."), (vqa([]), None)], tmp_path / "s.json")
    entries = json.loads((tmp_path / "s.json").read_text())
    assert entries == [{"question_id": 1, "answer": "dog 's"}, {"question_id": 1, "answer": ""}]


def mmb(index, gold, **options):
    row = {"index": index, "question": "?", "hint": None, "answer": gold, "category": "c"}
    return make_task("mmbench").doc({**row, **(options or dict.fromkeys("ABCD", "x"))}, 0)


def test_mmbench_circular():
    pairs = [
        (mmb(q + r * 1_000_000, "ABCD"[r]), "ABCD"[r] if (q, r) != (2, 3) else "A")
        for q in (1, 2)
        for r in range(4)
    ]
    task = make_task("mmbench")
    report = task.score(pairs)
    assert report.headline == {"circular": 50, "per_row": 87.5, "first_pass": 100}
    random.Random(1).shuffle(pairs)
    assert task.score(pairs) == report
    # an answer that cannot be read fails its question
    pairs = [(doc, "no idea" if doc.id == "1" else said) for doc, said in pairs]
    assert task.score(pairs).headline["circular"] == 0
    assert task.score(pairs).n_unparsed == 1


DIVERGENCES = {
    "The answer is A": (None, "A"), "Answer:D": (None, "D"), "[B]": (None, "B"),
    "**C**": (None, "C"), "it's B!": (None, "B"), "B;": (None, "B"), "maybe C...": (None, "C"),
    "E": ("E", None), "A, B": ("B", None), "A man is here": (None, "A"),
}  # fmt: skip


@pytest.mark.parametrize("text", DIVERGENCES)
def test_mmbench_rule_sets_diverge(text):
    choices = {"A": "red one", "B": "blue one", "C": "green one", "D": "black one"}
    assert (mmbench_lmms(text, choices), mmbench_vlmeval(text, choices)) == DIVERGENCES[text]


def test_mmbench_stated_answer_far_from_the_end():
    choices = {"A": "red one", "B": "blue one"}
    text = "The correct answer is **B**, for reasons that A does not explain at all here."
    assert mmbench_vlmeval(text, choices) == "B"
    assert mmbench_vlmeval("Cannot determine the answer", choices) == "Z"


@pytest.mark.parametrize("hole", [None, float("nan"), "", "nan", "None", " "])
def test_mmbench_options_stop_at_the_first_absent_letter(hole):
    doc = mmb(1, "A", A="yes", B="no", C=hole, D="left over")
    assert doc.fields["options"] == {"A": "yes", "B": "no"}


def mme(subtask="existence", picture="a", gold="Yes"):
    key = f"{subtask}/{picture}"
    row = {"question_id": key, "category": subtask, "question": "?", "answer": gold}
    return make_task("mme").doc(row, 0)


def test_mme_all_yes():
    names = load_subtasks()
    pairs = [
        (mme(name, picture, gold), "Yes")
        for name in names
        for picture in "ab"
        for gold in ("Yes", "No")
    ]
    report = make_task("mme").score(pairs)
    assert report.headline == {"total": 700, "perception": 500, "cognition": 200}
    for figures in report.breakdown["subtask"].values():
        assert (figures["acc"], figures["acc_plus"], figures["score"]) == (50, 0, 50)
    assert list(report.breakdown["subtask"]) == list(names)


def load_subtasks():
    from etcbench.tasks.mme import SUBTASKS

    assert len(SUBTASKS) == 14
    return SUBTASKS


def test_mme_pairs_are_found_by_id_and_must_be_whole():
    pairs = [(mme(gold="Yes"), "yes"), (mme(picture="b", gold="Yes"), "no")]
    with pytest.raises(UsageError, match=r"existence:existence/a has 1 rows.*exactly two"):
        make_task("mme").score(pairs)


def test_mme_official_reads_the_raw_text():
    doc = mme()
    task = make_task("mme")
    assert task.parse("  yes", doc, "official").status == "unparsed"
    assert task.parse("  yes", doc, "etcbench").value == "yes"
    assert task.parse("Y.", doc, "lmms").value == "yes"


@pytest.mark.parametrize(
    ("text", "right"),
    [("A.", False), ("A. x", True), ("The answer is A.", True), ("The answer is A", False)],
)
def test_scienceqa_llava_rule(text, right):
    task = make_task("scienceqa")
    doc = task.doc({"choices": ["x", "y"], "answer": 0, "image": b""}, 0)
    assert bool(task.score_one(doc, text).outcome) is right
    beyond = task.score_one(doc, "E")
    assert (beyond.outcome, beyond.parsed.status) == (0, "ok")


def test_scienceqa_contexts_overlap():
    task = make_task("scienceqa_full")
    rows = [("hint", b""), ("hint", None), ("", b""), ("", None)]
    pairs = [
        (task.doc({"choices": "xy", "answer": 0, "hint": hint, "image": image}, i), "A")
        for i, (hint, image) in enumerate(rows)
    ]
    report = task.score(pairs)
    sizes = {name: figures["n"] for name, figures in report.breakdown["context"].items()}
    assert sizes == {"text": 2, "image": 2, "none": 1}
    assert list(report.headline) == ["full", "img"]


def seed(row):
    base = {"question": "?", "answer": "A", "data_id": "1"}
    return make_task("seedbench").doc({**base, **row}, row["row"])


def test_seedbench_counts_rows_and_reports_three_accuracies():
    image = {"question_id": "49914", "data_type": "image", "question_type_id": 1}
    video = {"question_id": "v1", "data_type": "video", "question_type_id": 10}
    pairs = [
        (seed({**image, "row": 0}), "A"),
        (seed({**image, "row": 1}), "B"),
        (seed({**video, "row": 2}), "A"),
    ]
    report = make_task("seedbench").score(pairs)
    assert report.headline == {"image": 50, "video": 100, "all": pytest.approx(200 / 3)}
    assert report.n == 3
    assert report.breakdown["type"]["action recognition"]["n"] == 1


@needs_reference
def test_qbench_sizes_and_chance():
    path = REFERENCE / "scoring" / "qbench" / "llvisionqa_dev.json"
    records = json.loads(path.read_text())
    task = make_task("qbench")
    docs = [task.doc(task.from_official(record, path), i) for i, record in enumerate(records)]
    report = task.score((doc, None) for doc in docs)
    assert round(report.headline["chance"], 2) == 37.80
    kinds = report.breakdown["question_type"]
    assert {name: f["n"] for name, f in kinds.items()} == {
        "Yes-or-No": 550,
        "What": 452,
        "How": 493,
    }
    assert {name: round(f["chance"], 2) for name, f in kinds.items()} == {
        "Yes-or-No": 50.00, "What": 27.86, "How": 33.32,
    }  # fmt: skip
    concerns = {name: f["n"] for name, f in report.breakdown["question_concern"].items()}
    assert concerns == {
        "distortion": 514, "other": 432, "in-context distortion": 304, "in-context other": 245,
    }  # fmt: skip


def rec(bbox=(10, 10, 10, 10), size=(100, 60)):
    row = {"question_id": "1", "answer": "dog", "bbox": bbox, "size": size}
    return make_task("refcoco_rec").doc(row, 0)


def test_refcoco_overlap_of_exactly_a_half_counts():
    task = make_task("refcoco_rec")
    assert iou((10, 10, 20, 20), (10, 10, 20, 15)) == 0.5
    report = task.score([(rec(), "[10, 10, 20, 15]")], "pixel")
    assert report.headline["acc@0.5"] == 100
    assert report.headline["mean_iou"] == 50
    assert report.headline["acc@0.7"] == 0
    assert report.headline["centre_acc"] == 100


def test_refcoco_degenerate_boxes_do_not_raise():
    assert iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0
    assert iou((5, 5, 1, 1), (0, 0, 9, 9)) == 0
    task = make_task("refcoco_rec")
    for mode in task.modes:
        assert task.score([(rec((5, 5, 0, 0)), "[0, 0, 0, 0]")], mode).value == 0


@pytest.mark.parametrize("convention", ["unit", "unit_padded", "milli", "pixel"])
@pytest.mark.parametrize("size", [(100, 61), (61, 100), (64, 64)])
def test_coordinate_conventions_round_trip(convention, size):
    box = (3.0, 7.5, 40.0, 59.0)
    said = from_pixels(box, convention, *size)
    assert to_pixels(said, convention, *size) == pytest.approx(box, abs=1e-9)
    doc = rec((3.0, 7.5, 37.0, 51.5), size)
    text = f"[{', '.join(f'{v:.6f}' for v in said)}]"
    assert make_task("refcoco_rec").score([(doc, text)], convention).headline["mean_iou"] > 99.9


def test_padded_square_uses_integer_halves():
    # 100 wide, 61 high: 39 rows of padding, 19 of them above
    assert to_pixels((0, 0.19, 1, 0.8), "unit_padded", 100, 61) == pytest.approx((0, 0, 100, 61))
    assert from_pixels((0, 0, 100, 61), "unit_padded", 100, 61) == pytest.approx((0, 0.19, 1, 0.8))


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6, 7, 8]}]\n```',
         [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("see [.1 0.2, 3e-1 -0.4] or so", [(0.1, 0.2, 0.3, -0.4)]),
        ("<|box_start|>(1,2),(3,4)<|box_end|>", [(1, 2, 3, 4)]),
        ("x1=1, y1=2, x2=3, y2=4", [(1, 2, 3, 4)]),
        ("[1, 2, 3]", []),
        ("nothing", []),
    ],
)  # fmt: skip
def test_boxes_in_text(text, boxes):
    assert read_boxes(text) == boxes


def test_boxes_are_tidied_and_counted():
    assert tidy((30, -5, 10, 99), 20, 40) == (10, 0, 20, 40)
    parsed = make_task("refcoco_rec").parse("[1,2,3,4] [5,6,7,8]", rec(), "pixel")
    assert parsed.value == {"box": [1, 2, 3, 4], "count": 2}


def test_caption_of_one_sample_scores_zero():
    assert cider(["a red dog"], [["a red dog"]]).tolist() == [0]
    assert cider(["a dog", "a cat"], [["a dog"], ["a cat"]]).min() > 0


def test_pope_figures():
    task = make_task("pope")
    said = [("yes", "Yes"), ("yes", "no"), ("no", "Yes, it is."), ("no", "There is not one.")]
    pairs = [
        (
            task.doc(
                {"id": f"{kind}{i}", "question_id": i, "question": "?", "answer": gold,
                 "image_source": "x", "category": kind}, i
            ),
            text if kind == "random" else gold,
        )
        for kind in ("random", "popular")
        for i, (gold, text) in enumerate(said)
    ]  # fmt: skip
    report = task.score(pairs)
    random_part = report.breakdown["category"]["random"]
    assert random_part == {
        "f1": 50, "accuracy": 50, "precision": 50, "recall": 50, "yes_rate": 50, "n": 4,
    }  # fmt: skip
    assert report.headline["f1"] == 75
    assert report.breakdown["pooled"]["all"]["accuracy"] == 75


def test_pope_without_a_no_is_a_yes_officially():
    task = make_task("pope")
    doc = Doc("1", "1", (), {}, "yes", {"category": "random"})
    parsed = task.parse("maybe. No", doc, "official")
    assert (parsed.value, parsed.status) == ("yes", "unparsed")
    assert task.parse("maybe", doc, "lmms").value == "maybe"


MICRO = sorted(registry.builtin_modules("tasks"))


@pytest.fixture(autouse=True)
def _no_virtual_machine(monkeypatch):
    # METEOR starts one for every score
    monkeypatch.setattr("etcbench.scoring.captions._has_java", lambda: False)


def replies(docs, seed=3):
    draw = random.Random(seed)
    texts = ["Yes", "no", "A", "B.", "2", "dog", "[0.1, 0.2, 0.5, 0.6]", "?", "", None]
    return [(doc, draw.choice(texts)) for doc in docs]


@pytest.mark.parametrize("name", MICRO)
def test_order_does_not_matter_and_gold_is_not_touched(name):
    loaded = load_task(name, "micro", limit=60)
    pairs = replies(loaded.docs)
    before = copy.deepcopy([(doc.gold, dict(doc.fields), dict(doc.categories)) for doc, _ in pairs])
    for mode in loaded.task.modes:
        report = loaded.task.score(pairs, mode)
        shuffled = pairs[:]
        random.Random(5).shuffle(shuffled)
        assert loaded.task.score(shuffled, mode).to_dict() == report.to_dict()
        assert report.n == len(pairs)
        assert report.n_error == sum(text is None for _, text in pairs)
        assert report.n_unparsed >= report.n_error
        assert report.interval.low <= report.value + 1e-9 <= report.interval.high + 2e-9
        json.dumps(report.to_dict())
    after = [(doc.gold, dict(doc.fields), dict(doc.categories)) for doc, _ in pairs]
    assert after == before


@pytest.mark.parametrize("name", MICRO)
def test_right_answers_score_full_marks(name):
    loaded = load_task(name, "micro", limit=40)
    task = loaded.task
    pairs = []
    for doc in loaded.docs:
        if name == "refcoco_rec":
            box = from_pixels(doc.gold, "unit", *doc.fields["size"])
            pairs.append((doc, f"[{', '.join(f'{v:.4f}' for v in box)}]"))
        elif isinstance(doc.gold, tuple):
            pairs.append((doc, max(doc.gold, key=doc.gold.count)))
        else:
            pairs.append((doc, doc.gold))
    report = task.score(pairs)
    if name == "refcoco_caption":
        assert report.value > 300
    elif name == "mme":
        assert report.value == 200 * len(report.breakdown["subtask"])
    else:
        assert report.value == 100
    if report.unit == "%":
        assert report.interval.high == pytest.approx(100)
