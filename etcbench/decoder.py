"""The decoder's layer loop: prefill with compression between layers, then greedy decoding.

One loop serves every method and backbone. A sequence runs as one or two segments: the image
prefix (everything up to the last visual or learned token) and the text behind it. Running them
apart lets the prefix of a picture serve many questions; running them as one gives the same
logits, which the tests hold it to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from etcbench.backbones.base import Backbone, Stream
from etcbench.compressor import Compressor, LayerState
from etcbench.selection import Kind, Layout, Selection


@dataclass
class KVState:
    """Keys and values of every layer, and what each of their positions is.

    Layers hold different tokens once a method has dropped some: ``layouts[l]`` describes layer
    ``l``. ``entered[l]`` counts the visual tokens at that layer's input, shape (batch,), which is
    what compute and memory follow (spec selective 1.3).
    """

    cache: DynamicCache
    layouts: list[Layout | None]
    entered: list[Tensor | None]
    next_position: Tensor

    @classmethod
    def empty(cls, layers: int, start: Tensor) -> KVState:
        """Start without any tokens; ``start`` is each row's first free position."""
        return cls(DynamicCache(), [None] * layers, [None] * layers, start)

    def rows(self, index: Tensor) -> KVState:
        """Take (or repeat) sequences; the copy shares no memory with the original."""
        copied = DynamicCache()
        layouts: dict[int, Layout] = {}
        for number, layer in enumerate(self.cache.layers):
            if layer.keys is not None and layer.values is not None:
                copied.update(layer.keys[index], layer.values[index], number)
        for layout in self.layouts:
            if layout is not None and id(layout) not in layouts:
                layouts[id(layout)] = layout.rows(index)
        return KVState(
            copied,
            [None if layout is None else layouts[id(layout)] for layout in self.layouts],
            [None if count is None else count[index] for count in self.entered],
            self.next_position[index],
        )

    def keep(self, layer: int, selection: Selection) -> None:
        """Drop entries of one layer's cache."""
        entry = self.cache.layers[layer]
        entry.keys = selection.gather(entry.keys.transpose(1, 2)).transpose(1, 2)
        entry.values = selection.gather(entry.values.transpose(1, 2)).transpose(1, 2)

    def evict(self, compressor: Compressor) -> None:
        """Let the method evict entries of every layer."""
        chosen: dict[int, tuple[Selection | None, Layout]] = {}
        for number, layout in enumerate(self.layouts):
            if layout is None:
                continue
            if id(layout) not in chosen:
                selection = compressor.evict(layout)
                kept = layout if selection is None else layout.select(selection)
                chosen[id(layout)] = (selection, kept)
            selection, self.layouts[number] = chosen[id(layout)]
            if selection is not None:
                self.keep(number, selection)

    def bytes(self) -> list[int]:
        """Bytes of the cached tensors, layer by layer."""
        return [
            0 if layer.keys is None else layer.keys.nbytes + layer.values.nbytes
            for layer in self.cache.layers
        ]


@dataclass
class Shared:
    """What is left of an image prefix after the layers that do not depend on the question.

    Attributes
    ----------
    kv : KVState
        Cache of those layers.
    inputs, outputs : Stream or None
        Input and output of the last shared layer; needed when layers follow that depend on the
        question.
    """

    kv: KVState
    inputs: Stream | None = None
    outputs: Stream | None = None

    def rows(self, index: Tensor) -> Shared:
        """Fan out to questions."""

        def take(stream: Stream | None) -> Stream | None:
            return stream and Stream(stream.hidden[index], stream.layout.rows(index))

        return Shared(self.kv.rows(index), take(self.inputs), take(self.outputs))


