import dataclasses

import numpy as np
import pytest

from etcbench.errors import UsageError
from etcbench.micro.artwork import FOLDER, sprites
from etcbench.micro.scenes import (
    BACKGROUNDS,
    DISTORTIONS,
    POLICIES,
    draw_scene,
    is_held_out_pair,
    scene_at,
    through_jpeg,
)

MANY = 1500


def scenes(policy, count=MANY, **fixed):
    return [scene_at(3, index, policy, **fixed)[0] for index in range(count)]


def held_out_pairs(scene):
    classes = scene.classes
    return [(a, b) for i, a in enumerate(classes) for b in classes[:i] if is_held_out_pair(a, b)]


def test_the_artwork_is_small_and_licensed():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2_000_000
    assert len(list(FOLDER.glob("LICENSE*"))) == 2
    known = sprites()
    assert 150 <= len(known) <= 200
    assert len({s.category for s in known}) >= 10
    labels = [s.word or s.name for s in known]
    assert len(set(labels)) == len(labels)
    assert sum(s.held_out for s in known) >= 12


@pytest.mark.parametrize(
    ("name", "plural", "article"),
    [
        ("cat", "cats", "a cat"),
        ("owl", "owls", "an owl"),
        ("fox", "foxes", "a fox"),
        ("cherry", "cherries", "a cherry"),
        ("monkey", "monkeys", "a monkey"),
        ("mouse", "mice", "a mouse"),
        ("umbrella", "umbrellas", "an umbrella"),
    ],
)
def test_names_have_their_plural_and_article(name, plural, article):
    sprite = next(s for s in sprites() if s.name == name)
    assert (sprite.plural, sprite.with_article) == (plural, article)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_scene_and_picture(policy):
    for index in range(5):
        one, rng_one = scene_at(7, index, policy)
        two, rng_two = scene_at(7, index, policy)
        assert one == two
        assert np.array_equal(one.render(), two.render())
        assert rng_one.integers(2**40) == rng_two.integers(2**40)
    assert scene_at(7, 0, policy)[0] != scene_at(8, 0, policy)[0]


def test_evaluation_scenes_are_not_training_scenes():
    texture = {p: {s.seed for s in scenes(p, 400)} for p in ("train", "iid", "combo", "objects")}
    for policy in ("iid", "combo", "objects"):
        assert not texture["train"] & texture[policy]


@pytest.mark.parametrize("policy", ["train", "iid"])
def test_what_is_held_out_never_occurs(policy):
    for scene in scenes(policy):
        assert not any(o.sprite.held_out for o in scene.objects)
        assert not held_out_pairs(scene)


def test_combo_and_objects_scenes_hold_what_training_never_showed():
    for scene in scenes("combo"):
        assert held_out_pairs(scene)
        assert not any(o.sprite.held_out for o in scene.objects)
    for scene in scenes("objects"):
        assert any(o.sprite.held_out for o in scene.objects)


def test_about_a_tenth_of_the_pairs_is_held_out():
    known = sprites()
    pairs = [is_held_out_pair(a, b) for i, a in enumerate(known) for b in known[:i]]
    assert 0.08 < np.mean(pairs) < 0.12


def test_class_and_object_numbers_are_balanced():
    drawn = scenes("train")
    classes = np.bincount([len(s.classes) for s in drawn], minlength=5)[1:] / MANY
    assert np.all(np.abs(classes - 0.25) < 0.05)
    objects = np.bincount([len(s.objects) for s in drawn], minlength=7)[1:] / MANY
    assert np.all(objects > 0.04)
    distorted = np.mean([s.distortion != "none" for s in drawn])
    assert 0.16 < distorted < 0.24
    assert {s.background for s in drawn} == set(BACKGROUNDS)
    assert {s.distortion for s in drawn} == set(DISTORTIONS)


@pytest.mark.parametrize("cells", [(2, 2), (2, 3), (3, 2), (1, 2)])
def test_other_shapes(cells):
    for index in range(50):
        scene = scene_at(1, index, cells=cells)[0]
        assert scene.render().shape == (cells[0] * 32, cells[1] * 32, 3)
        assert all(o.cell < cells[0] * cells[1] for o in scene.objects)
    names = {scene.cell_name(c) for c in range(cells[0] * cells[1])}
    assert len(names) == cells[0] * cells[1]


def test_boxes_hold_exactly_what_is_drawn():
    for index in range(150):
        scene = scene_at(2, index, distortion="none")[0]
        for number, placed in enumerate(scene.objects):
            # only this object, so that nothing covers it
            bare = dataclasses.replace(scene, objects=())
            alone = dataclasses.replace(scene, objects=(scene.objects[number],))
            changed = np.any(bare.render() != alone.render(), axis=2)
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            x0, y0, x1, y1 = placed.box
            drawn = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert drawn[0] >= x0 and drawn[1] >= y0 and drawn[2] <= x1 and drawn[3] <= y1
            assert np.abs(np.subtract(drawn, placed.box)).max() <= 2


def test_patch_classes_lie_inside_the_boxes():
    for index in range(150):
        scene = scene_at(4, index)[0]
        classes = scene.patch_classes(8)
        assert classes.shape == (8, 8)
        present = {o.sprite.index + 1 for o in scene.objects}
        assert set(np.unique(classes)) <= present | {0}
        # an object in a cell of its own can hardly be missed
        assert len(set(np.unique(classes)) - {0}) >= 1
        for row, column in np.argwhere(classes):
            boxes = [o.box for o in scene.objects if o.sprite.index + 1 == classes[row, column]]
            assert any(
                x0 < column * 8 + 8 and x1 > column * 8 and y0 < row * 8 + 8 and y1 > row * 8
                for x0, y0, x1, y1 in boxes
            )


def test_distortions_change_the_picture_as_their_name_says():
    def detail(picture):
        return np.abs(np.diff(picture.astype(float), axis=1)).mean()

    for index in range(20):
        scene = scene_at(5, index, distortion="none")[0]
        clear = scene.render()
        made = {n: dataclasses.replace(scene, distortion=n).render() for n in DISTORTIONS[1:]}
        assert made["dark"].mean() < 0.6 * clear.mean()
        assert made["bright"].mean() > clear.mean()
        assert detail(made["blur"]) < 0.7 * detail(clear)
        assert detail(made["noise"]) > 1.5 * detail(clear)


def test_jpeg_keeps_the_picture():
    picture = scene_at(6, 0)[0].render()
    assert np.abs(through_jpeg(picture).astype(int) - picture).mean() < 4


def test_unknown_names_are_refused():
    rng = np.random.default_rng(0)
    for wrong in ({"distortion": "fog"}, {"background": "pink"}, {"policy": "test"}):
        with pytest.raises(UsageError, match="did you mean"):
            draw_scene(rng, **wrong)
