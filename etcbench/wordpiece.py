"""BERT's word pieces, for methods that read the question with a BERT of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
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
            self.tokenizer = (
                _uncased(vocabulary) if vocabulary else Tokenizer.from_pretrained(HUB_ID)
            )
        except UsageError:
            raise
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


def _uncased(vocabulary: str) -> Tokenizer:
    """Build BERT's uncased tokenizer from its list of word pieces."""
    tokenizer = Tokenizer(models.WordPiece.from_file(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    end, first = tokenizer.token_to_id("[SEP]"), tokenizer.token_to_id("[CLS]")
    if end is None or first is None:
        raise UsageError(f"{vocabulary} is no vocabulary of BERT: it lacks [CLS] or [SEP]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", end), ("[CLS]", first))
    return tokenizer