@dataclass
class Decoder:
    """Runs one method on one backbone."""

    backbone: Backbone
    compressor: Compressor
    _masks: dict[tuple[int, int], tuple[Layout, Layout, Tensor | None]] = field(
        default_factory=dict, repr=False
    )

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
        start = prefix.layout.next_position()
        text = self.backbone.continue_text(after, start)
        kv = KVState.empty(self.layers, text.layout.next_position())
        stream = self.run(_join(prefix, text), kv, 0, self.layers)
        if self._has_image(prefix):
            kv.evict(self.compressor)
        return kv, self._last_logits(stream)

    def share(self, prefix: Stream) -> Shared:
        """Prefill what serves every question on the pictures of ``prefix``."""
        whole_prefix = self.compressor.reuse == "prefix"
        stop = self.layers if whole_prefix else min(self.compressor.shared_layers, self.layers)
        kv = KVState.empty(self.layers, prefix.layout.next_position())
        if not prefix.layout.tokens:
            return Shared(kv)
        if whole_prefix:
            self.run(prefix, kv, 0, stop)
            kv.evict(self.compressor)
            return Shared(kv)
        if stop == 0:
            return Shared(kv, outputs=prefix)
        inputs = self.run(prefix, kv, 0, stop - 1, select=False)
        outputs = self.run(inputs, kv, stop - 1, stop, select=False)
        return Shared(kv, inputs, outputs)

    def question(self, shared: Shared, after: Sequence[Sequence[int]]) -> tuple[KVState, Tensor]:
        """Prefill the text behind a shared prefix (fanned out to one row per question)."""
        kv = shared.kv
        text = self.backbone.continue_text(after, kv.next_position)
        kv.next_position = torch.maximum(kv.next_position, text.layout.next_position())
        if shared.outputs is None:
            return kv, self._last_logits(self.run(text, kv, 0, self.layers, select=False))
        stop = min(self.compressor.shared_layers, self.layers)
        if stop and shared.inputs is not None:
            inputs = self.run(text, kv, 0, stop - 1, select=False)
            outputs = self.run(inputs, kv, stop - 1, stop, select=False)
            stream = self._select(
                stop - 1, _join(shared.inputs, inputs), _join(shared.outputs, outputs), kv
            )
        else:
            stream = _join(shared.outputs, text)
        return kv, self._last_logits(self.run(stream, kv, stop, self.layers))

    def run(
        self, stream: Stream, kv: KVState | None, start: int, stop: int, select: bool = True
    ) -> Stream:
        """Run layers ``start`` to ``stop - 1``, letting the method select after each of them.

        Parameters
        ----------
        kv : KVState or None
            Where keys and values go; None (training) keeps none.
        select : bool
            False where the method's hooks must not act: text behind a compressed prefix, or a
            prefix that still waits for its question.
        """
        rotary = self.backbone.rotary(stream.hidden, stream.layout.positions)
        for layer in range(start, stop):
            keys = stream.layout
            if kv is not None:
                if (cached := kv.layouts[layer]) is not None:
                    keys = self._joined_layout(cached, stream.layout)
                kv.layouts[layer] = keys
                if kv.entered[layer] is None:
                    kv.entered[layer] = keys.is_kind(Kind.VISUAL).sum(-1)
            mask = self.mask(stream.layout, keys)
            hidden = self.backbone.run_layer(
                layer, stream, mask, rotary, None if kv is None else kv.cache
            )
            after = Stream(hidden, stream.layout)
            if select:
                after = self._select(layer, stream, after, kv)
                if after.layout is not stream.layout:
                    rotary = self.backbone.rotary(after.hidden, after.layout.positions)
            stream = after
        self._masks.clear()
        return stream

    def mask(self, query: Layout, key: Layout) -> Tensor | None:
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
        plain = restricted is None and not packed and bool(key.valid.all())
        # Eager attention knows no causality of its own.
        implicit = behind == 0 and self.backbone.attention != "eager"
        if not (plain and (implicit or query.tokens == 1)):
            order = torch.arange(key.tokens, device=key.kind.device)
            mask = (order <= order[behind:, None]) & key.valid[:, None, :]
            if restricted is not None:
                mask = mask & restricted
            if packed:
                turn = key.turn[:, None, :]
                mask = mask & ((turn < 0) | (turn == query.turn[:, :, None]))
            # A padded query must see something, or its softmax is not a number.
            own = (order == order[behind:, None]) & ~query.valid[:, :, None]
            mask = (mask | own)[:, None]
        self._masks[id(query), id(key)] = (query, key, mask)
        return mask

    def _joined_layout(self, cached: Layout, new: Layout) -> Layout:
        """Append to a layer's layout; layers that shared one go on sharing one."""
        memo = self._masks.get((id(cached), -id(new)))
        if memo is None:
            memo = (cached, Layout.cat([cached, new]), None)
            self._masks[id(cached), -id(new)] = memo
        return memo[1]

    def _select(self, layer: int, before: Stream, after: Stream, kv: KVState | None) -> Stream:
        """Ask the method what becomes of the sequence after a layer."""

        def attention_rows(rows: Tensor) -> Tensor:
            return self._attention_rows(layer, before, rows, kv)

        state = LayerState(layer, after.hidden, after.layout, attention_rows)
        selection = self.compressor.select_hidden(state)
        return after if selection is None else after.select(selection)

    def _attention_rows(
        self, layer: int, inputs: Stream, rows: Tensor, kv: KVState | None
    ) -> Tensor:
        """Recompute a few attention rows of a layer under any backend (spec selective 1.5)."""
        layout = inputs.layout
        batch = torch.arange(len(rows), device=rows.device)[:, None]
        asked = Stream(inputs.hidden[batch, rows], layout.at(rows))
        rotary = self.backbone.rotary(asked.hidden, asked.layout.positions)
        query, own_keys = self.backbone.queries_keys(layer, asked.hidden, rotary)
        if kv is not None:
            keys = kv.cache.layers[layer].keys
        else:
            whole = self.backbone.rotary(inputs.hidden, layout.positions)
            keys = self.backbone.queries_keys(layer, inputs.hidden, whole)[1]
        groups = query.shape[1] // own_keys.shape[1]
        keys = keys.repeat_interleave(groups, 1)
        scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        order = torch.arange(layout.tokens, device=rows.device)
        seen = (order <= rows[..., None]) & layout.valid[:, None]
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
        return scores.float().softmax(-1).nan_to_num().to(query.dtype)

    def _last_logits(self, stream: Stream) -> Tensor:
        last = stream.layout.last_valid()
        rows = torch.arange(len(last), device=last.device)
        return self.backbone.logits(stream.hidden[rows, last])

    @staticmethod
    def _has_image(prefix: Stream) -> bool:
        return bool(prefix.layout.is_kind(Kind.VISUAL, Kind.LEARNED).any())

    # Decode -----------------------------------------------------------------------------------

    def step(self, kv: KVState, tokens: Tensor) -> Tensor:
        """Feed one token per row, shape (batch,); returns the next logits (batch, vocabulary)."""
        kind = torch.full((len(tokens), 1), int(Kind.SUFFIX), device=tokens.device)
        layout = Layout.build(
            kind.to(torch.int8), kv.next_position[None, :, None].expand(self.backbone.planes, -1, 1)
        )
        stream = Stream(self.backbone.embed_tokens(tokens[:, None]), layout)
        kv.next_position = kv.next_position + 1
        stream = self.run(stream, kv, 0, self.layers, select=False)
        return self.backbone.logits(stream.hidden[:, -1])

    def greedy(self, kv: KVState, logits: Tensor, max_new_tokens: int) -> list[list[int]]:
        """Decode greedily until every row has ended; the end token is not part of the answer.

        Rows that have ended leave the batch once half of it is idle.
        """
        ends = torch.tensor(sorted(self.backbone.eos_ids), device=logits.device)
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


def _join(first: Stream, second: Stream) -> Stream:
    return Stream(
        torch.cat([first.hidden, second.hidden], 1), Layout.cat([first.layout, second.layout])
    )
