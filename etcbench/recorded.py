"""Where the committed results are: inside an installed package, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

from etcbench.errors import UsageError


def results_folder(part: str) -> Path:
    """Find a part of ``results/``.

    Parameters
    ----------
    part : str
        ``"published"``, ``"measured"`` or ``"gate"``.

    Raises
    ------
    UsageError
        If this installation does not have it.
    """
    package = Path(__file__).parent
    places = [package / "results" / part, package.parent / "results" / part]
    for place in places:
        if place.is_dir():
            return place
    raise UsageError(f"no {part} results in {places[0]}; install etcbench again")
