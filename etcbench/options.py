"""Turn ``KEY=VALUE`` from the command line into options of the right type."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from etcbench.errors import UsageError, unknown_name

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def pairs(texts: Iterable[str], flag: str) -> dict[str, str]:
    """Split ``KEY=VALUE`` texts.

    Raises
    ------
    UsageError
        If one has no ``=``.
    """
    found = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise UsageError(f"{flag} {text!r} is not of the form KEY=VALUE")
        found[key.strip().replace("-", "_")] = value.strip()
    return found


def typed_options(
    methods: Mapping[str, type[Any]], options: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Give each method those of the options that it has, converted to their declared types.

    Parameters
    ----------
    methods : mapping of str to class
        Dataclasses by name; their init fields except ``budget`` are the options.
    options : mapping of str to str
        As written.

    Raises
    ------
    UsageError
        If no method has an option, or a value does not fit its type.
    """
    known = {
        name: {f.name for f in fields(method) if f.init and f.name != "budget"}
        for name, method in methods.items()
    }
    everything = set().union(*known.values()) if known else set()
    for key in options:
        if key not in everything:
            if not everything:
                raise UsageError(f"{', '.join(methods)} has no option {key!r}, and no others")
            raise unknown_name(f"option of {', '.join(methods)}", key, everything)
    hints = {name: get_type_hints(method) for name, method in methods.items()}
    return {
        name: {
            key: convert(value, hints[name][key], f"{name}: {key}")
            for key, value in options.items()
            if key in known[name]
        }
        for name in methods
    }


def checked_options(method: type[Any], name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Read options that do not come from the command line: from a recipe, a checkpoint, Python.

    Text becomes what the option is (YAML reads ``1e-5`` as text), and an option that takes one of
    a few names must have one of them. Other values stay as they are, if they are of its type.

    Raises
    ------
    UsageError
        If a value does not fit, with the nearest ones.
    """
    hints = get_type_hints(method)
    found = {}
    for key, value in options.items():
        found[key] = value
        if value is not None:
            read = convert(str(value), hints[key], f"{name}: {key}")
            if isinstance(value, str) or _is_choice(hints[key]):
                found[key] = read
    return found


def require_positive(name: str, **values: int) -> None:
    """Refuse options of a method that count something and are less than 1.

    Raises
    ------
    UsageError
        Names the option.
    """
    for option, value in values.items():
        if value < 1:
            raise UsageError(f"{name}: {option} is at least 1, not {value}")


def _is_choice(hint: Any) -> bool:
    return get_origin(hint) is Literal or any(map(_is_choice, get_args(hint)))


def convert(text: str, hint: Any, what: str) -> Any:
    """Read a value as the type of an annotation.

    Raises
    ------
    UsageError
        If the text does not fit.
    """
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise unknown_name(f"value of {what}", text, map(str, get_args(hint)))
        return text
    if get_origin(hint) in (Union, types.UnionType):
        choices = get_args(hint)
        if type(None) in choices and text.lower() in ("none", ""):
            return None
        return convert(text, next(c for c in choices if c is not type(None)), what)
    if hint is bool:
        if text.lower() not in _WORDS:
            raise UsageError(f"{what} is true or false, not {text!r}")
        return _WORDS[text.lower()]
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise UsageError(f"{what} is {kind}, not {text!r}") from None
    return text
