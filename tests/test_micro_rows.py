import io
import re
from collections import Counter, defaultdict
from functools import cache

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from reference import REFERENCE, needs_reference

from etcbench.errors import UsageError
from etcbench.micro.rows import DATA, SEED, benchmarks, build_table
from etcbench.micro.scenes import scene_at

STEMS = list(benchmarks())
POPE_CATEGORIES = ("adversarial", "popular", "random")


@cache
def rows(stem):
    return pq.read_table(DATA / f"{stem}.parquet").to_pylist()


def picture(row):
    return row["image"][0] if isinstance(row["image"], list) else row["image"]


@pytest.mark.parametrize("stem", STEMS)
def test_the_committed_file_is_what_the_code_builds(stem):
    table = build_table(stem)
    committed = pq.read_table(DATA / f"{stem}.parquet")
    assert committed.column_names == table.column_names
    built = table.to_pylist()
    assert len(built) == len(rows(stem))
    for ours, theirs in zip(built, rows(stem), strict=True):
        # JPEG coders differ in the last bit between versions, so pictures are compared as pixels
        a, b = (Image.open(io.BytesIO(picture(row)["bytes"])) for row in (ours, theirs))
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 8
        assert {k: v for k, v in ours.items() if k != "image"} == {
            k: v for k, v in theirs.items() if k != "image"
        }


@needs_reference
@pytest.mark.parametrize("stem", ["mme", "pope", "vqav2", "seedbench", "refcoco"])
def test_columns_are_those_of_the_benchmark(stem):
    reference = datasets.Dataset.from_parquet(str(REFERENCE / "photos" / f"{stem}.parquet"))
    ours = datasets.Dataset.from_parquet(str(DATA / f"{stem}.parquet"))
    assert ours.features == reference.features


@pytest.mark.parametrize("stem", STEMS)
def test_files_are_small_and_datasets_reads_the_pictures(stem):
    file = DATA / f"{stem}.parquet"
    table = datasets.Dataset.from_parquet(str(file))
    assert 200 <= len(table) <= 600
    assert file.stat().st_size < 1_000_000
    shown = table[0]["image"]
    shown = shown[0] if isinstance(shown, list) else shown
    assert shown.size == (64, 64)


def test_a_shared_picture_is_stored_once():
    total = sum(len(picture(row)["bytes"]) for row in rows("pope"))
    assert (DATA / "pope.parquet").stat().st_size < total / 4


@pytest.mark.parametrize("stem", STEMS)
def test_pictures_come_from_the_stream_their_name_says(stem):
    shares = Counter()
    for row in rows(stem):
        path = picture(row)["path"]
        policy, index = re.fullmatch(r"(\w+)_(\d+)\.jpg", path).groups()
        shares[path] = policy
        if stem != "qbench":
            scene = scene_at(SEED, int(index), policy)[0]
            stored = np.asarray(Image.open(io.BytesIO(picture(row)["bytes"])))
            assert np.abs(stored.astype(int) - scene.render()).mean() < 6
    policies = Counter(shares.values())
    assert "train" not in policies
    assert 0.2 < policies["combo"] / policies.total() < 0.45


def test_mme_has_a_yes_and_a_no_for_every_picture():
    pairs = defaultdict(list)
    first = Counter()
    for row in rows("mme"):
        if row["question_id"] not in pairs:
            first[row["answer"]] += 1
        pairs[row["category"], row["question_id"]].append(row["answer"])
        assert row["question"].endswith("? Please answer yes or no.")
    assert all(sorted(answers) == ["No", "Yes"] for answers in pairs.values())
    assert {c for c, _ in pairs} == {"existence", "count", "position", "color", "OCR"}
    assert min(first.values()) > 0.35 * first.total()


def test_pope_is_balanced_within_every_picture_and_category():
    groups = defaultdict(Counter)
    for row in rows("pope"):
        groups[row["category"], row["image_source"]][row["answer"]] += 1
    assert all(count == {"yes": 2, "no": 2} for count in groups.values())
    assert {category for category, _ in groups} == set(POPE_CATEGORIES)
    assert len({row["id"] for row in rows("pope")}) == len(rows("pope"))
    for category in POPE_CATEGORIES:
        numbers = [int(r["question_id"]) for r in rows("pope") if r["category"] == category]
        assert numbers == list(range(1, len(numbers) + 1))


def test_vqa_answers_disagree_here_and_there_but_the_majority_holds():
    unanimous = []
    for row in rows("vqav2"):
        given = Counter(answer["answer"] for answer in row["answers"])
        assert [answer["answer_id"] for answer in row["answers"]] == list(range(1, 11))
        assert given.most_common(1)[0][0] == row["multiple_choice_answer"]
        unanimous.append(len(given) == 1)
    assert 0.55 < np.mean(unanimous) < 0.75
    assert {row["answer_type"] for row in rows("vqav2")} == {"yes/no", "number", "other"}
    assert len({row["question_id"] for row in rows("vqav2")}) == len(rows("vqav2"))
    per_picture = Counter(row["image_id"] for row in rows("vqav2"))
    assert min(per_picture.values()) >= 4 and max(per_picture.values()) <= 6


def test_mmbench_holds_every_rotation_once_and_originals_first():
    for stem in ("mmbench", "mmbench_cn"):
        groups = defaultdict(dict)
        for row in rows(stem):
            groups[row["index"] % 1_000_000][row["index"] // 1_000_000] = row
        for rotations in groups.values():
            options = [row for row in "ABCD" if rotations[0][row] != "nan"]
            assert sorted(rotations) == list(range(len(options)))
            assert len({row[row["answer"]] for row in rotations.values()}) == 1
            assert len({row["answer"] for row in rotations.values()}) == len(options)
        steps = [row["index"] // 1_000_000 for row in rows(stem)]
        assert steps == sorted(steps)


def test_gold_letters_are_spread():
    letters = Counter(row["answer"] for row in rows("seedbench"))
    assert min(letters.values()) > 0.18 * letters.total()
    for row in rows("scienceqa"):
        assert 2 <= len(row["choices"]) <= 5
        assert 0 <= row["answer"] < len(row["choices"])


def test_refcoco_boxes_lie_in_the_picture():
    for row in rows("refcoco"):
        x, y, w, h = row["bbox"]
        assert x >= 0 and y >= 0 and x + w <= 64 and y + h <= 64 and min(w, h) >= 8
        assert row["answer"] and row["file_name"] == row["image"]["path"]


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(UsageError, match="mmbench"):
        build_table("mmbenhc")
