"""Following a picture's tokens through a method, and drawing it."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import get_data_path, rcParams
from matplotlib.font_manager import findfont, fontManager, get_font
from PIL import Image
from tiny import save_tiny_llava, tiny_llava, tiny_qwen3_vl

import etcbench.cli
from etcbench.backbones import Backbone
from etcbench.compressor import Budget
from etcbench.doc import Picture
from etcbench.glyphs import covering
from etcbench.inspection import Inspection, inspect
from etcbench.inspection_picture import draw
from etcbench.places import find_places
from etcbench.run import load_compressor
from etcbench.sweep import Sweep

QUESTION = "What is this?"


def picture(size: tuple[int, int] = (64, 48)) -> Picture:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return Picture(file.getvalue())


def look(backbone: Backbone, name: str, tokens: int | None, **options: Any) -> Inspection:
    method = load_compressor(name, tokens, backbone, untrained=True, **options)
    return inspect(backbone, [method], picture(), QUESTION)[0]


@pytest.fixture(scope="module", params=[tiny_llava, tiny_qwen3_vl], ids=["llava", "qwen3_vl"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return request.param(tmp_path_factory.mktemp("model"))


def test_without_selection_every_place_is_kept(backbone: Backbone) -> None:
    (stage,) = look(backbone, "full", None).stages
    assert stage.kept == tuple(range(stage.places)) and not stage.merged
    assert stage.tokens == stage.places


def test_a_dropping_method_keeps_what_its_stage_says(backbone: Backbone) -> None:
    (stage,) = look(backbone, "fastv", None, layer=1, ratio=0.5).stages
    assert stage.label == "after layer 1"
    assert stage.tokens == len(stage.kept) == round(stage.places * 0.5)
    assert not stage.merged


def test_merged_places_lead_to_a_kept_one(backbone: Backbone) -> None:
    (stage,) = look(backbone, "visionzip", 6, contextual=2).stages
    assert stage.label == "in front of the projector"
    assert stage.tokens == 6
    assert stage.merged and not set(stage.merged) & set(stage.kept)
    assert set(stage.merged.values()) <= {*stage.kept, -1}


def test_a_choice_that_reads_the_question_is_followed(backbone: Backbone) -> None:
    (stage,) = look(backbone, "explainc", 6, scores="attention").stages
    assert stage.label == "in front of the decoder"
    assert stage.tokens == len(stage.kept) == 6
    assert not stage.merged


def test_pooling_leaves_nothing_out(backbone: Backbone) -> None:
    (stage,) = look(backbone, "pool", 4).stages
    assert stage.label == "in front of the decoder"
    assert len(stage.kept) + len(stage.merged) == stage.places


def test_stages_only_lose_places(backbone: Backbone) -> None:
    stages = look(backbone, "pdrop", 24).stages
    assert len(stages) > 1
    for before, after in pairwise(stages):
        assert set(after.kept) <= set(before.kept)
    assert len(stages[0].kept) < stages[0].places


# Method, budget, options; tokens of each stage, and whether places are merged.
STAGES: list[tuple[str, int | None, dict[str, Any], list[int], bool]] = [
    ("fastv", None, {"layer": 2, "ratio": 0.5}, [18], False),
    ("sparsevlm", 20, {"version": "2.0"}, [22, 14, 8], False),
    ("sparsevlm", 20, {}, [21, 15, 8], True),
    ("lightkv", None, {"layers": "0-2", "ratios": "0.5-0.5", "windows": "2-1"}, [20, 10], True),
    ("twigvlm", 20, {}, [22, 0], False),
    ("twigvlm-pp", 20, {"decoding": "greedy"}, [22, 0], False),
]


@pytest.mark.parametrize(("name", "tokens", "options", "left", "merges"), STAGES)
def test_stages_of_the_methods_inside_the_decoder(
    backbone: Backbone,
    name: str,
    tokens: int | None,
    options: dict[str, Any],
    left: list[int],
    merges: bool,
) -> None:
    """On 36 tokens: what a stage leaves, and that merged places lead to places that are left."""
    method = load_compressor(name, tokens, backbone, untrained=True, **options)
    (found,) = inspect(backbone, [method], picture((24, 24)), QUESTION)
    assert [stage.tokens for stage in found.stages] == left
    assert any(stage.merged for stage in found.stages) == merges
    for stage in found.stages:
        assert set(stage.merged.values()) <= set(stage.kept)
        assert len(stage.kept) == stage.tokens


def test_learned_tokens_show_their_attention(backbone: Backbone) -> None:
    (stage,) = look(backbone, "voco", 2).stages
    assert (stage.tokens, stage.kept, stage.learned) == (0, (), 2)
    assert stage.heat is not None and len(stage.heat) == stage.places
    assert 0 < sum(stage.heat) < 1  # the rest of the attention is on the text


def test_blind_has_no_stages(backbone: Backbone) -> None:
    found = look(backbone, "blind", None)
    assert found.stages == () and not found.looks


def test_drawing_tells_kept_from_dropped(tmp_path: Path) -> None:
    backbone = tiny_llava(tmp_path / "model")
    white = Image.new("RGB", (64, 64), "white")
    found = look(backbone, "fastv", None, layer=1, ratio=0.5)
    draw([found], white, QUESTION, tmp_path / "one.png")
    everything = look(backbone, "full", None)
    draw([everything], white, QUESTION, tmp_path / "all.png")
    dark = [
        (np.asarray(Image.open(tmp_path / name).convert("L")) < 100).mean()
        for name in ("one.png", "all.png")
    ]
    assert dark[0] > dark[1] + 0.05


@pytest.fixture
def own_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the fonts that come with matplotlib, whatever is installed."""
    own = [entry for entry in fontManager.ttflist if entry.fname.startswith(get_data_path())]
    monkeypatch.setattr(fontManager, "ttflist", own)


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("own_fonts")
def test_letters_without_a_font_are_boxes_and_one_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    black, chinese = Image.new("RGB", (48, 48)), "\u732b\u72d7"
    found = Inspection("full", (), f"A cat, {chinese}")
    draw([found], black, f"{chinese}?", tmp_path / "one.png")
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 letters" in line and all(letter in line for letter in chinese)
    draw([Inspection("full", (), "caf\u00e9")], black, QUESTION, tmp_path / "two.png")
    assert not capsys.readouterr().err


