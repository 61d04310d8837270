"""One golden prompt per benchmark and style, written out in full."""

from __future__ import annotations

import pytest

from etcbench import registry
from etcbench.errors import UsageError
from etcbench.loading import make_task

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
BOX = "lease provide the bounding box coordinate of the region this sentence describes: left dog"

MME = {
    "question_id": "existence/000000006040.jpg", "category": "existence", "answer": "Yes",
    "question": "Is there a train in this image?  Please answer yes or no.",
}  # fmt: skip
POPE = {
    "id": "0", "question_id": "1", "question": "Is there a snowboard in the image?",
    "answer": "yes", "image_source": "COCO_val2014_000000310196", "category": "adversarial",
}  # fmt: skip
VQA = {"question_id": 1, "image_id": 1, "question": "What is it?", "answers": ["x"] * 10}
GQA = {"id": "2", "imageId": "n1", "question": "Is it overcast?", "answer": "no"}
TEXTVQA = {
    "question_id": 34602, "image_id": "003a8ae2ef43b901", "answers": ["dakota"] * 10,
    "question": "what is the brand of this Camera?", "ocr_tokens": ["DAKOTA", "DIGITAL"],
}  # fmt: skip
SEED = {
    "question_id": "101669", "question": "How many towels are in the image?", "choice_a": "One",
    "choice_b": "Two", "choice_c": "Three", "choice_d": "Four", "answer": "A",
    "data_type": "image", "data_id": "1", "question_type_id": 5,
}  # fmt: skip
SQA = {
    "question": "Which state is  farthest north?", "choices": ["Ohio", "Utah"], "answer": 0,
    "hint": "Look at the map.", "image": b"",
}  # fmt: skip
MMB = {
    "index": 241, "question": "What can be asked?", "hint": "The passage below.", "A": "Can it?",
    "B": "Will it?", "C": "nan", "D": "nan", "answer": "B", "category": "c",
}  # fmt: skip
QB = {
    "id": "1", "question": "How is the lighting of this building?", "option0": "High",
    "option1": "Low", "option2": "Medium", "option3": "N/A", "question_type": 2,
    "question_concern": 3, "correct_choice": "B",
}  # fmt: skip
REF = {
    "question_id": "1", "question": "Please caption the area.", "answer": ["left dog", "dog"],
    "bbox": [1.0, 2.0, 3.0, 4.0],
}  # fmt: skip
REC = {**REF, "answer": "left dog"}

