"""What can go wrong because of the input: one exception, one line, one way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """Wrong usage or bad input; the command line prints it as one line and exits with code 2."""


class BudgetError(UsageError):
    """A token budget that a method cannot serve on a model; the message says which it can."""


class MissingCheckpointError(UsageError):
    """A trained method was asked for without weights for the model at hand."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Build the error for a name that does not exist, with the nearest names that do.

    Parameters
    ----------
    kind : str
        What was looked up, e.g. ``"method"``.
    name : str
        What the user wrote.
    known : iterable of str
        Every name that would have worked.
    """
    names = sorted(known)
    if not names:
        return UsageError(f"unknown {kind} {name!r}; there is none")
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names
    return UsageError(f"unknown {kind} {name!r}; did you mean {', '.join(near)}?")
