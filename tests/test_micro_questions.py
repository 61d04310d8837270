import re
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytest

from etcbench.micro import choices
from etcbench.micro.artwork import sprites
from etcbench.micro.questions import expressions, unit_box
from etcbench.micro.scenes import scene_at
from etcbench.micro.stream import MIX, TurnStream, circled, draw_turns

SAMPLES = 1200
SHORT = "\nAnswer the question using a single word or phrase."


@cache
def samples():
    stream = TurnStream(11)
    return [stream.sample(index) for index in range(SAMPLES)]


def turns():
    for sample in samples():
        for kind, (question, answer) in zip(sample["kinds"], sample["turns"], strict=True):
            yield sample["scene"], kind, question, answer


SINGULAR = {s.plural: s.name for s in sprites()} | {s.name: s.name for s in sprites()}
ADJECTIVE = {"blurry": "blur", "noisy": "noise", "too dark": "dark", "too bright": "bright"}


def names(scene, where=None):
    return [o.sprite.name for o in scene.objects if where in (None, scene.cell_name(o.cell))]


def only(scene, name):
    (found,) = [o for o in scene.objects if o.sprite.name == name]
    return found


def truth(scene, question):
    """Answer a bare question from the scene alone, reading nothing but its words."""
    if m := re.fullmatch(r"Is there an? (\w+) background in the image\?", question):
        return yes(scene.background == m[1])
    if m := re.fullmatch(r"Is there an? (\w+) at the ([\w ]+) of the picture\?", question):
        return yes(m[1] in names(scene, m[2]))
    if m := re.fullmatch(r"(?:Is|Are) there (\d) (\w+) in this image\?", question):
        return yes(names(scene).count(SINGULAR[m[2]]) == int(m[1]))
    if m := re.fullmatch(r"Is there an? (\w+) in (?:this|the) (?:image|picture)\?", question):
        return yes(m[1] in names(scene))
    if m := re.fullmatch(r"How many (\w+) are in the picture\?", question):
        return str(
            len(names(scene) if m[1] == "objects" else [])
            or names(scene).count(SINGULAR.get(m[1], ""))
        )
    if m := re.fullmatch(r"What is at the ([\w ]+) of the picture\?", question):
        (name,) = names(scene, m[1])
        return name
    if m := re.fullmatch(r"What kind of object is at the ([\w ]+) of the picture\?", question):
        (name,) = names(scene, m[1])
        return next(s.category for s in sprites() if s.name == name)
    if m := re.fullmatch(r"Where is the (\w+) in the picture\?", question):
        return scene.cell_name(only(scene, m[1]).cell)
    relation = r"Is the (\w+) (to the left of|to the right of|above|below) the (\w+)\?"
    if m := re.fullmatch(relation, question):
        return yes(holds(scene, m[1], m[2], m[3]))
    if question == "What color is the background of the picture?":
        return scene.background
    if m := re.fullmatch(r"What word is written (?:in|at the ([\w ]+) of) the picture\?", question):
        (word,) = {
            o.sprite.word
            for o in scene.objects
            if o.sprite.word and m[1] in (None, scene.cell_name(o.cell))
        }
        return word
    if m := re.fullmatch(r'Is the word "(\w+)" written in the picture\?', question):
        return yes(m[1] in [o.sprite.word for o in scene.objects])
    if m := re.fullmatch(r"Is this picture ([\w ]+)\?", question):
        return yes(scene.distortion == ADJECTIVE[m[1]])
    raise AssertionError(question)


def yes(value):
    return "Yes" if value else "No"


def holds(scene, first, relation, second):
    (ax, ay), (bx, by) = only(scene, first).centre, only(scene, second).centre
    return {
        "to the left of": ax < bx,
        "to the right of": ax > bx,
        "above": ay < by,
        "below": ay > by,
    }[relation]