@pytest.mark.usefixtures("own_fonts")
def test_a_font_is_found_for_what_the_default_does_not_have() -> None:
    own = covering("plain text")
    assert own == (rcParams["font.family"], [])
    script = "\N{MATHEMATICAL SCRIPT CAPITAL A}"  # STIX has it, which comes with matplotlib
    families, missing = covering(f"a {script}\n")
    assert families[:-1] == own[0] and not missing
    assert script in {chr(code) for code in get_font(findfont(families[-1])).get_charmap()}


def test_command_draws_and_lists_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llava(tmp_path / "model")
    picture((40, 40)).open().save(tmp_path / "p.png")
    call = ["etcbench", "inspect", "--model", str(model), "--image", str(tmp_path / "p.png")]
    call += ["--question", QUESTION, "--out", str(tmp_path / "out.png")]
    named = "sparsevlm15-192,sparsevlm20-192"  # the same method at the same budget
    monkeypatch.setattr("sys.argv", [*call, "--method", f"fastv,etc,{named}", "--tokens", "20"])
    with pytest.raises(SystemExit) as caught:
        etcbench.cli.main()
    output = capsys.readouterr()
    assert caught.value.code == 0, output.err
    assert Image.open(tmp_path / "out.png").width > 300
    assert "left out: etc 20" in output.err and "fastv 20" in output.out
    assert all(name in output.out for name in named.split(","))


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_wrong_picture_is_one_line(
    content: bytes | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / "p.png").write_bytes(content)
    call = ["etcbench", "inspect", "--method", "full", "--question", QUESTION]
    monkeypatch.setattr("sys.argv", [*call, "--image", str(tmp_path / "p.png")])
    with pytest.raises(SystemExit) as caught:
        etcbench.cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert len(error.splitlines()) == 1 and "p.png" in error


def test_places_are_labelled_as_runs_are(tmp_path: Path) -> None:
    """Trained methods too, and settings by the method and budget that they stand for."""
    model = str(save_tiny_llava(tmp_path / "model"))
    methods = ["twigvlm", "fastv", "pdrop-192"]
    sweep = Sweep(methods, ["pope"], [Budget(20)], model=model, limit=2, untrained=True)
    found = find_places([sweep], samples=1)[model]
    assert set(found) == {"twigvlm[untrained] 20", "fastv 20", "pdrop 12"}
