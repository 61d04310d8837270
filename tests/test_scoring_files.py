"""Predictions files: every published figure, every format, and what is said about bad rows."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
from reference import REFERENCE, expected, needs_reference

from etcbench.errors import UsageError
from etcbench.loading import load_task, make_task
from etcbench.scoring.files import score_file
from etcbench.scoring.formats import FORMATS

SCORING = REFERENCE / "scoring"
EXPECTED = expected()


def near(name, value):
    entry = EXPECTED[name]
    assert value == pytest.approx(entry["recomputed"], abs=1e-9), name
    if entry["published"] is not None:
        assert abs(value - entry["published"]) <= entry["tolerance"], name
    return entry


@needs_reference
def test_mme_of_lavin():
    report = score_file("mme", SCORING / "mme_lavin", mode="official")
    checked = 0
    for name in EXPECTED:
        kind, _, subtask = name.partition(".")
        if kind != "mme_lavin":
            continue
        if subtask in report.headline:
            near(name, report.headline[subtask])
        else:
            figures = report.breakdown["subtask"][subtask]
            entry = near(name, figures["score"])
            for ours, theirs in (("acc", "acc"), ("acc_plus", "acc_plus"), ("n", "n")):
                assert figures[ours] == pytest.approx(entry[theirs], abs=1e-9)
            assert figures["n_other"] == entry["n_other"]
        checked += 1
    assert checked == 16
    assert (report.n, report.n_unparsed) == (2374, 12)


@needs_reference
@pytest.mark.parametrize("task", ["scienceqa_full", "scienceqa"])
@pytest.mark.parametrize("reading", ["index", "text"])
def test_scienceqa_of_gpt3(task, reading):
    folder = SCORING / "scienceqa_gpt3"
    form = "scienceqa-index" if reading == "index" else None
    predictions = folder / "final_test_QCM-ALE_2_seed_3.json"
    report = score_file(task, predictions, folder / "test_gold.json", format=form)
    part = "all" if task == "scienceqa_full" else "img"
    entry = near(f"scienceqa_gpt3.{reading}.{part}", report.value)
    assert report.n == entry["n"]
    assert report.n_unparsed == entry.get("n_unparsed", 0)
    if part == "all":
        near(f"scienceqa_gpt3.{reading}.img", report.headline["img"])


@needs_reference
def test_seedbench_of_gpt4v():
    report = score_file("seedbench", SCORING / "seed_gpt4v" / "GPT-4V_SEED-Bench-1.json")
    for part in ("image", "video", "all"):
        near(f"seed_gpt4v.{part}", report.headline[part])
    # eight question ids occur twice; rows count, not ids
    assert report.n == 17997


@needs_reference
def test_refcoco_captions():
    folder = SCORING / "refcoco_caption"
    report = score_file(
        "refcoco_caption",
        folder / "sample_expressions_testA.json",
        folder / "derived_refcoco_testA_refs.json",
    )
    assert report.n == 1975
    near("refcoco_testA.CIDEr", report.headline["CIDEr"])
    assert report.value == pytest.approx(66.9083142149, abs=1e-9)
    names = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "METEOR"]
    if importlib.util.find_spec("pycocoevalcap") is None:
        names = []
    elif shutil.which("java") is None:
        names.remove("METEOR")
    for name in names:
        near(f"refcoco_testA.{name}", report.headline[name])


@needs_reference
def test_qbench_chance_and_always_a(tmp_path):
    records = json.loads((SCORING / "qbench" / "llvisionqa_dev.json").read_text())
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps({**record, "response": "A"}) for record in records))
    report = score_file("qbench", path)
    assert report.n == near("qbench_dev.always_A", report.headline["accuracy"])["n"]
    near("qbench_dev.chance.all", report.headline["chance"])
    for kind in ("Yes-or-No", "What", "How"):
        figures = report.breakdown["question_type"][kind]
        assert figures["n"] == near(f"qbench_dev.chance.{kind}", figures["chance"])["n"]


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def right(doc):
    gold = doc.gold
    return gold[0] if isinstance(gold, tuple) else gold


@pytest.mark.parametrize("name", ["mme", "pope", "vqav2", "gqa", "seedbench", "mmbench", "textvqa"])
@pytest.mark.parametrize("form", ["etcbench", "llava"])
def test_own_and_llava_answers_on_micro_data(tmp_path, name, form):
    loaded = load_task(name, "micro")
    task, docs = loaded.task, list(loaded.docs.without_pictures())
    records = [
        {"id": doc.id, "response": right(doc), "status": "ok"}
        if form == "etcbench"
        else {
            "question_id": doc.fields["question_id"],
            "prompt": task.prompt(doc, "llava"),
            "text": right(doc),
        }
        for doc in docs
    ]
    if form == "llava" and name == "pope":
        # the hub's question_id starts again in every category; LLaVA's files number through
        for record, doc in zip(records, docs, strict=True):
            record["question_id"] = doc.id
    path = write(tmp_path / "answers.jsonl", records)
    report = score_file(name, path, data="micro")
    assert report.to_dict() == task.score((doc, right(doc)) for doc in docs).to_dict()
    assert score_file(name, path, data="micro", format=form).value == report.value


def test_llava_texts_are_joined_by_prompt_when_ids_are_shared(tmp_path):
    gold = write(
        tmp_path / "gold.jsonl",
        [
            {"question_id": 1, "image_id": "x", "question": "What brand?", "answers": ["a"] * 10},
            {"question_id": 2, "image_id": "x", "question": "What?", "answers": ["b"] * 10},
        ],
    )
    answers = write(
        tmp_path / "answers.jsonl",
        [
            {"question_id": "x", "prompt": "what?\nAnswer it.", "text": "b"},
            {"question_id": "x", "prompt": "what brand?\nAnswer it.", "text": "a"},
        ],
    )
    assert score_file("textvqa", answers, gold).value == 100


def test_vqa_submission_with_official_annotations(tmp_path):
    annotations = {
        "info": {"version": "2"},
        "annotations": [
            {
                "question_id": k, "image_id": k, "answer_type": "other",
                "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(people)],
            }
            for k, people in ((7, ["yes"] * 10), (8, ["dog"] * 2 + ["cat"] * 8))
        ],
    }  # fmt: skip
    gold = tmp_path / "annotations.json"
    gold.write_text(json.dumps(annotations))
    path = tmp_path / "submission.json"
    path.write_text(json.dumps([{"question_id": 7, "answer": "Yes"}]))
    report = score_file("vqav2", path, gold, mode="official")
    # "Yes" against ten "yes" is wrong in the official script, and a missing answer is too
    assert (report.value, report.n, report.n_error) == (0, 2, 1)
    assert "1 of 2 samples have no prediction" in report.notes[0]
    assert score_file("vqav2", path, gold).value == 50


def test_gqa_official_files(tmp_path):
    questions = {"201": {"question": "Is it?", "answer": "no", "imageId": "n1", "types": {}}}
    (tmp_path / "gold.json").write_text(json.dumps(questions))
    (tmp_path / "p.json").write_text(json.dumps([{"questionId": "201", "prediction": "No."}]))
    assert score_file("gqa", tmp_path / "p.json", tmp_path / "gold.json").value == 100


def test_pope_official_gold(tmp_path):
    gold = write(
        tmp_path / "coco_pope_random.json",
        [{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}],
    )
    answers = write(
        tmp_path / "a.jsonl", [{"question_id": 1, "text": "Yes, there is.", "prompt": ""}]
    )
    report = score_file("pope", answers, gold)
    assert report.value == 100
    assert list(report.breakdown["category"]) == ["random"]


def test_lmms_sample_log(tmp_path):
    doc = {"question_id": "count/a.jpg", "question": "Two?", "answer": "Yes", "category": "count"}
    path = write(
        tmp_path / "log.jsonl",
        [
            {"doc_id": 0, "doc": doc, "filtered_resps": ["yes"], "resps": [["yes"]]},
            {"doc_id": 1, "doc": {**doc, "answer": "No"}, "filtered_resps": ["no"]},
        ],
    )
    assert score_file("mme", path, mode="lmms").value == 200


@pytest.mark.parametrize("ending", [".xlsx", ".csv", ".tsv"])
def test_mmbench_sheet(tmp_path, ending):
    import pandas

    rows = [
        {"index": index, "question": "Which?", "A": "cat", "B": "dog", "C": "", "answer": gold,
         "prediction": said, "category": "c", "l2-category": "l"}
        for index, gold, said in ((3, "A", "A"), (1000003, "B", "The answer is B."),
                                  (4, "B", "dog"), (1000004, "A", "B"))
    ]  # fmt: skip
    path = tmp_path / f"sheet{ending}"
    frame = pandas.DataFrame(rows)
    if ending == ".xlsx":
        pytest.importorskip("openpyxl")
        frame.to_excel(path, index=False)
    else:
        frame.to_csv(path, index=False, sep="\t" if ending == ".tsv" else ",")
    report = score_file("mmbench", path)
    assert report.headline == {"circular": 50, "per_row": 75, "first_pass": 100}
    assert report.breakdown["l2_category"]["l"] == {"circular": 50, "n": 2}


BAD = {
    "not json": ('{"question_id": 1, "text": "a"}\n{"question_id": 2, "te', ":2: not a json"),
    "no field": ('{"question_id": 1, "text": "a"}\n{"question_id": 2}', ":2: no field 'text'"),
    "no text": ('{"question_id": 1, "text": {"a": 1}}\n{}', ":1: 'text' is not text"),
    "no record": ('{"question_id": 1, "text": "a"}\n[2, 3]', ":2: not a record"),
    "unknown": ('{"question_id": 5, "text": "a"}\n\n', "entry 1: vqav2 has no question '5'"),
    "twice": (
        '{"question_id": 1, "text": "a"}\n{"question_id": 1, "text": "b"}',
        ":2: question '1' was answered before, at ",
    ),
    "empty": ("", "holds no predictions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(tmp_path, case):
    text, message = BAD[case]
    gold = write(
        tmp_path / "gold.jsonl",
        [{"question_id": k, "image_id": k, "answers": ["a"] * 10} for k in (1, 2)],
    )
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        score_file("vqav2", path, gold, format="llava")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_mme_line_is_named(tmp_path):
    (tmp_path / "count.txt").write_text("a.jpg\tTwo?\tYes\tyes\na.jpg\tThree?\tNo\n")
    with pytest.raises(UsageError, match=r"count\.txt:2: 3 of 4 columns"):
        score_file("mme", tmp_path)


def test_what_is_missing_is_said(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question_id": 1, "text": "a"}])
    with pytest.raises(UsageError, match="carries no gold answers; give --gold"):
        score_file("vqav2", path)
    with pytest.raises(UsageError, match="does not exist"):
        score_file("vqav2", path, tmp_path / "nothing.json")
    with pytest.raises(UsageError, match="do not exist"):
        score_file("vqav2", tmp_path / "nothing.json")
    with pytest.raises(UsageError, match="unknown format 'lava'; did you mean llava"):
        score_file("vqav2", path, format="lava")
    with pytest.raises(UsageError, match="did you mean official"):
        score_file("vqav2", path, path, mode="oficial")
    odd = write(tmp_path / "odd.jsonl", [{"what": 1}])
    with pytest.raises(UsageError, match="is in no known format"):
        score_file("vqav2", odd)
    assert set(FORMATS) >= {"etcbench", "llava", "lmms", "mme", "sheet", "vqa", "scienceqa"}


def test_an_errored_record_is_a_missing_answer(tmp_path):
    docs = list(load_task("mme", "micro", limit=4).docs)
    records = [{"id": doc.id, "response": "Yes", "status": "ok"} for doc in docs]
    records[0] = {"id": docs[0].id, "status": "error"}
    path = write(tmp_path / "records.jsonl", records)
    report = score_file(make_task("mme"), path, format="etcbench", data="micro", limit=4)
    assert (report.n, report.n_error, report.n_unparsed) == (4, 1, 1)