def test_every_short_answer_is_true():
    checked = Counter()
    for scene, kind, question, answer in turns():
        if question.endswith(SHORT):
            bare = question.removesuffix(SHORT).split("\nReference OCR token: ")[0]
            assert truth(scene, bare) == answer, (question, scene)
            checked[kind] += 1
    letters = {"letter", "quality_letter"}
    assert set(checked) == set(MIX) - letters - {"cap", "box"}
    assert min(checked.values()) > 50


def test_captions_boxes_and_regions_are_true():
    for scene, kind, question, answer in turns():
        label = [f"{o.sprite.word} sign" if o.sprite.word else o.sprite.name
                 for o in scene.reading_order]  # fmt: skip
        if kind == "cap" and "briefly" in question:
            assert answer == ", ".join(label)
        elif kind == "cap":
            said = re.split(r", | and ", answer)
            assert [re.sub(" at the .*", "", part) for part in said] == label
        elif kind == "region":
            name, where = answer.split(" at the ")
            assert where in {scene.cell_name(o.cell) for o in scene.objects}
            assert name in label
        elif kind == "box":
            phrase = question.split("describes: ")[1]
            (placed,) = [o for o in scene.objects if phrase in expressions(scene, o)]
            assert answer == unit_box(scene, placed)
            corners = [float(x) for x in answer.strip("[]").split(", ")]
            assert np.allclose(corners, np.array(placed.box) / 64, atol=0.0051)


TOPICS_IN_WORDS = {
    "Underexposure": "dark",
    "Overexposure": "bright",
    "Blur": "blur",
    "Noise": "noise",
    "No distortion": "none",
}


def right_option(scene, question, options):
    if question == "Which of these objects is present in the picture?":
        (right,) = [option for option in options if option in names(scene)]
    elif question == "Which word is written in the picture?":
        (right,) = [o for o in options if o in [p.sprite.word for p in scene.objects]]
    elif m := re.fullmatch(r"Where is the (\w+) relative to the (\w+)\?", question):
        (right,) = [o for o in options if clearly(scene, m[1], o, m[2])]
    elif question == "Which distortion is visible in the picture?":
        (right,) = [o for o in options if TOPICS_IN_WORDS[o] == scene.distortion]
    elif question == "How is the exposure of the picture?":
        right = {"dark": "Too dark", "bright": "Too bright"}.get(scene.distortion, "Normal")
    elif question == "How is the sharpness of the picture?":
        right = "Blurry" if scene.distortion == "blur" else "Sharp"
    elif question == "图片中有几个物体？":
        right = str(len(scene.objects))
    elif question == "图片的背景是什么颜色？":
        right = choices.CHINESE[scene.background]
    elif m := re.fullmatch("图片(.*)的物体属于哪一类？", question):
        (placed,) = [o for o in scene.objects if choices.CHINESE[scene.cell_name(o.cell)] == m[1]]
        right = choices.CHINESE[placed.sprite.category]
    else:
        right = truth(scene, question)
    return right


def clearly(scene, first, relation, second):
    (ax, ay), (bx, by) = only(scene, first).centre, only(scene, second).centre
    gap = {"to the left of": bx - ax, "to the right of": ax - bx, "above": by - ay}
    return gap.get(relation, ay - by) >= 12


def test_every_lettered_answer_is_true_and_no_other_option_is():
    letters = defaultdict(Counter)
    for scene, kind, question, answer in turns():
        if not kind.endswith("letter"):
            continue
        lines = question.rstrip("\n").split("\n")
        options = dict(m.groups() for line in lines if (m := re.match(r"([A-E])\. (.*)", line)))
        first = next(i for i, line in enumerate(lines) if line.startswith("A. "))
        asked = lines[first - 1]
        if asked == choices.ONE_OF:
            asked = lines[first - 2]
        assert len(set(options.values())) == len(options)
        right = right_option(scene, asked, list(options.values()))
        assert options[answer] == right, (question, scene)
        letters[len(options)][answer] += 1
    for size, count in letters.items():
        if count.total() > 200:
            assert min(count.values()) > 0.6 * count.total() / size


