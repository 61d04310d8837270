"""Read yes/no and lettered answers by the published rules (spec tasks 4.1 to 4.6)."""

from __future__ import annotations

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
