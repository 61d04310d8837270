"""Speculative decoding gives the text of plain greedy decoding, whatever is drafted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_invariants import BACKBONES, Row, ask, prefix_of, samples
from torch import Tensor

from etcbench.backbones import Backbone
from etcbench.backbones.stream import Stream
from etcbench.branch import Chain, Tree
from etcbench.decoder import Decoder, KVState
from etcbench.drafting import Draft
from etcbench.engine import Answer, Settings, answers
from etcbench.selection import Kind
from etcbench.speculative import Decoded, Drafts, decode, speculate
from etcbench.store import RunDirectory
from etcbench.summary import record_of
from etcbench.task import Task

NEW = 16
METHODS = ("twigvlm", "twigvlm-pp")
DOCS = [*samples()[:7], samples()[-1]]


class LongEcho(Task):
    """A task with long answers."""

    name = "echo"
    max_new_tokens = NEW

    def render(self, doc: Any, style: str) -> str:
        return str(doc.fields["question"])


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    found = BACKBONES[request.param](tmp_path_factory.mktemp(request.param))
    # A common end token, so that answers end at different places.
    ends = found.model.generation_config.eos_token_id
    plain = whole(found, Row("fastv", 20).build(found), 3)
    common = decode(*plain, NEW)[0].tokens[NEW // 2]
    found.model.generation_config.eos_token_id = [
        *(ends if isinstance(ends, list) else [ends]), common,
    ]  # fmt: skip
    return found


def whole(
    backbone: Backbone, method: Any, asked: int | Sequence[str]
) -> tuple[Decoder, KVState, Tensor]:
    """Prefill several questions on one picture: these, or so many of different length."""
    decoder = Decoder(backbone, method)
    prefix, _ = prefix_of(backbone, method)
    texts = ["why " * n + "?" for n in range(asked)] if isinstance(asked, int) else asked
    index = torch.zeros(len(texts), dtype=torch.long)
    after = [backbone.prompt(text, 1).after for text in texts]
    return decoder, *decoder.whole(prefix.rows(index), after)


def pruned(backbone: Backbone, decoding: str, name: str = "twigvlm", **options: Any) -> Any:
    return Row(name, 20, {"decoding": decoding, **options}).build(backbone)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "how"), [*((name, {}) for name in METHODS), ("twigvlm-pp", {"drafts": "chain"})]
)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_answers_are_those_of_greedy_decoding(
    backbone: Backbone, name: str, how: dict[str, Any], rows: int
) -> None:
    expected = decode(*whole(backbone, pruned(backbone, "greedy", name), rows), NEW)
    method = pruned(backbone, "speculative", name, **how)
    assert isinstance(method.speculation, Chain) == (name == "twigvlm" or bool(how))
    found = decode(*whole(backbone, method, rows), NEW)
    assert [row.tokens for row in found] == [row.tokens for row in expected]
    assert all(row.drafts is None for row in expected)
    for row in found:
        assert row.drafts is not None and row.drafts.accepted <= row.drafts.drafted
        gained = row.drafts.accepted + row.drafts.verifications
        assert len(row.tokens) - 1 <= gained  # the first token is the prefill's


@torch.inference_mode()
@pytest.mark.parametrize("name", METHODS)
def test_fifty_prompts(backbone: Backbone, name: str) -> None:
    """Spec 10.2 group 9."""
    texts = [f"{n} or {n * n}?" for n in range(50)]
    expected = decode(*whole(backbone, pruned(backbone, "greedy", name), texts), 5)
    found = decode(*whole(backbone, pruned(backbone, "speculative", name), texts), 5)
    assert [row.tokens for row in found] == [row.tokens for row in expected]
    assert len({tuple(row.tokens) for row in expected}) > 10


@pytest.mark.parametrize("name", METHODS)
def test_the_engine_answers_the_same(backbone: Backbone, name: str) -> None:
    """Batch size, reuse, drafts and lengths of answers."""

    def run(decoding: str, **how: Any) -> dict[str, Any]:
        method = pruned(backbone, decoding, name)
        batches = answers(backbone, method, LongEcho(), DOCS, Settings(**how))
        return {answer.doc.id: answer for batch in batches for answer in batch}

    expected = {key: a.response for key, a in run("greedy", batch_size=8).items()}
    assert len({len(text) for text in expected.values()}) > 1
    drafts = []
    for size, reuse in ((1, False), (3, True), (8, False)):
        found = run("speculative", batch_size=size, reuse=reuse)
        assert {key: a.response for key, a in found.items()} == expected
        drafts.append({key: a.drafts for key, a in found.items()})
    assert drafts[0] == drafts[1] == drafts[2]


class Oracle:
    """Knows the answers; may lie about them, or hide the truth among random branches."""

    shared = 0

    def __init__(self, known: Sequence[Sequence[int]], start: Tensor, mode: str) -> None:
        self.known, self.start, self.mode = list(known), start, mode
        self.random = torch.Generator().manual_seed(0)

    def draft(self, kv: KVState, newest: Tensor, running: Tensor, room: Tensor) -> Draft:
        width = 12 if self.mode == "tree" else 4
        said = (kv.next_position - self.start + 1).tolist()
        rows = [list(row[n : n + width]) for row, n in zip(self.known, said, strict=True)]
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        valid = torch.tensor([[n < len(row) for n in range(width)] for row in rows])
        if self.mode == "right":
            return Draft(tokens, None, valid)
        if self.mode == "wrong":
            return Draft(tokens + 1, None, torch.ones_like(valid))
        parents = torch.stack([
            torch.stack([torch.randint(-1, n, (), generator=self.random) for n in range(width)])
            for _ in rows
        ])  # fmt: skip
        depth = torch.zeros_like(parents)
        for node in range(width):
            before = parents[:, node : node + 1]
            depth[:, node] = (
                torch.where(before < 0, -1, depth.gather(1, before.clamp_min(0)))[:, 0] + 1
            )
        truth = tokens.gather(1, depth)
        lie = torch.rand(truth.shape, generator=self.random) < 0.3
        gone = torch.rand(truth.shape, generator=self.random) < 0.1
        return Draft(truth + lie, parents, ~gone)

    def accept(self, kv: KVState, states: Stream, kept: Tensor) -> None:
        assert states.hidden.shape[1] == kept.shape[1]

    def rows(self, index: Tensor) -> None:
        self.known = [self.known[n] for n in index.tolist()]
        self.start = self.start[index]


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["right", "wrong", "tree"])
@pytest.mark.parametrize("name", ["twigvlm", "pdrop"])
@pytest.mark.parametrize("rows", [1, 5])
def test_any_drafter_is_exact(backbone: Backbone, mode: str, name: str, rows: int) -> None:
    """Always right, always wrong, or a random tree; PDrop has positions of its own per layer."""
    method = pruned(backbone, "greedy") if name == "twigvlm" else Row(name, 20).build(backbone)
    expected = [row.tokens for row in decode(*whole(backbone, method, rows), NEW)]
    endless = [row.tokens for row in decode(*whole(backbone, method, rows), NEW, stops=False)]
    assert all(len(row) == NEW for row in endless)
    for stops, known in ((True, expected), (False, endless)):
        decoder, kv, logits = whole(backbone, method, rows)
        oracle = Oracle(endless, kv.next_position, mode)
        found: list[Decoded] = speculate(decoder, kv, logits, NEW, oracle, stops)
        assert [row.tokens for row in found] == known
        for row, whole_answer in zip(found, endless, strict=True):
            assert row.drafts is not None
            if mode == "wrong":
                assert row.drafts.accepted == 0
            if mode == "right" and not stops:
                assert row.drafts.accepted == row.drafts.drafted
                assert row.drafts.verifications == -(-(len(whole_answer) - 1) // 5)


@torch.inference_mode()
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_answer_is_longer_than_its_limit(backbone: Backbone, limit: int) -> None:
    for name in METHODS:
        method = pruned(backbone, "speculative", name)
        expected = decode(*whole(backbone, pruned(backbone, "greedy", name), 3), limit)
        found = decode(*whole(backbone, method, 3), limit)
        assert [row.tokens for row in found] == [row.tokens for row in expected]


@torch.inference_mode()
@pytest.mark.parametrize("name", METHODS)
def test_caches_hold_the_answer_and_nothing_else(backbone: Backbone, name: str) -> None:
    """Spec 7.4 and 7.5: text, R, or none; the twig everything; positions go on from the prompt."""
    method = pruned(backbone, "speculative", name, confidence=0.0) if name == "twigvlm" else (
        pruned(backbone, "speculative", name)
    )  # fmt: skip
    decoder = Decoder(backbone, method)
    kv, logits = ask(backbone, method)
    start = int(kv.next_position[0])
    before = [layout.tokens for layout in kv.layouts if layout is not None]
    assert kv.branch is not None
    twig_before = [layout.tokens for layout in kv.branch.layouts if layout is not None]
    assert set(twig_before) == {before[0]}
    answer = decode(decoder, kv, logits, NEW, stops=False)[0].tokens
    written = int(kv.next_position[0]) - start
    assert written >= len(answer) - 1
    for layer, layout in enumerate(kv.layouts):
        assert layout is not None and bool(layout.valid.all())
        assert layout.tokens == before[layer] + written == kv.entries[layer].keys.shape[2]
        tail = layout.positions[:, 0, -written:]
        assert torch.equal(tail, torch.arange(start, start + written).expand_as(tail))
        visual = int(layout.is_kind(Kind.VISUAL).sum())
        assert visual == method.schedule(36, decoder.layers)[layer]
    waiting = 1 if name == "twigvlm" else 4  # what the branch reads a round later
    for layout in kv.branch.layouts:
        assert layout is not None
        assert layout.tokens + waiting >= twig_before[0] + written >= layout.tokens


def test_plans_follow_the_options(backbone: Backbone) -> None:
    """Spec 7.5 and 7.8."""
    assert pruned(backbone, "speculative").speculation == Chain(5, 0.6)
    assert pruned(backbone, "speculative", "twigvlm-pp").speculation == Tree(10, 10, 4, 60)
    assert pruned(backbone, "greedy", "twigvlm-pp").speculation is None


def test_a_run_tells_what_became_of_its_drafts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, {})
    assert run.drafting() == {"acceptance": None, "tokens_per_verification": None}
    drafts = {"verifications": 4, "drafted": 10, "accepted": 6}
    run.records = {"a": {"drafts": drafts}, "b": {"drafts": drafts}, "c": {}}
    assert run.drafting() == {"acceptance": 0.6, "tokens_per_verification": 2.5}
    answer = Answer(samples()[0], "", "yes", drafts=Drafts(2, 3, 1))
    assert asdict(Drafts(2, 3, 1)).items() <= record_drafts(answer).items()


def record_drafts(answer: Answer) -> dict[str, int]:
    class Plain(LongEcho):
        """Scores nothing."""

        def score_one(self, doc: Any, response: Any, mode: str) -> Any:
            return SimpleNamespace(parsed=SimpleNamespace(value=""), outcome=0.0)

    found: dict[str, int] = record_of(Plain(), answer, "")["drafts"]
    return found