def test_every_kind_occurs_and_yes_is_as_frequent_as_no():
    found = Counter(kind for _, kind, _, _ in turns())
    assert set(found) == set(MIX) | {"region"}
    answers = defaultdict(Counter)
    for _, kind, _, answer in turns():
        if answer in ("Yes", "No"):
            answers[kind][answer] += 1
    for kind, count in answers.items():
        assert 0.35 < count["Yes"] / count.total() < 0.65, (kind, count)


def test_half_of_the_absent_objects_are_of_a_kind_that_is_there():
    near = []
    for scene, kind, question, answer in turns():
        if kind == "exist" and answer == "No":
            name = re.search(r"Is there an? (\w+)", question)[1]
            category = next(s.category for s in sprites() if s.name == name)
            near.append(category in {o.sprite.category for o in scene.objects})
    assert 0.45 < np.mean(near) < 0.75


def test_counts_are_spread():
    answers = Counter(a for _, kind, _, a in turns() if kind == "count")
    assert set(answers) >= {"0", "1", "2", "3", "4"}
    assert answers.most_common(1)[0][1] < 0.5 * answers.total()


def test_held_out_objects_are_never_named_in_training():
    banned = {s.name for s in sprites() if s.held_out} | {s.plural for s in sprites() if s.held_out}
    for _, _, question, answer in turns():
        assert not banned & set(re.findall(r"\w+", f"{question} {answer}"))


def test_a_sample_depends_on_its_index_alone():
    one, other = TurnStream(4), TurnStream(4)
    for index in (9, 0, 5):
        first = one.sample(index)
    for index in (5,):
        second = other.sample(index)
    assert first["turns"] == second["turns"]
    assert (first["picture"] is None) == (second["picture"] is None)
    assert first["picture"] is None or np.array_equal(first["picture"], second["picture"])
    assert TurnStream(5).sample(5)["turns"] != first["turns"]


def test_some_samples_are_blind_and_the_number_of_turns_is_fixed():
    blind = np.mean([sample["picture"] is None for sample in samples()])
    assert 0.05 < blind < 0.11
    for sample in samples():
        assert len(sample["turns"]) - ("region" in sample["kinds"]) == 11
        assert len(set(sample["turns"])) == len(sample["turns"])
    assert TurnStream(1, blind_share=0).sample(0)["picture"].dtype == np.uint8


def test_a_narrow_mix_asks_nothing_else():
    rng = np.random.default_rng(0)
    for index in range(30):
        scene = scene_at(1, index)[0]
        kinds = {turn.kind for turn in draw_turns(scene, rng, 5, {"name": 1, "cap": 1})}
        assert kinds <= {"name", "cap"}


def test_rotating_the_options_keeps_the_right_text():
    rng = np.random.default_rng(0)
    choice = choices.draw_choice(scene_at(1, 0)[0], rng)
    texts = {choice.rotated(k).options[choice.rotated(k).answer] for k in range(4)}
    letters = [choice.rotated(k).letter for k in range(4)]
    assert len(texts) == 1
    assert sorted(letters) == list("ABCD")
    assert choice.rotated(4) == choice


def test_the_rectangle_is_drawn_as_the_benchmark_draws_it():
    picture = np.zeros((64, 64, 3), np.uint8)
    drawn = circled(picture, (8, 10, 30, 40))
    assert not picture.any()
    red = np.all(drawn == (255, 0, 0), axis=2)
    assert red[10, 8:31].all() and red[40, 8:31].all()
    assert red[10:41, 8].all() and red[10:41, 30].all()
    assert red.sum() == 2 * 23 + 2 * 31 - 4


@pytest.mark.parametrize("cells", [(2, 3), (3, 2)])
def test_other_shapes_have_questions_too(cells):
    sample = TurnStream(2, cells=cells, blind_share=0).sample(3)
    assert sample["picture"].shape == (cells[0] * 32, cells[1] * 32, 3)
    assert len(sample["turns"]) >= 11
