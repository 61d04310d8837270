"""The decoder's layer loop: prefill with compression between layers, then greedy decoding.

One loop serves every method and backbone. A sequence runs as one or two segments: the image
prefix (everything up to the last visual or learned token) and the text behind it. Running them
apart lets the prefix of a picture serve many questions; running them as one gives the same
logits, which the tests hold it to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from etcbench.attention import LayerAttention
from etcbench.backbones.base import Backbone
from etcbench.backbones.stream import Stream
from etcbench.compressor import Compressor, LayerState
from etcbench.kv import KVState, Shared
from etcbench.relevance import prompt_relevance
from etcbench.selection import Kind, Layout, Selection
from etcbench.states import PromptState, RelevanceRule

# Longest answer whose relevance is asked for while a prompt waits for its selection.
ANSWER_TOKENS = 32


@dataclass
class Decoder:
    """Runs one method on one backbone."""

    backbone: Backbone
    compressor: Compressor
    _masks: dict[tuple[int, int], tuple[Layout, Layout, Tensor | None]] = field(
        default_factory=dict, repr=False
    )

    def __post_init__(self) -> None:
        self.compressor.attach(self.backbone)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.backbone.decoder_layers)

    # Prefill ----------------------------------------------------------------------------------

    def whole(self, prefix: Stream, after: Sequence[Sequence[int]]) -> tuple[KVState, Tensor]:
        """Prefill prefix and text in a single pass.

        Returns
        -------
        KVState, Tensor
            The cache, and the logits that follow each row's last token, shape (batch, vocabulary).
        """
        text = self.backbone.continue_text(after, prefix.next_position)
        kv = KVState.empty(self.layers, text.layout.next_position())
        stream = self.run(Stream.cat([prefix, text]), kv, 0, self.layers)
        if self._has_image(prefix):
            kv.evict(self.compressor)
        return kv, self._last_logits(stream)

    def share(self, prefix: Stream) -> Shared:
        """Prefill what serves every question on the pictures of ``prefix``."""
        whole_prefix = self.compressor.reuse == "prefix"
        stop = self.layers if whole_prefix else min(self.compressor.shared_layers, self.layers)
        kv = KVState.empty(self.layers, prefix.next_position)
        if not prefix.layout.tokens:
            return Shared(kv)
        if whole_prefix:
            self.run(prefix, kv, 0, stop)
            kv.evict(self.compressor)
            return Shared(kv)
        if stop == 0:
            return Shared(kv, prefix, outputs=prefix)
        inputs = self.run(prefix, kv, 0, stop - 1, select=False)
        outputs = self.run(inputs, kv, stop - 1, stop, select=False)
        return Shared(kv, prefix, inputs, outputs, self._grow(stop, outputs, kv))

    def question(self, shared: Shared, after: Sequence[Sequence[int]]) -> tuple[KVState, Tensor]:
        """Prefill the text behind a shared prefix (fanned out to one row per question)."""
        kv = shared.kv
        text = self.backbone.continue_text(after, kv.next_position)
        kv.next_position = torch.maximum(kv.next_position, text.layout.next_position())
        if shared.outputs is None:
            return kv, self._last_logits(self._at(text, kv, kv.lag, 0, self.layers))
        stop = min(self.compressor.shared_layers, self.layers)
        assert shared.embeds is not None
        if stop and shared.inputs is not None:
            embedded = Stream.cat([shared.embeds, text])
            kv.marks = self.compressor.mark(embedded.hidden, embedded.layout)
            inputs = self.run(text, kv, 0, stop - 1, select=False)
            outputs = self.run(inputs, kv, stop - 1, stop, select=False)
            grown = self._grow(stop, outputs, kv)
            if shared.branch is not None and grown is not None:
                grown = Stream.cat([shared.branch, grown])
            stream = self._select(
                stop - 1,
                Stream.cat([shared.inputs, inputs]),
                Stream.cat([shared.outputs, outputs]),
                kv,
                grown=grown,
            )
        else:
            stream = Stream.cat([shared.outputs, text])
        return kv, self._last_logits(self.run(stream, kv, stop, self.layers))

    def run(
        self,
        stream: Stream,
        kv: KVState | None,
        start: int,
        stop: int,
        select: bool = True,
        *,
        blocks: nn.ModuleList | None = None,
        within: Tensor | None = None,
        watch: Callable[[int, Stream], None] | None = None,
    ) -> Stream:
        """Run layers ``start`` to ``stop - 1``, letting the method select after each of them.

        Parameters
        ----------
        kv : KVState or None
            Where keys and values go; None (training) keeps none.
        select : bool
            False where the method's hooks must not act: text behind a compressed prefix, or a
            prefix that still waits for its question.
        blocks : nn.ModuleList, optional
            Layers of a branch, in place of the backbone's.
        within : Tensor, optional, bool, shape (batch, tokens, last)
            Which of the ``last`` keys each token may attend to, where they are branches of a tree
            and not all in front of one another.
        watch : callable, optional
            Shown the number and the input of each layer.
        """
        if select and start == 0 and kv is not None:
            kv.marks = self.compressor.mark(stream.hidden, stream.layout)
            stream = self._select_prompt(stream, kv)
        if start == 0 and (own := self.compressor.number(stream.layout)) is not None:
            stream = replace(stream, layout=replace(stream.layout, positions=own))
        rotary = self.backbone.rotary(stream.hidden, stream.layout.positions)
        for layer in range(start, stop):
            if watch is not None:
                watch(layer, stream)
            keys = stream.layout
            if kv is not None:
                if (cached := kv.layouts[layer]) is not None:
                    keys = self._joined_layout(cached, stream.layout)
                kv.layouts[layer] = keys
                if kv.entered[layer] is None:
                    kv.entered[layer] = keys.is_kind(Kind.VISUAL).sum(-1)
            mask = self.mask(stream.layout, keys, within)
            block = layer if blocks is None else blocks[layer]
            cache = None if kv is None else kv.cache
            hidden = self.backbone.run_layer(block, stream, mask, rotary, cache)
            after = stream.after_layer(hidden)
            if select and kv is not None:
                after = self._select(layer, stream, after, kv, rotary)
                if after.layout is not stream.layout:
                    rotary = self.backbone.rotary(after.hidden, after.layout.positions)
            stream = after
        self._masks.clear()
        return stream

    def mask(self, query: Layout, key: Layout, within: Tensor | None = None) -> Tensor | None:
        """Say which keys each query may attend to; the queries are the last of the keys.

        Returns
        -------
        Tensor or None
            Bool, shape (batch, 1, queries, keys); None where plain causal attention says it.
        """
        memo = self._masks.get((id(query), id(key)))
        if memo is not None:
            return memo[2]
        restricted = self.compressor.attends(query, key)
        mask: Tensor | None = None
        behind = key.tokens - query.tokens
        packed = bool((query.turn >= 0).any())
        plain = restricted is None and within is None and not packed and bool(key.valid.all())
        # Eager attention knows no causality of its own.
        implicit = behind == 0 and self.backbone.attention != "eager"
        if not (plain and (implicit or query.tokens == 1)):
            order = torch.arange(key.tokens, device=key.kind.device)
            mask = (order <= order[behind:, None]) & key.valid[:, None, :]
            if restricted is not None:
                mask = mask & restricted
            if within is not None:
                mask[..., key.tokens - within.shape[-1] :] &= within
            if packed:
                mask = mask & key.same_turn(query.turn)
            # A padded query must see something, or its softmax is not a number.
            own = (order == order[behind:, None]) & ~query.valid[:, :, None]
            mask = (mask | own)[:, None]
        self._masks[id(query), id(key)] = (query, key, mask)
        return mask

    def attention(self, layer: int | nn.Module, inputs: Stream) -> LayerAttention:
        """Attention of a layer, of the backbone or a branch, on its input."""
        return LayerAttention(self.backbone, layer, inputs, None)

    def _joined_layout(self, cached: Layout, new: Layout) -> Layout:
        """Append to a layer's layout; layers that shared one go on sharing one."""
        memo = self._masks.get((id(cached), -id(new)))
        if memo is None:
            memo = (cached, Layout.cat([cached, new]), None)
            self._masks[id(cached), -id(new)] = memo
        return memo[1]

    def _at(
        self,
        stream: Stream,
        kv: KVState,
        lag: Sequence[Tensor | None],
        start: int,
        stop: int,
        within: Tensor | None = None,
    ) -> Stream:
        """Run new tokens behind what is cached, in each layer at its own positions."""
        layout = stream.layout
        for _, group in groupby(range(start, stop), key=lambda layer: id(lag[layer])):
            layers = list(group)
            if (behind := lag[layers[0]]) is not None:
                stream = replace(stream, layout=layout.moved(-behind))
            first, last = layers[0], layers[-1]
            stream = self.run(stream, kv, first, last + 1, select=False, within=within)
        return replace(stream, layout=layout)

    def _grow(self, stop: int, stream: Stream, kv: KVState) -> Stream | None:
        """Run the method's branch on the output of layer ``stop - 1``, if it starts there.

        Returns the input of its last layer, which itself runs only where the branch will draft.
        """
        branch = self.compressor.branch
        if branch is None or branch.start != stop:
            return None
        last = len(branch.layers) - 1
        if kv.branch is None:
            kv.branch = KVState.empty(last + 1, kv.next_position)
        inputs = self.grow(stream, kv, 0, last)
        if self.compressor.speculation is not None:
            self.grow(inputs, kv, last, last + 1)
        return inputs

    def grow(
        self,
        stream: Stream,
        kv: KVState,
        start: int = 0,
        stop: int | None = None,
        within: Tensor | None = None,
    ) -> Stream:
        """Run layers of the method's branch behind what it has cached (see `run`)."""
        branch = self.compressor.branch
        assert branch is not None and kv.branch is not None
        stop = len(branch.layers) if stop is None else stop
        return self.run(
            stream, kv.branch, start, stop, select=False, blocks=branch.layers, within=within
        )

    def _select(
        self,
        layer: int,
        before: Stream,
        after: Stream,
        kv: KVState,
        rotary: tuple[Tensor, Tensor] | None = None,
        grown: Stream | None = None,
    ) -> Stream:
        """Ask the method what becomes of the sequence after a layer."""
        origin = kv.layouts[0]
        assert origin is not None
        branch = self.compressor.branch
        attention = None
        if branch is not None and (grown := grown or self._grow(layer + 1, after, kv)) is not None:
            attention = LayerAttention(self.backbone, branch.layers[-1], grown, None)
            if self.compressor.speculation is None:
                kv.branch = None
        state = LayerState(
            layer,
            after.hidden,
            after.layout,
            origin,
            kv.marks,
            LayerAttention(self.backbone, layer, before, kv.entries[layer].keys, rotary),
            LayerAttention(self.backbone, layer + 1, after, None, rotary),
            attention,
        )
        selection = self.compressor.select_hidden(state)
        return after if selection is None else self._reduce(layer + 1, after, selection, kv)

    def _select_prompt(self, stream: Stream, kv: KVState) -> Stream:
        """Ask the method what becomes of the embedded prompt before layer 0."""

        def relevance(rule: RelevanceRule) -> Tensor:
            plain = Decoder(self.backbone, Compressor())
            own = KVState.empty(self.layers, kv.next_position)
            logits = plain._last_logits(plain.run(stream, own, 0, self.layers))
            answers = plain.greedy(own, logits, ANSWER_TOKENS)
            return prompt_relevance(plain, stream, kv.next_position, answers, rule)

        attention = LayerAttention(self.backbone, 0, stream, None)
        selection = self.compressor.select_prompt(PromptState(stream.layout, attention, relevance))
        return stream if selection is None else self._reduce(0, stream, selection, kv)

    def _reduce(self, start: int, stream: Stream, selection: Selection, kv: KVState) -> Stream:
        """Apply a selection to the input of layer ``start`` and all that runs along with it."""
        chosen = stream.select(selection)
        if kv.marks is not None:
            kv.marks = selection.gather(kv.marks)
        if self.compressor.numbering == "reindex":
            chosen.layout = chosen.layout.renumbered()
            lag = kv.next_position - chosen.layout.next_position()
            kv.lag[start:] = [lag] * (self.layers - start)
        return chosen

    def _last_logits(self, stream: Stream) -> Tensor:
        last = stream.layout.last_valid()
        rows = torch.arange(len(last), device=last.device)
        return self.backbone.logits(stream.hidden[rows, last])

    @staticmethod
    def _has_image(prefix: Stream) -> bool:
        return bool(prefix.layout.is_kind(Kind.VISUAL, Kind.LEARNED).any())

    # Decode -----------------------------------------------------------------------------------

    def embed(
        self, kv: KVState, tokens: Tensor, steps: Tensor, valid: Tensor | None = None
    ) -> Stream:
        """Place generated tokens behind the sequence.

        Parameters
        ----------
        tokens : Tensor, long, shape (batch, tokens)
            Ids.
        steps : Tensor, long, of that shape or to be broadcast to it
            Positions from the first free one.
        valid : Tensor, optional, bool, shape (batch, tokens)
            Which of them exist; default all.
        """
        kind = torch.full(tokens.shape, int(Kind.SUFFIX), device=tokens.device, dtype=torch.int8)
        if valid is not None:
            kind = kind.masked_fill(~valid, int(Kind.PAD))
        positions = (kv.next_position[:, None] + steps).expand(tokens.shape)
        layout = Layout.build(kind, positions.expand(self.backbone.planes, -1, -1))
        return Stream(self.backbone.embed_tokens(tokens), layout)

    def behind(
        self, stream: Stream, kv: KVState, start: int, stop: int, within: Tensor | None = None
    ) -> Stream:
        """Run generated tokens through layers ``start`` to ``stop - 1`` (see `run`)."""
        at_prompt = self.compressor.decode_positions == "prompt"
        lag = [None] * self.layers if at_prompt else kv.lag
        return self._at(stream, kv, lag, start, stop, within)

    def step(self, kv: KVState, tokens: Tensor) -> Tensor:
        """Feed one token per row, shape (batch,); returns the next logits (batch, vocabulary)."""
        stream = self.embed(kv, tokens[:, None], torch.zeros_like(tokens)[:, None])
        kv.next_position = kv.next_position + 1
        stream = self.behind(stream, kv, 0, self.layers)
        return self.backbone.logits(stream.hidden[:, -1])

    def greedy(
        self, kv: KVState, logits: Tensor, max_new_tokens: int, stops: bool = True
    ) -> list[list[int]]:
        """Decode greedily until every row has ended; the end token is not part of the answer.

        Rows that have ended leave the batch once half of it is idle. Without ``stops`` all answers
        have the full length.
        """
        ends = torch.tensor(sorted(self.backbone.eos_ids) if stops else [], device=logits.device)
        answers: list[list[int]] = [[] for _ in range(len(logits))]
        rows = torch.arange(len(logits), device=logits.device)
        running = torch.ones_like(rows, dtype=torch.bool)
        for count in range(max_new_tokens):
            tokens = logits.argmax(-1)
            running = running & ~torch.isin(tokens, ends)
            for row, token, active in zip(
                rows.tolist(), tokens.tolist(), running.tolist(), strict=True
            ):
                if active:
                    answers[row].append(token)
            if count + 1 == max_new_tokens or not running.any():
                break
            if int(running.sum()) * 2 <= len(running):
                left = running.nonzero()[:, 0]
                kv, rows, tokens = kv.rows(left), rows[left], tokens[left]
                running = running[left]
            logits = self.step(kv, tokens)
        return answers
