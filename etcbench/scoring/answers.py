"""Normalise short answers and score them against ten people's answers (spec tasks 3)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_SYMBOLS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
    "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))
# "somebody'd somebodyd" and the keys in capitals are slips of the original that must stay
_PAIRS = """
aint ain't, arent aren't, cant can't, couldve could've, couldnt couldn't, couldn'tve couldn't've,
couldnt've couldn't've, didnt didn't, doesnt doesn't, dont don't, hadnt hadn't,
hadnt've hadn't've, hadn'tve hadn't've, hasnt hasn't, havent haven't, hed he'd, hed've he'd've,
he'dve he'd've, hes he's, howd how'd, howll how'll, hows how's, Id've I'd've, I'dve I'd've,
Im I'm, Ive I've, isnt isn't, itd it'd, itd've it'd've, it'dve it'd've, itll it'll, let's let's,
maam ma'am, mightnt mightn't, mightnt've mightn't've, mightn'tve mightn't've, mightve might've,
mustnt mustn't, mustve must've, neednt needn't, notve not've, oclock o'clock, oughtnt oughtn't,
ow's'at 'ow's'at, 'ows'at 'ow's'at, 'ow'sat 'ow's'at, shant shan't, shed've she'd've,
she'dve she'd've, she's she's, shouldve should've, shouldnt shouldn't, shouldnt've shouldn't've,
shouldn'tve shouldn't've, somebody'd somebodyd, somebodyd've somebody'd've,
somebody'dve somebody'd've, somebodyll somebody'll, somebodys somebody's, someoned someone'd,
someoned've someone'd've, someone'dve someone'd've, someonell someone'll, someones someone's,
somethingd something'd, somethingd've something'd've, something'dve something'd've,
somethingll something'll, thats that's, thered there'd, thered've there'd've,
there'dve there'd've, therere there're, theres there's, theyd they'd, theyd've they'd've,
they'dve they'd've, theyll they'll, theyre they're, theyve they've, twas 'twas, wasnt wasn't,
wed've we'd've, we'dve we'd've, weve we've, werent weren't, whatll what'll, whatre what're,
whats what's, whatve what've, whens when's, whered where'd, wheres where's, whereve where've,
whod who'd, whod've who'd've, who'dve who'd've, wholl who'll, whos who's, whove who've,
whyll why'll, whyre why're, whys why's, wont won't, wouldve would've, wouldnt wouldn't,
wouldnt've wouldn't've, wouldn'tve wouldn't've, yall y'all, yall'll y'all'll, y'allll y'all'll,
yall'd've y'all'd've, y'alld've y'all'd've, y'all'dve y'all'd've, youd you'd, youd've you'd've,
you'dve you'd've, youll you'll, youre you're, youve you've
""".replace(",", " ").split()
_CONTRACTIONS = dict(zip(_PAIRS[::2], _PAIRS[1::2], strict=True))
_COMMA_VQA = re.compile(r"(\d)(,)(\d)")
_COMMA_EVALAI = re.compile(r"(?<=\d)(,)+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
# the original passes a flag where the count belongs
_MOST_PERIODS = 32
# long strings are not worth remembering: real answers repeat, essays do not
_REMEMBERED = 200


def vqa_norm(text: str) -> str:
    """Normalise as the official VQA script does (spec tasks 3.1), with its quirks.

    >>> vqa_norm("Two dogs, the T-shirt")
    '2 dogs t shirt'
    """
    return _vqa_cached(text) if len(text) < _REMEMBERED else _vqa(text)


def evalai_norm(text: str) -> str:
    """Normalise as EvalAI, TextVQA and LLaVA's submissions do (spec tasks 3.2).

    >>> evalai_norm("Joe's Pizza")
    "joe 's pizza"
    """
    return _evalai_cached(text) if len(text) < _REMEMBERED else _evalai(text)


def lmms_vqa_norm(text: str) -> str:
    """Normalise as lmms-eval's VQAv2 does: 3.1 with the comma test of 3.2 (spec tasks 6.5)."""
    return _words(_punctuation(trim(text), _COMMA_EVALAI))


def vqa_punctuation(text: str) -> str:
    """Run the first half of `vqa_norm`: spaces and punctuation (spec tasks 3.1, steps 1 to 3)."""
    return _punctuation(trim(text), _COMMA_VQA)


def trim(text: str) -> str:
    """Turn newlines and tabs into spaces and strip (spec tasks 3.1, step 1)."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def consensus(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy in 0..1 against people's answers, leaving each one out in turn (spec tasks 3.4).

    Parameters
    ----------
    prediction : str
        Already normalised as the benchmark says.
    answers : sequence of str
        Usually ten, normalised alike. Exactly one is left out at a time, by position.
    """
    people = len(answers)
    agree = answers.count(prediction)
    if not agree:
        return 0.0
    left_out_agrees = agree * min(1.0, (agree - 1) / 3)
    left_out_differs = (people - agree) * min(1.0, agree / 3)
    return (left_out_agrees + left_out_differs) / people


def official_vqa(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy by the official script: nothing is normalised where all people agree (4.5).

    Parameters
    ----------
    prediction : str
        Raw, or normalised beforehand as LLaVA does.
    answers : sequence of str
        Raw.
    """
    forms = [_forms(answer) for answer in answers]
    if len({trimmed for trimmed, _ in forms}) > 1:
        return consensus(vqa_norm(prediction), [normalised for _, normalised in forms])
    return consensus(trim(prediction), [trimmed for trimmed, _ in forms])


@lru_cache(1 << 17)
def _forms(answer: str) -> tuple[str, str]:
    """Trimmed and normalised; people's answers repeat, so one look-up serves both."""
    return trim(answer), _vqa(answer)


def _vqa(text: str) -> str:
    return _words(vqa_punctuation(text))


def _evalai(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(trim(text), _COMMA_EVALAI))


_vqa_cached = lru_cache(1 << 17)(_vqa)
_evalai_cached = lru_cache(1 << 17)(_evalai)


def _punctuation(text: str, comma: re.Pattern[str]) -> str:
    has_number = comma.search(text) is not None
    out = text
    for symbol in _SYMBOLS:
        if symbol in text:
            # the tests look at the text as it came in, not at what is left of it
            joined = has_number or f"{symbol} " in text or f" {symbol}" in text
            out = out.replace(symbol, "" if joined else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def _words(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
