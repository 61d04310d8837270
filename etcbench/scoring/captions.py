"""Caption metrics over a whole split: CIDEr, and the others of the COCO caption package (4.7.2).

CIDEr is computed here. BLEU, METEOR and ROUGE-L come from `pycocoevalcap` (extra ``caption``),
METEOR and the original tokeniser also need Java. Without them a tokeniser of our own stands in,
METEOR is left out, and the notes of the score say so. On ordinary captions its tokens, and so the
other scores, are the same; it differs in abbreviations with full stops (``p.m.``), words joined by
a slash, dashes longer than a hyphen, and contractions without an apostrophe (``gonna``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from etcbench.errors import UsageError
from etcbench.scoring.statistics import Floats

SIGMA = 6.0
ORDERS = 4
_TOKEN = re.compile(
    r"n't(?!\w)|'(?:s|m|d|ll|re|ve)(?!\w)"
    r"|(?<!\w)[-+]?\d*(?:[.,:/-]\d+)+|(?<!\w)[-+]\d+|\d+(?:[.,:/]\d+)+"
    r"|(?:[^\W_](?!n't(?!\w)))*[^\W_](?=n't(?!\w))|[#@]?[^\W\d_]\w*(?:[-&]\w+)*|\w+(?:[-&]\w+)*"
    r"|\.{2,}|-{2,}|\S"
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = re.compile(r"[\"'`.?!,:;“”‘’]|\.{2,}|-+")


def tokenise(caption: str) -> str:
    """Lower-case, split off clitics and symbols, drop punctuation; tokens by spaces.

    Follows the Penn Treebank conventions of the original on ordinary captions.
    """
    tokens = _TOKEN.findall(caption.lower())
    return " ".join(_BRACKETS.get(t, t) for t in tokens if not _DROPPED.fullmatch(t))


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """CIDEr-D of each sample, with document frequencies from these very references.

    Parameters
    ----------
    candidates : sequence of n str
        Tokens separated by spaces.
    references : sequence of n sequences of str
        At least one each, tokenised alike.

    Returns
    -------
    array [n]
        The score of the set is the mean. A single sample scores 0, since ln 1 is 0.
    """
    grams = [[_ngrams(text) for text in texts] for texts in references]
    seen: Counter[tuple[str, ...]] = Counter()
    for texts in grams:
        seen.update({gram for counts in texts for gram in counts})
    log_n = math.log(len(references)) if references else 0.0

    def weigh(counts: Counter[tuple[str, ...]]) -> tuple[list[dict], list[float], int]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for gram, count in counts.items():
            weights[len(gram) - 1][gram] = count * (log_n - math.log(max(1, seen[gram])))
        norms = [math.sqrt(math.fsum(w * w for w in order.values())) for order in weights]
        return weights, norms, sum(c for gram, c in counts.items() if len(gram) == 2)

    scores = np.zeros(len(candidates))
    for i, (candidate, texts) in enumerate(zip(candidates, grams, strict=True)):
        ours, our_norms, our_length = weigh(_ngrams(candidate))
        for counts in texts:
            theirs, norms, length = weigh(counts)
            penalty = math.exp(-((our_length - length) ** 2) / (2 * SIGMA**2))
            for mine, my_norm, other, norm in zip(ours, our_norms, theirs, norms, strict=True):
                overlap = math.fsum(
                    min(w, other[gram]) * other[gram] for gram, w in mine.items() if gram in other
                )
                if my_norm and norm:
                    overlap /= my_norm * norm
                scores[i] += overlap * penalty
        scores[i] *= 10 / ORDERS / len(texts)
    return scores


@lru_cache(maxsize=2)
def cider_of(
    candidates: tuple[str, ...], references: tuple[tuple[str, ...], ...]
) -> tuple[Floats, str]:
    """CIDEr-D of each sample from raw text, and which tokeniser was used.

    Parameters
    ----------
    candidates, references : as in `cider`
        In tuples, so that the last results can be remembered.
    """
    said, known, note = _tokens(candidates, references)
    samples = cider(said, known)
    samples.setflags(write=False)
    return samples, note


@lru_cache(maxsize=2)
def other_metrics(
    candidates: tuple[str, ...], references: tuple[tuple[str, ...], ...]
) -> tuple[dict[str, float], str]:
    """Compute ``Bleu_1`` to ``Bleu_4``, ``ROUGE_L`` and ``METEOR`` as far as installed.

    Returns
    -------
    metrics : dict
    note : str
        What is missing, or "".
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        return {}, "BLEU, METEOR and ROUGE-L need the extra caption"
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    texts, lists, _ = _tokens(candidates, references)
    known = dict(enumerate(lists))
    said = {i: [text] for i, text in enumerate(texts)}
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(ORDERS).compute_score(known, said)
        rouge, _ = Rouge().compute_score(known, said)
        found = {f"Bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
        found["ROUGE_L"] = float(rouge)
        if not _has_java():
            return found, "METEOR needs Java"
        found["METEOR"] = float(Meteor().compute_score(known, said)[0])
    return found, ""


def _ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(
        tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1)
    )


def _has_java() -> bool:
    return shutil.which("java") is not None


@lru_cache(maxsize=2)
def _tokens(
    candidates: tuple[str, ...], references: tuple[tuple[str, ...], ...]
) -> tuple[list[str], list[list[str]], str]:
    # a line end would separate captions for the original tokeniser
    texts = [
        [" ".join(text.split()) for text in (candidate, *known)]
        for candidate, known in zip(candidates, references, strict=True)
    ]
    if importlib.util.find_spec("pycocoevalcap") is None or not _has_java():
        tokens = [[tokenise(text) for text in entry] for entry in texts]
        note = "tokenised by the built-in tokeniser"
    else:
        lines = iter(_penn_treebank([text for entry in texts for text in entry]))
        tokens = [[next(lines) for _ in entry] for entry in texts]
        note = "tokenised by the original Penn Treebank tokeniser"
    return [entry[0] for entry in tokens], [entry[1:] for entry in tokens], note


def _penn_treebank(captions: Sequence[str]) -> list[str]:
    """Tokenise with the Java program that `pycocoevalcap` brings, and drop what it drops.

    Its own wrapper is not used because that lets the program report its speed on our terminal and
    writes into the folder of the package, which may be read-only.

    Raises
    ------
    UsageError
        If the program fails.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    command = ["java", "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captions.txt"
        file.write_bytes("\n".join(captions).encode(errors="replace"))  # lone surrogates
        where = Path(ptbtokenizer.__file__).parent
        done = subprocess.run([*command, str(file)], cwd=where, capture_output=True)
    lines = done.stdout.decode(errors="replace").split("\n")
    # the program ends its last line only if there is something in it
    lines = lines[: len(captions)] + [""] * (len(captions) - len(lines))
    if done.returncode or (any(captions) and not any(lines)):
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise UsageError(
            f"the Penn Treebank tokeniser ended with: {said[-1]}; repair Java, or take it off "
            "PATH to use the built-in tokeniser"
        )
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(w for w in line.rstrip().split(" ") if w not in dropped) for line in lines]
