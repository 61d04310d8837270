"""Any text at all: a parsed value or "unparsed", never an exception, and in linear time."""

from __future__ import annotations

import importlib.util
import shutil
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etcbench import registry
from etcbench.errors import UsageError
from etcbench.loading import load_task
from etcbench.scoring import captions
from etcbench.scoring.answers import evalai_norm, lmms_vqa_norm, vqa_norm
from etcbench.scoring.boxes import guess_convention, read_box_lmms, read_boxes, tidy, to_pixels
from etcbench.scoring.captions import cider, tokenise
from etcbench.scoring.choices import (
    mmbench_lmms,
    mmbench_lmms_static,
    mmbench_vlmeval,
    mme_answer,
    mme_answer_lmms,
    pope_answer,
    qbench_lmms,
    scienceqa_letter,
    scienceqa_letter_lmms,
    seed_letter,
)

CHOICES = {"A": "a red apple", "B": "", "C": "ünïcode", "D": "nan"}
PIECES = st.sampled_from(
    ["A", "B.", "(C)", "yes", "No", "answer is ", "The answer is A.", "[0.1, ", "1e999", "-", ".5",
     '"bbox_2d": [', "]", "<|box_start|>(", "),(", "n't", "'s", "1,000", "\n", "\t", "\x00", "  ",
     "\u2028", "\ud83d\ude00", "１", "²", "İ", "ß", "\u0301"]
)  # fmt: skip
# lone surrogates included: a tokenizer may emit them
TEXT = st.one_of(
    st.text(st.characters(), max_size=200),
    st.lists(PIECES, max_size=30).map("".join),
)
PARSERS = {
    "vqa_norm": vqa_norm,
    "evalai_norm": evalai_norm,
    "lmms_vqa_norm": lmms_vqa_norm,
    "mme_answer": mme_answer,
    "mme_answer_lmms": mme_answer_lmms,
    "pope_answer": pope_answer,
    "mmbench_lmms": lambda text: mmbench_lmms(text, CHOICES),
    "mmbench_lmms_static": lambda text: mmbench_lmms_static(text, CHOICES),
    "mmbench_vlmeval": lambda text: mmbench_vlmeval(text, CHOICES),
    "seed_letter": seed_letter,
    "scienceqa_letter": scienceqa_letter,
    "scienceqa_letter_lmms": scienceqa_letter_lmms,
    "qbench_lmms": lambda text: qbench_lmms(text, CHOICES),
    "read_boxes": read_boxes,
    "read_box_lmms": read_box_lmms,
    "tokenise": tokenise,
}
MEGABYTE = 1_000_000
LONG = {
    "letters": "a" * MEGABYTE,
    "digits": "1" * MEGABYTE,
    "brackets": "[" * MEGABYTE,
    "open numbers": "[1, 2, " * (MEGABYTE // 7),
    "spaces": "[1," + " " * MEGABYTE + "x",
    "periods": "." * MEGABYTE,
    "commas": "1," * (MEGABYTE // 2),
    "words": "the answer is A. " * (MEGABYTE // 17),
    "newlines": "\n" * MEGABYTE,
    "signs": "+-" * (MEGABYTE // 2),
    "control": "\x00\x1b\x7f" * (MEGABYTE // 3),
}
SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TASKS = {name: load_task(name, "micro") for name in registry.builtin_modules("tasks")}


@pytest.mark.parametrize("name", PARSERS)
@SETTINGS
@given(text=TEXT)
def test_parsers_take_any_text(name, text):
    PARSERS[name](text)


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("kind", LONG)
def test_parsers_take_a_megabyte(name, kind):
    start = time.process_time()
    PARSERS[name](LONG[kind])
    # quadratic behaviour would take hours
    assert time.process_time() - start < 20


@pytest.mark.parametrize("name", TASKS)
@SETTINGS
@given(text=TEXT)
def test_every_benchmark_scores_any_text(name, text):
    task, docs = TASKS[name].task, TASKS[name].docs
    for mode in task.modes:
        scored = task.score_one(docs[0], text, mode)
        assert scored.parsed.status in ("ok", "unparsed")
        assert 0 <= scored.outcome <= 1
        missing = task.score_one(docs[0], None, mode)
        assert (missing.outcome, missing.parsed.status) == (0, "unparsed")


@pytest.mark.parametrize("name", TASKS)
def test_an_empty_response_is_unparsed(name):
    task, docs = TASKS[name].task, TASKS[name].docs
    for mode in task.modes:
        assert task.score_one(docs[0], "", mode).parsed.status == "unparsed"


@SETTINGS
@given(text=TEXT)
def test_normalising_again_keeps_words_clean(text):
    words = vqa_norm(text).split(" ")
    assert not {"a", "an", "the", "two"} & set(words)
    assert vqa_norm(text) == vqa_norm(text.upper()) or not text.isascii()


@SETTINGS
@given(
    box=st.tuples(*[st.floats(allow_nan=False)] * 4), size=st.tuples(*[st.integers(1, 9999)] * 2)
)
def test_any_box_ends_inside_the_picture(box, size):
    for convention in ("unit", "unit_padded", "milli", "pixel", guess_convention(box)):
        x0, y0, x1, y1 = tidy(to_pixels(box, convention, *size), *size)
        assert 0 <= x0 <= x1 <= size[0]
        assert 0 <= y0 <= y1 <= size[1]


@SETTINGS
@given(texts=st.lists(TEXT, min_size=1, max_size=5))
def test_cider_of_any_captions_is_finite(texts):
    tokens = [tokenise(text) for text in texts]
    scores = cider(tokens, [[text, "a dog"] for text in tokens])
    assert ((scores >= 0) & (scores <= 10 + 1e-9)).all()


# The tokeniser of captions ----------------------------------------------------------------------

CAPTIONS = ["The man on the left.", "a dog's bowl, isn't it?", "", "red-shirted woman (top)", "."]
ORIGINAL = pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="the original tokeniser needs Java and the extra caption",
)


@pytest.fixture
def nothing_remembered():
    for kept in (captions.cider_of, captions._tokens):
        kept.cache_clear()
    yield
    for kept in (captions.cider_of, captions._tokens):
        kept.cache_clear()


@ORIGINAL
def test_both_tokenisers_give_the_same_scores_and_say_nothing(
    nothing_remembered, monkeypatch, capfd
):
    """The original's program writes its speed to stderr; that is kept off the terminal."""
    known = tuple((f"{text} there", "a dog", "") for text in CAPTIONS)
    scores, note = captions.cider_of(tuple(CAPTIONS), known)
    assert note == "tokenised by the original Penn Treebank tokeniser"
    assert capfd.readouterr() == ("", "")
    captions.cider_of.cache_clear(), captions._tokens.cache_clear()
    monkeypatch.setattr(captions, "_has_java", lambda: False)
    again, note = captions.cider_of(tuple(CAPTIONS), known)
    assert note == "tokenised by the built-in tokeniser"
    assert scores.tolist() == again.tolist() and scores.any()


@pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="extra caption")
def test_java_that_fails_is_wrong_usage(nothing_remembered, monkeypatch, tmp_path):
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\necho no runtime to be found >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="ended with: no runtime to be found; repair Java"):
        captions.cider_of(("a dog",), (("a cat",),))
