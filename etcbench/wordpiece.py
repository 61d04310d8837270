"""BERT's word pieces, for methods that read the question with a BERT of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor

from etcbench.errors import UsageError

WORDS = 30523  # bert-base-uncased and one token that was added to it
HUB_ID = "bert-base-uncased"
LENGTH = 256


class WordPiece:
    """Lower-cased word pieces, cut on the left at 256 tokens (spec abstractive 4.1).

    Parameters
    ----------
    vocabulary : str or None
        A ``vocab.txt``; None for that of bert-base-uncased, from the hub or its cache.
    """

    def __init__(self, vocabulary: str | None = None) -> None:
        if vocabulary is not None and not Path(vocabulary).is_file():
            raise UsageError(f"there is no vocabulary {vocabulary}")
        try:
            self.tokenizer: Tokenizer | BertWordPieceTokenizer = (
                Tokenizer.from_pretrained(HUB_ID)
                if vocabulary is None
                else BertWordPieceTokenizer(vocabulary, lowercase=True)
            )
        except Exception as error:  # the hub's errors have no common class
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"the vocabulary of {HUB_ID} cannot be fetched ({reason}); name a vocab.txt with "
                "--option vocabulary=FILE"
            ) from error
        self.tokenizer.enable_truncation(LENGTH, direction="left")

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokenize.

        Returns
        -------
        tuple of Tensor
            Ids, long, padded with 0 on the right, and bool, True where there is a token; both of
            shape (texts, tokens).
        """
        ids = [self.tokenizer.encode(text).ids for text in texts]
        width = max(map(len, ids))
        padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
        lengths = torch.tensor([len(row) for row in ids])
        return padded, torch.arange(width) < lengths[:, None]