PROMPTS = [
    ("mme", MME, "llava", "Is there a train in this image?" + WORD),
    ("mme", MME, "lmms", "Is there a train in this image? " + WORD),
    ("mme", MME, "official", MME["question"]),
    ("mme", MME, "gpt4v", "Is there a train in this image? \nAnswer the question with Yes or No."),
    ("mme", MME, "qwen_vl", "Is there a train in this image?  Answer:"),
    ("pope", POPE, "llava", POPE["question"] + WORD),
    ("pope", POPE, "lmms", POPE["question"] + WORD),
    ("pope", POPE, "official", POPE["question"]),
    ("vqav2", VQA, "llava", "What is it?" + WORD),
    ("vqav2", VQA, "lmms", "What is it?" + WORD),
    ("vqav2", VQA, "official", "What is it?"),
    ("gqa", GQA, "llava", "Is it overcast?" + WORD),
    ("gqa", GQA, "lmms", "Is it overcast?" + WORD),
    ("gqa", GQA, "official", "Is it overcast?"),
    (
        "textvqa", TEXTVQA, "llava",
        "what is the brand of this Camera?\nReference OCR token: DAKOTA, DIGITAL" + WORD,
    ),
    ("textvqa", TEXTVQA, "llava-no-ocr", "what is the brand of this Camera?" + WORD),
    ("textvqa", TEXTVQA, "lmms", "What is the brand of this camera?" + WORD),
    (
        "textvqa", TEXTVQA, "lmms-ocr",
        "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL" + WORD,
    ),
    ("textvqa", TEXTVQA, "official", "what is the brand of this Camera?"),
    *(
        (
            "seedbench", SEED, style,
            f"How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four\n{LETTER}",
        )
        for style in ("llava", "lmms")
    ),
    (
        "scienceqa", SQA, "llava",
        "Context: Look at the map.\nWhich state is farthest north?\nA. Ohio\nB. Utah\n" + LETTER,
    ),
    (
        "scienceqa", SQA, "lmms",
        "Context: Look at the map.\nWhich state is  farthest north?\nA. Ohio\nB. Utah\n" + LETTER,
    ),
    ("scienceqa", {**SQA, "hint": ""}, "lmms",
     "Which state is  farthest north?\nA. Ohio\nB. Utah\n" + LETTER),
    (
        "scienceqa", {**SQA, "hint": ""}, "official",
        "Question: Which state is  farthest north?\nContext: N/A\nOptions: (A) Ohio (B) Utah\n"
        "Answer:",
    ),
    (
        "scienceqa", {**SQA, "hint": ""}, "qwen_vl",
        "Context: N/A\nQuestion: Which state is  farthest north?\nOptions: A. Ohio\nB. Utah\n"
        "Answer:",
    ),
    (
        "mmbench", MMB, "llava",
        "The passage below.\nWhat can be asked?\nA. Can it?\nB. Will it?\n" + LETTER,
    ),
    (
        "mmbench", MMB, "lmms",
        "The passage below. What can be asked? There are several options:\nA. Can it?\n"
        f"B. Will it?\n\n{LETTER}",
    ),
    (
        "mmbench", MMB, "official",
        "Hint: The passage below.\nQuestion: What can be asked?\nOptions:\nA. Can it?\n"
        "B. Will it?\nPlease select the correct answer from the options above. \n",
    ),
    ("mmbench", {**MMB, "hint": "nan"}, "llava",
     "What can be asked?\nA. Can it?\nB. Will it?\n" + LETTER),
    (
        "mmbench_cn", {**MMB, "hint": "nan"}, "llava",
        "What can be asked?\nA. Can it?\nB. Will it?\n请直接回答选项字母。",
    ),
    (
        "mmbench_cn", {**MMB, "hint": "nan"}, "lmms",
        "nan What can be asked? There are several options:\nA. Can it?\nB. Will it?\n\n"
        "请直接使用所提供的选项字母作为答案回答。",
    ),
    *(
        (
            "qbench", QB, style,
            "How is the lighting of this building?\nChoose between one of the options as follows:\n"
            "A. High\nB. Low\nC. Medium\n",
        )
        for style in ("llava", "official")
    ),
    (
        "qbench", QB, "lmms",
        f"How is the lighting of this building?\nA. High\nB. Low\nC. Medium\n{LETTER}\n",
    ),
    ("refcoco_rec", REC, "llava", "P" + BOX),
    (
        "refcoco_rec", REC, "qwen3_vl",
        'Locate every object that matches the description "left dog" in the image. Report bbox '
        "coordinates in JSON format.",
    ),
    (
        "refcoco_rec", REC, "lmms",
        "Bounding box coordinates are specified in the format (top-left x, top-left y, "
        "bottom-right x, bottom-right y). All values are floating point numbers bounded between 0 "
        "and 1. P" + BOX,
    ),
    ("refcoco_caption", REF, "llava", "Provide a short description for this region."),
    ("refcoco_caption", REF, "lmms", "Provide a short description for this region."),
    ("refcoco_caption", REF, "official", "Please caption the area."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "style", "prompt"), PROMPTS)
def test_prompt(name, row, style, prompt):
    task = make_task(name)
    assert task.prompt(task.doc(row, 0), style) == prompt


def test_every_style_of_every_benchmark_has_a_golden_prompt():
    covered = {(name.removesuffix("_cn"), style) for name, _, style, _ in PROMPTS}
    builtin = registry.builtin_modules("tasks")
    every = {(name, style) for name in builtin for style in make_task(name).styles}
    assert covered == every


def test_default_style_is_llavas():
    for name in registry.builtin_modules("tasks"):
        assert make_task(name).styles[0] == "llava"


def test_chinese_prompt_without_the_defects_of_lmms():
    task = make_task("mmbench_cn", compat=False)
    prompt = task.prompt(task.doc({**MMB, "hint": "nan"}, 0), "lmms")
    assert prompt.startswith("What can be asked? 以下有几个选项：\nA. Can it?")


def test_unknown_style_is_answered_with_the_nearest():
    task = make_task("mme")
    with pytest.raises(UsageError, match="unknown prompt style of mme 'lava'; did you mean llava"):
        task.prompt(task.doc(MME, 0), "lava")
