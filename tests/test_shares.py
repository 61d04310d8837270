"""Budgets as a share of each picture's own tokens: read, resolved, served, written, refused."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from test_invariants import ask, run, samples
from test_selective import LLAVA, MICRO, QWEN, build
from tiny import picture, tiny_llava, tiny_llava_next, tiny_qwen3_vl

from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.budget import Budget
from etcbench.decoder import Decoder
from etcbench.errors import BudgetError, UsageError
from etcbench.presets import NAMED, resolved
from etcbench.run import LoadedMethod, load_compressor
from etcbench.store import config_hash, run_path

ANY = replace(QWEN, visual_tokens=None, grid=None)
# A share, and what it leaves in front of the last layer of 4 where 36 tokens come in.
SERVED: list[tuple[str, str, dict[str, Any], int]] = [
    ("random", "1/4", {}, 9),
    ("pool", "1/4", {}, 9),
    ("downsample", "1/4", {}, 9),
    ("visionzip", "1/4", {}, 9),
    ("explainc", "1/4", {"scores": "attention"}, 9),
    ("fastv", "5/9", {}, 4),
    ("fastv", "kept:1/9", {}, 4),
    ("pdrop", "kept:1/9", {}, 4),
    ("sparsevlm", "1/3", {"version": "1.0"}, 0),  # the rank of the votes decides
    ("twigvlm", "kept:1/9", {"wipe_layer": 4, "decoding": "greedy"}, 4),
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_qwen3_vl(tmp_path_factory.mktemp("qwen"))


def test_a_share_is_read_and_written() -> None:
    for text, written in (("1/9", "1/9"), ("kept:2/18", "kept:1/9"), ("64/64", "1/1")):
        budget = Budget.parse(text)
        assert str(budget) == written and Budget.parse(written) == budget
    assert Budget.parse("64/576") == Budget.part(Fraction(1, 9)) != Budget(64)
    assert Budget.parse("1/9").tokens == 64  # where it stands among numbers
    assert (str(Budget.parse("64")), Budget.parse("kept:64")) == ("64", Budget(64, "kept"))
    for text, says in (("0/9", "above 0"), ("9/8", "at most 1/1"), ("1/0", "at most 1/1"),
                       ("1/x", "not a budget"), ("1/-9", "not a budget"),
                       ("/9", "not a budget")):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            Budget.parse(text)


def test_what_a_picture_gets() -> None:
    share, number = Budget.parse("1/9"), Budget(64)
    assert [share.of(n) for n in (1, 4, 36, 64, 576, 2880)] == [1, 1, 4, 7, 64, 320]
    assert [share.of(n, 2) for n in (8, 72)] == [2, 8]
    assert [number.of(n) for n in (36, 576)] == [36, 64] and number.of(576, 2) == 128
    assert Budget.parse("1/1").of(35) == 35


def test_a_folder_of_a_share_has_a_valid_name() -> None:
    config = {"model": {"name": "m"}, "method": "fastv", "tokens": "kept:1/9", "task": "mme"}
    path = run_path(Path("out"), config)
    assert path == Path("out/m/fastv-kept1of9") / f"mme-{config_hash(config)}"
    assert run_path(Path("out"), {**config, "tokens": "1/9"}).parts[-2] == "fastv-1of9"


def test_where_all_pictures_are_alike_a_share_is_a_number() -> None:
    for tokens, number in (("1/9", Budget(7)), ("kept:1/8", Budget(8, "kept"))):
        assert build("random", tokens, MICRO).budget == number
        assert resolved("etc", Budget.parse(tokens), MICRO, {})[1] == number
    assert build("etc", "1/64", MICRO).budget == Budget(1)
    with pytest.raises(BudgetError, match="already exceed an average of 7; it can serve 17 to 64"):
        build("fastv", "1/9", MICRO)


def test_a_preset_is_a_share_where_pictures_differ() -> None:
    """Spec 1.10: the counts are those of a number on a picture of 576 tokens, and in proportion."""
    for name in ("fastv-64", "pdrop-192", "sparsevlm20-128", "explainc-144", "visionzip-64"):
        method, budget, options = resolved(name, None, ANY, {})
        number = NAMED[name].tokens
        assert number is not None
        assert budget == Budget.part(Fraction(number, 576))
        served = build(method, str(budget), ANY, **options)
        fixed = build(method, str(number), QWEN, **options)
        assert served.schedule(576, 28) == fixed.schedule(576, 28)
        half = [2 * n for n in served.schedule(288, 28)]
        assert half == pytest.approx(fixed.schedule(576, 28), abs=2)
    assert str(resolved("fastv-64", None, LLAVA, {})[1]) == "64"


@torch.inference_mode()
@pytest.mark.parametrize(("name", "share", "options", "left"), SERVED)
def test_each_picture_gets_its_own_share(
    qwen: Backbone, name: str, share: str, options: dict[str, Any], left: int
) -> None:
    """On a picture of 36 tokens, and as `schedule` says on one of 60, alone and in a batch."""
    method = build(name, share, qwen.spec, **options)
    kv, _ = ask(qwen, method)
    entered = [int(count[0]) for count in kv.entered if count is not None]
    if left:
        assert entered == method.schedule(36, 4) and entered[-1] == left
    prompt = qwen.prompt("why?", 1)
    shown = [picture(0, (24, 24)), picture(1, (40, 24))]
    visual = qwen.visual(qwen.preprocess(shown, ["a", "b"]), method, [(0, "why?"), (1, "why?")])
    both, _ = Decoder(qwen, method).whole(
        qwen.assemble([prompt, prompt], [visual], None), [prompt.after] * 2
    )
    if left:
        pairs = zip(method.schedule(36, 4), method.schedule(60, 4), strict=True)
        counts = [tuple(count.tolist()) for count in both.entered if count is not None]
        assert counts == list(pairs)
    docs = samples()[:7]
    expected = run(qwen, method, docs, batch_size=1, reuse=False)
    assert run(qwen, method, docs[::-1], batch_size=4, reuse=True) == expected


@torch.inference_mode()
def test_all_tokens_as_a_share(qwen: Backbone) -> None:
    for name in ("fastv", "pdrop", "sparsevlm", "lightkv", "twigvlm", "random"):
        kv, _ = ask(qwen, build(name, "1/1", qwen.spec))
        assert {int(count[0]) for count in kv.entered if count is not None} == {36}


@torch.inference_mode()
def test_tiles_get_their_share(tmp_path: Path) -> None:
    """VisionZip: of the nine patches of each of five tiles."""
    backbone = tiny_llava_next(tmp_path)
    method = build("visionzip", "4/9", backbone.spec)
    visual = backbone.visual(backbone.preprocess([picture(0)], ["x"]), method)
    assert method.split(9) == (3, 1) and int((visual.place[0] >= 0).sum()) == 20


def test_what_cannot_be_served_is_said_in_shares() -> None:
    shallow = replace(ANY, layers=8)
    for name, options, says in (
        ("fastv", {}, r"average of 1/9; it can serve 145/576 to 1/1"),
        ("twigvlm", {}, r"cannot be 1/36; it can serve 73/576 to 3/4, 1/1"),
        ("pdrop", {}, r"no room for 1/99; it can serve 73/576 to 1/1"),
        ("lightkv", {}, r"cannot make 1/99; the nearest is \d+/\d+"),
        ("sparsevlm", {"version": "1.0"}, r"serves 1/9, 2/9, 1/3, 1/1, not 1/4"),
    ):
        asked = {"fastv": "1/9", "twigvlm": "1/36", "sparsevlm": "1/4"}.get(name, "1/99")
        with pytest.raises(BudgetError, match=says):
            build(name, asked, shallow, **options)
    # A number is kept to what each picture allows, as ever.
    assert build("fastv", "64", shallow).schedule(576, 8)[-1] == 1


def test_learned_tokens_take_no_share(qwen: Backbone) -> None:
    for name in ("etc", "voco", "quecc", "mqt-llava", "llama-vid"):
        kind = registry.load("baselines", name)
        with pytest.raises(BudgetError, match=f"{name} learns a fixed number .* ask for a number"):
            kind.from_budget(Budget.parse("1/9"), ANY)
        with pytest.raises(BudgetError, match="learns a fixed number"):
            load_compressor(name, "1/9", qwen)


def test_options_and_manifests_of_a_share(qwen: Backbone, tmp_path: Path) -> None:
    """VisionZip's split is a picture's, so it is no option's value; of a number it is as ever."""
    loaded = load_compressor("visionzip-64", None, qwen)
    assert isinstance(loaded, LoadedMethod) and str(loaded.compressor.budget) == "1/9"
    assert loaded.options["contextual"] is None
    llava = tiny_llava(tmp_path)
    same = [load_compressor("visionzip", tokens, llava) for tokens in (12, "1/3")]
    assert same[0].options == same[1].options and same[0].options["contextual"] == 2
    assert {str(method.compressor.budget) for method in same} == {"12"}
