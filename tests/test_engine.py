"""Memory that runs out, pictures that come again, pictures opened ahead."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_invariants import BACKBONES, Echo, encoded
from tiny import tiny_llava
from torch import Tensor

import etcbench.engine
from etcbench import registry
from etcbench.backbones import Backbone, Prompt
from etcbench.backbones.llava import LlavaBackbone
from etcbench.compressor import Budget, Compressor
from etcbench.decoder import Decoder
from etcbench.doc import Doc, Picture
from etcbench.engine import Settings, answers, out_of_memory
from etcbench.waves import Question, waves

CUDA_MEMORY = "CUDA out of memory. Tried to allocate 20 MiB"
CPU_MEMORY = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: 9 B"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> LlavaBackbone:
    return tiny_llava(tmp_path_factory.mktemp("llava"))


@dataclass(frozen=True)
class Watched(Picture):
    """Notes each time it is opened."""

    opened: Any = None

    def open(self) -> Any:
        self.opened.append(self.key)
        return super().open()


def method_of(name: str, backbone: Backbone, tokens: int | None = None) -> Compressor:
    torch.manual_seed(1)
    budget = None if tokens is None else Budget(tokens)
    return registry.load("baselines", name).from_budget(budget, backbone.spec)


def questions(pictures: list[Picture], rounds: int) -> list[Doc]:
    """Ask about every picture in turn, several times over."""
    return [
        Doc(f"{turn}-{n}", str(n), (shown,), {"question": f"{'why ' * (turn % 3)}{n}{turn}?"}, None)
        for turn in range(rounds)
        for n, shown in enumerate(pictures)
    ]


def watched(opened: list[str], count: int = 3) -> list[Picture]:
    sizes = [(24, 24), (30, 20), (16, 28)]
    return [Watched(encoded(n, sizes[n % 3]).data, None, "", opened) for n in range(count)]


def responses(backbone: Backbone, method: Compressor, docs: list[Doc], **how: Any) -> list[Any]:
    found = []
    for batch in answers(backbone, method, Echo(), docs, Settings(**how)):
        found += [(answer.doc.id, answer.response or answer.error) for answer in batch]
    return found


# What is answered together ----------------------------------------------------------------------


def test_waves_keep_pictures_together_and_begin_with_the_longest() -> None:
    """Eleven questions on four pictures and one without, in waves of at most four."""
    lengths = {"a": [3, 9, 4], "b": [7, 8], "c": [30, 2, 5, 6, 1], "d": [20]}
    shown = {name: Picture(name.encode()) for name in lengths}
    asked = [
        Question(Doc(f"{name}{n}", name, (), {}, None), "", Prompt(((),), (), (0,) * n), (image,))
        for name, image in shown.items()
        for n in lengths[name]
    ]
    asked.append(Question(Doc("text", "", (), {}, None), "", Prompt((), (), (0,) * 50), ()))
    found = [[question.doc.id for question in wave] for wave in waves(asked, lambda: 4)]
    first = [["c30", "c6", "c5", "c2"], ["c1", "d20"], ["a9", "a4", "a3"]]
    assert found == [*first, ["b8", "b7"], ["text"]]


# Memory -----------------------------------------------------------------------------------------


@dataclass
class SmallMemory(LlavaBackbone):
    """Fails with more sequences than fit."""

    fits: int = 3
    failure: Any = None

    def run_layer(self, layer: Any, stream: Any, *arguments: Any, **named: Any) -> Tensor:
        self.seen.append(len(stream.hidden))
        if len(stream.hidden) > self.fits:
            raise self.failure or torch.cuda.OutOfMemoryError(CUDA_MEMORY)
        return super().run_layer(layer, stream, *arguments, **named)

    def __post_init__(self) -> None:
        self.seen: list[int] = []


@pytest.mark.parametrize(
    "failure",
    [
        torch.cuda.OutOfMemoryError(CUDA_MEMORY),
        RuntimeError(CPU_MEMORY),
        RuntimeError(CPU_MEMORY.replace("can't allocate", "not enough")),
        MemoryError(),
    ],
    ids=["cuda", "linux", "windows", "python"],
)
@pytest.mark.parametrize("reuse", [True, False])
def test_a_batch_that_does_not_fit_is_halved_and_stays_halved(
    llava: LlavaBackbone, failure: Exception, reuse: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = questions(watched([]), 6)
    method = method_of("full", llava)
    expected = sorted(responses(llava, method, docs, batch_size=1))
    small = SmallMemory(**vars(llava), fits=3, failure=failure)
    found = responses(small, method, docs, batch_size=12, reuse=reuse)
    assert sorted(found) == expected
    notices = capsys.readouterr().err.splitlines()
    assert notices == [
        "etcbench: memory ran out with 12 questions at once; going on with 6",
        "etcbench: memory ran out with 6 questions at once; going on with 3",
    ]
    assert [count for count in small.seen if count > 3] == [12, 6]


def test_other_failures_are_narrowed_down_and_cost_their_sample_only(
    llava: LlavaBackbone, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(eq=False)
    class Picky(Compressor):
        takes_budget = False

        def select_embeds(self, embeds: Tensor, grid: Tensor, keys: list[str]) -> None:
            if docs[1].pictures[0].key in keys:
                raise ValueError("not this one")

    docs = questions(watched([]), 4)
    found = dict(responses(llava, Picky(), docs, batch_size=12))
    wrong = {name for name, response in found.items() if response == "ValueError: not this one"}
    assert wrong == {f"{turn}-1" for turn in range(4)}
    assert len(found) == 12
    assert capsys.readouterr().err == ""


def test_a_sample_too_large_for_memory_is_a_row_of_its_own(llava: LlavaBackbone) -> None:
    small = SmallMemory(**vars(llava), fits=0)
    found = responses(small, method_of("full", llava), questions(watched([]), 1), batch_size=2)
    assert len(found) == 3
    assert all("out of memory" in response for _, response in found)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("no"), OSError()])
def test_memory_is_not_blamed_for_other_failures(error: Exception) -> None:
    assert not out_of_memory(error)


# Pictures that come again -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tokens"), [("full", None), ("fastv", 20), ("quecc", 4)])
@pytest.mark.parametrize("family", BACKBONES)
def test_a_picture_is_opened_and_encoded_once(
    family: str,
    name: str,
    tokens: int | None,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In groups larger than a batch, and in another window far away."""
    backbone = BACKBONES[family](tmp_path_factory.mktemp(family))
    method = method_of(name, backbone, tokens)
    encoded_keys: list[str] = []
    encode = type(backbone).encode

    def noting(self: Any, pixels: Any, grid: Any = None) -> Any:
        encoded_keys.extend(pixels.keys)
        return encode(self, pixels, grid)

    opened: list[str] = []
    docs = questions(watched(opened), 5)
    expected = sorted(responses(backbone, method, docs, batch_size=1, reuse=False))
    assert len(opened) == len(docs)
    opened.clear()
    monkeypatch.setattr(type(backbone), "encode", noting)
    monkeypatch.setattr(etcbench.engine, "WINDOW", 6)
    for batch_size in (2, 16):
        assert sorted(responses(backbone, method, docs, batch_size=batch_size)) == expected
        assert set(Counter(opened).values()) == set(Counter(encoded_keys).values()) == {1}
        opened.clear(), encoded_keys.clear()


