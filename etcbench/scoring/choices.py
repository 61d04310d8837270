"""Read yes/no and lettered answers by the published rules (spec tasks 4.1 to 4.6)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

Answer = Literal["yes", "no"]


def mme_answer(response: str) -> Answer | None:
    """Read by MME's official rule: the exact word, else in the first four characters (4.2)."""
    text = response.lower()
    if text in ("yes", "no"):
        return text  # type: ignore[return-value]
    if "yes" in text[:4]:
        return "yes"
    return "no" if "no" in text[:4] else None


def mme_answer_lmms(response: str) -> Answer | None:
    """Read MME as lmms-eval does: strip, drop periods, take a lone y or n as well."""
    text = response.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return "yes" if text == "y" else "no"
    return mme_answer(text)


def pope_answer(response: str) -> tuple[Answer, bool]:
    """Read by POPE's official rule: "no" if the first sentence has no or not in it, else "yes".

    Returns
    -------
    answer : str
        Always "yes" or "no", as in the benchmark's own script.
    named : bool
        Whether the sentence holds the word yes, no or not at all.
    """
    words = response.split(".", 1)[0].replace(",", "").split(" ")
    # the script knows "No" and lower case only; "NO" therefore means yes
    if "No" in words or "no" in words or "not" in words:
        return "no", True
    return "yes", any(word.strip().lower() == "yes" for word in words)


# MMBench: two published rule sets that map free text to a letter (spec tasks 4.1)

_LMMS_LETTERS = "ABCDE"
_LMMS_AFFIXES = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
_API_FAILURE = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_TO_SPACE = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([A-D])\**", re.IGNORECASE)
REFUSED = "Z"


def mmbench_lmms(response: str, choices: Mapping[str, str]) -> str | None:
    """Infer a letter by the older rule set, the one in lmms-eval (spec tasks 4.1 a).

    Parameters
    ----------
    choices : mapping of str to str
        Letter to option text; the letters tried are A to E whatever the row offers.
    """
    tokens = response.split()
    if _API_FAILURE not in response:
        present = set(tokens)
        bare = [letter for letter in _LMMS_LETTERS if letter in present]
        if len(bare) == 1 and not ("A" in present and len(tokens) > 3):
            return bare[0]
        for before, after in _LMMS_AFFIXES:
            marked = [x for x in _LMMS_LETTERS if before + x + after in present]
            if len(marked) == 1:
                return marked[0]
    return _by_text(response, choices)


def mmbench_vlmeval(response: str, choices: Mapping[str, str]) -> str | None:
    """Infer a letter by the rule set of the current official toolkit (spec tasks 4.1 b).

    Returns
    -------
    str or None
        A letter of `choices`, ``"Z"`` for a refusal (always wrong), None if no rule applies.
    """
    if _API_FAILURE not in response:
        if any(refusal in response for refusal in _REFUSALS):
            return REFUSED
        tokens = response.translate(_TO_SPACE).split()
        present = set(tokens)
        bare = [letter for letter in choices if letter in present]
        if len(bare) == 1 and tokens.index(bare[0]) > len(tokens) - 5:
            return bare[0]
        if not bare and REFUSED in present:
            return REFUSED
        named = _ANSWER_IS.search(response)
        if named and named[1].upper() in choices:
            return named[1].upper()
    if len(response) > 2 * sum(len(text) for text in choices.values()):
        return None
    return _by_text(response, choices)


def mmbench_lmms_static(response: str, choices: Mapping[str, str]) -> str | None:
    """Extract a letter from any text, as lmms-eval's judge-free fallback does.

    A letter that starts the text as a word, else the last capital that is an option's letter. The
    specification gives no rule; this one was found from published outputs and fits all of them.
    """
    start = response.lstrip()
    if start[:1] in choices and not re.match(r"\w", start[1:2]):
        return start[0]
    found = [character for character in response if character in choices]
    return found[-1] if found else None


def _by_text(response: str, choices: Mapping[str, str]) -> str | None:
    lowered = response.lower()
    found = [letter for letter, text in choices.items() if text.lower() in lowered]
    return found[0] if len(found) == 1 else None


# SEED-Bench, ScienceQA and Q-Bench (spec tasks 4.3, 4.4, 4.6)

_SEED = re.compile(r"\(?([A-D])\)?(?:[.,:)\s]|$)")
_SQA_ANSWER = re.compile(r"The answer is ([A-Z]).")


def seed_letter(response: str) -> str | None:
    """Read a lone letter in any case, or a capital that a delimiter follows (spec tasks 4.3)."""
    text = response.strip()
    if len(text) == 1 and text.upper() in ("A", "B", "C", "D"):
        return text.upper()
    match = _SEED.match(text)
    return match[1] if match else None


def scienceqa_letter(response: str) -> str | None:
    """Read by LLaVA's rule (spec tasks 4.4): ``A``, ``A. text`` or one ``The answer is A.``."""
    if len(response) == 1 and response in "ABCDE":
        return response
    if response[:1] in tuple("ABCDE") and response[1:3] == ". ":
        return response[0]
    named = _SQA_ANSWER.findall(response)
    return named[0] if len(named) == 1 else None


def scienceqa_letter_lmms(response: str) -> str | None:
    """Read as lmms-eval does: a letter in any case, or a capital right before a period."""
    text = response.strip()
    if len(text) == 1 and text.isascii() and text.isalpha():
        return text.upper()
    return text[0] if text[1:2] == "." and text[0].isupper() else None


def qbench_lmms(response: str, choices: Mapping[str, str]) -> str | None:
    """Read by the MMMU-style rule of lmms-eval, with None where it draws at random (4.6)."""
    text = response
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", "{} ", "{}."):
        found = [letter for letter in choices if form.format(letter) in text]
        if found:
            place = "({})" if form == "({})" else " {} "
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) > 5:
        lowered = text.lower()
        found = [letter for letter, option in choices.items() if option.lower() in lowered]
        if found:
            return max(found, key=lambda letter: lowered.rfind(choices[letter].lower()))
    return None
