"""Row by row against the outputs of published normalisers and parsers."""

from __future__ import annotations

import pytest
from reference import golden, needs_reference

from etcbench.loading import make_task
from etcbench.scoring.answers import evalai_norm, vqa_norm, vqa_punctuation
from etcbench.scoring.boxes import centre_inside, iou, read_box_lmms
from etcbench.scoring.choices import (
    mmbench_lmms,
    mmbench_lmms_static,
    mmbench_vlmeval,
    mme_answer,
    mme_answer_lmms,
    qbench_lmms,
    scienceqa_letter,
    scienceqa_letter_lmms,
)
from etcbench.task import Doc

pytestmark = needs_reference


def test_vqa_normalisers():
    rows = golden("vqa_normalise")
    assert len(rows) == 9582
    for row in rows:
        assert vqa_punctuation(row["in"]) == row["official_punct"]
        assert vqa_norm(row["in"]) == row["official"]
        assert evalai_norm(row["in"]) == row["evalai"]


def test_mmbench_rule_sets():
    rows = golden("mmbench_extract")
    assert len(rows) == 119
    for row in rows:
        text, choices = row["prediction"], row["choices"]
        assert (mmbench_lmms(text, choices) or False) == row["lmms_eval_0.7.3_can_infer"], text
        assert (mmbench_vlmeval(text, choices) or False) == row["vlmevalkit_can_infer"], text
        fallback = mmbench_lmms_static(text, choices) or ""
        assert fallback == row["lmms_eval_0.7.3_static_fallback"], text


def test_mme_rules():
    rows = golden("mme_parse")
    assert len(rows) == 24
    for row in rows:
        text = row["response"]
        assert (mme_answer(text) or "other") == row["official_line"], text
        assert (mme_answer(text.strip()) or "other") == row["official_after_strip"], text
        assert (mme_answer_lmms(text) or "other") == row["lmms_eval_0.7.3"], text


def test_scienceqa_rules():
    task = make_task("scienceqa")
    rows = golden("sqa_parse")
    assert len(rows) == 78
    for row in rows:
        text = row["text"]
        letter = scienceqa_letter(text)
        assert (letter or "FAILED") == row["llava_parsed"], text
        index = "ABCDE".find(letter or "?")
        assert (index if index < row["n_choices"] else -1) == row["llava_index"], text
        fields = {"choices": ["x"] * row["n_choices"], "answer": row["gt_index"], "image": b""}
        doc = task.doc(fields, 0)
        assert bool(task.score_one(doc, text, "llava").outcome) is row["llava_correct"], text
        assert bool(task.score_one(doc, text, "lmms").outcome) is row["lmms_eval_0.7.3_correct"]
        assert (scienceqa_letter_lmms(text) == doc.gold) is row["lmms_eval_0.7.3_correct"]


def test_qbench_rule_of_lmms():
    rows = golden("qbench_parse")
    assert len(rows) == 42
    for row in rows:
        choices = dict(zip("ABCD", row["candidates"], strict=False))
        assert qbench_lmms(row["response"], choices) == row["lmms_eval_0.7.3"], row["response"]


def test_gqa_modes():
    task = make_task("gqa")
    rows = golden("gqa_match")
    assert len(rows) == 9
    columns = {
        "official": "official_raw_equal",
        "llava": "llava_correct",
        "etcbench": "llava_correct_if_decoder_strips",
        "lmms": "lmms_eval_0.7.3_exact_match",
    }
    for row in rows:
        doc = Doc("1", "1", (), {}, row["gold"])
        assert task.parse(row["text"], doc, "llava").value == row["llava_postprocessed"]
        for mode, column in columns.items():
            assert bool(task.score_one(doc, row["text"], mode).outcome) is row[column], (mode, row)


def test_seedbench_modes():
    task = make_task("seedbench")
    rows = golden("seed_parse")
    assert len(rows) == 6
    doc = Doc("1", "1", (), {}, "A")
    for row in rows:
        assert task.parse(row["text"], doc, "llava").value == row["llava_pred"]
        assert task.parse(row["text"], doc, "lmms").value == row["lmms_eval_0.7.3_pred"]


def test_boxes():
    rows = golden("refcoco_iou")
    assert len(rows) == 254
    for row in rows:
        gold, box = tuple(row["gt"]), tuple(row["pred"])
        assert iou(gold, box) == pytest.approx(row["iou"], abs=1e-9)
        assert (iou(gold, box) >= 0.5) is row["acc@0.5"]
        assert centre_inside(box, gold) is row["center_in_gt"]
    rows = golden("refcoco_box_parse")
    assert len(rows) == 10
    for row in rows:
        found = read_box_lmms(row["response"]) or (0, 0, 0, 0)
        assert list(found) == row["lmms_eval_0.7.3_bbox_rec"]
