"""Questions as a method may read them before the picture has tokens: the bare text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from etcbench.backbones.stream import Stream
from etcbench.selection import Kind
from etcbench.states import Questions

if TYPE_CHECKING:
    from etcbench.backbones.base import Backbone

NOTHING = "image"  # read where nothing is asked (spec abstractive 3.1)


def read_questions(backbone: Backbone, texts: Sequence[str]) -> Questions:
    """Offer questions to a method; nothing is computed before it is asked for.

    Parameters
    ----------
    backbone : Backbone
        Tokenizer and language model that read them.
    texts : sequence of str
        User texts without the image line.
    """
    bare = [text.strip() or NOTHING for text in texts]
    distinct = list(dict.fromkeys(bare))

    def embedded() -> tuple[Stream, Tensor]:
        ids = [backbone.processor.tokenizer(text)["input_ids"] for text in distinct]
        rows = torch.tensor([distinct.index(text) for text in bare], device=backbone.device)
        return backbone.text(ids, Kind.SUFFIX), rows

    @torch.no_grad()
    def words() -> tuple[Tensor, Tensor]:
        stream, rows = embedded()
        return stream.hidden[rows], stream.layout.valid[rows]

    @torch.no_grad()
    def states() -> Tensor:
        stream, rows = embedded()
        order = torch.arange(stream.layout.tokens, device=backbone.device)
        mask = (order <= order[:, None])[None, None]  # padding on the right is never looked at
        rotary = backbone.rotary(stream.hidden, stream.layout.positions)
        for layer in range(len(backbone.decoder_layers)):
            stream.hidden = backbone.run_layer(layer, stream, mask, rotary)
        last = stream.layout.last_valid()
        return backbone.norm(stream.hidden[torch.arange(len(last)), last])[rows]

    return Questions(list(texts), states, words)
