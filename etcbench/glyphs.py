"""Fonts for text in any script, out of those that matplotlib finds installed."""

from __future__ import annotations

from collections.abc import Iterable

BOX = "\N{WHITE SQUARE}"  # in place of a letter that no font has
PLACEHOLDERS = "Last Resort"  # a font that comes with matplotlib: boxes for all there is


def covering(text: str) -> tuple[list[str], list[str]]:
    """Choose font families that together show a text.

    Parameters
    ----------
    text : str
        Blanks and other letters that are not printed do not count.

    Returns
    -------
    list of str, list of str
        Families for matplotlib's ``font.family``, its default in front; and the letters that none
        of the installed fonts has, sorted.
    """
    from matplotlib import font_manager, rcParams

    families = list(rcParams["font.family"])
    missing = {letter for letter in text if letter.isprintable() and not letter.isspace()}
    missing -= _letters(font_manager.findfont(font_manager.FontProperties()))
    if missing:
        files: dict[str, str] = {}
        for entry in font_manager.fontManager.ttflist:
            if entry.style == "normal" and PLACEHOLDERS not in entry.name:
                files.setdefault(entry.name, font_manager.findfont(entry.name))
        families += _needed(missing, {name: _letters(file) for name, file in files.items()})
    return families, sorted(missing)


def _letters(file: str) -> set[str]:
    from matplotlib.font_manager import get_font

    return {chr(code) for code in get_font(file).get_charmap()}


def _needed(missing: set[str], fonts: dict[str, set[str]]) -> Iterable[str]:
    """Name the font that has most of the missing letters until none has any; removes those."""
    while fonts:
        best = max(sorted(fonts), key=lambda name: len(fonts[name] & missing))
        if not fonts[best] & missing:
            return
        missing -= fonts[best]
        yield best