def test_the_cache_holds_what_its_limit_allows(
    llava: LlavaBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    docs = questions(watched(opened), 8)
    method = method_of("full", llava)
    expected = sorted(responses(llava, method, docs, batch_size=1, reuse=False))
    opened.clear()
    monkeypatch.setattr(etcbench.engine, "WINDOW", 12)
    # Two windows, four questions on a picture in each: none is prefilled twice within a window.
    assert sorted(responses(llava, method, docs, batch_size=3, cache_mib=0)) == expected
    assert set(Counter(opened).values()) == {2}


@pytest.mark.parametrize("family", list(BACKBONES))
@pytest.mark.parametrize("name, tokens", [("voco", 2), ("pool", 4), ("fastv", 20)])
def test_text_that_all_questions_begin_with_runs_once_a_picture(
    family: str,
    name: str,
    tokens: int,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only behind a complete prefix, and as far as the questions of every window agree."""
    backbone = BACKBONES[family](tmp_path_factory.mktemp(family))
    method = method_of(name, backbone, tokens)
    asked: list[list[int]] = []
    question = Decoder.question

    def noting(self: Any, shared: Any, after: Any) -> Any:
        asked.append([len(text) for text in after])
        return question(self, shared, after)

    docs = questions(watched([]), 5)
    for number, doc in enumerate(docs):
        common = "a long opening of the text " if number < 12 else "a long opening, or another "
        doc.fields["question"] = common + doc.fields["question"]
    whole = [
        len(backbone.prompt(doc.fields["question"], 1, method.prompt_layout).after) for doc in docs
    ]
    expected = sorted(responses(backbone, method, docs, batch_size=1, reuse=False))
    monkeypatch.setattr(Decoder, "question", noting)
    monkeypatch.setattr(etcbench.engine, "WINDOW", 6)
    assert sorted(responses(backbone, method, docs, batch_size=4)) == expected
    run, pictures = sum(map(sum, asked)), 3
    if method.reuse == "prefix":
        openings = [lengths for lengths in asked if len(lengths) <= pictures][:1]
        assert openings and min(openings[0]) >= etcbench.engine.OPENING
        assert run < sum(whole) - 0.5 * len(docs) * min(openings[0])
    else:
        assert run == sum(whole)


# Pictures opened ahead --------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_opening_ahead_changes_neither_answers_nor_their_order(
    llava: LlavaBackbone, workers: int
) -> None:
    opened: list[str] = []
    pictures = watched(opened, 7)
    pictures[3] = Picture(b"not a picture", path="broken.png")
    docs = questions(pictures, 2)
    method = method_of("full", llava)
    found = responses(llava, method, docs, batch_size=4, workers=workers)
    assert found == responses(llava, method, docs, batch_size=4, workers=0)
    wrong = {name: text for name, text in found if name.endswith("-3")}
    assert wrong == dict.fromkeys(
        ("0-3", "1-3"), "unreadable image: broken.png does not decode: in no known format"
    )
    assert len(found) == len(docs)


def test_no_more_than_workers_batches_are_opened_ahead(llava: LlavaBackbone) -> None:
    opened: list[str] = []
    docs = questions(watched(opened, 40), 1)
    stream = answers(
        llava, method_of("full", llava), Echo(), docs, Settings(batch_size=4, workers=2)
    )
    for count, batch in enumerate(stream, start=1):
        assert len(batch) == 4
        assert len(opened) <= 4 * (count + 2)
    assert len(opened) == len(docs)
    assert not [t for t in threading.enumerate() if t.name.startswith("etcbench-picture")]


def test_an_interrupted_run_leaves_no_thread(llava: LlavaBackbone) -> None:
    stream = answers(
        llava, method_of("full", llava), Echo(), questions(watched([], 20), 1), Settings(2)
    )
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("etcbench-picture")]
