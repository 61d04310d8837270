"""Published and tabulated settings by name: what to ask a method for.

Nothing is run by these names: ``fastv-192`` stands for ``--method fastv --tokens 192``. The methods
resolve such a budget themselves, on other backbones as a fraction of the picture's tokens (spec
selective 10.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Source = Literal["published", "implied", "unofficial", "extrapolated"]


@dataclass(frozen=True)
class Preset:
    """A setting of a method for LLaVA-1.5-7B (32 layers, 576 visual tokens).

    Attributes
    ----------
    name, method : str
        Name for tables; name of the method.
    tokens : int or None
        Budget; None where the options say it.
    input_average : float
        Visual tokens at the layers' inputs, averaged over the layers.
    source : {"published", "implied", "unofficial", "extrapolated"}
        Whether the method's authors state the setting, other papers' budgets imply it, a
        follow-up work states it, or nobody ran it.
    options : mapping
        Options of the method.
    """

    name: str
    method: str
    tokens: int | None
    input_average: float
    source: Source
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def command(self) -> str:
        """Write the setting as arguments of ``etcbench run``."""
        words = [f"--method {self.method}"]
        if self.tokens is not None:
            words.append(f"--tokens {self.tokens}")
        words += [f"--option {key}={value}" for key, value in self.options.items()]
        return " ".join(words)


def _series(
    name: str, method: str, averages: Mapping[int, float], source: Source, **options: Any
) -> list[Preset]:
    return [
        Preset(f"{name}-{tokens}", method, tokens, average, source, MappingProxyType(options))
        for tokens, average in averages.items()
    ]


PRESETS: tuple[Preset, ...] = (
    *_series("fastv", "fastv", {192: 191.6, 128: 127.9, 64: 64.1}, "implied"),
    Preset("fastv-50", "fastv", None, 306.0, "published", MappingProxyType({"ratio": 0.5})),
    *_series(
        "sparsevlm15",
        "sparsevlm",
        {192: 206.5, 128: 145.4, 96: 114.1, 64: 82.3},
        "published",
        version="1.5",
    ),
    *_series(
        "sparsevlm20",
        "sparsevlm",
        {192: 206.8, 128: 144.1, 96: 113.9, 64: 81.8},
        "published",
        version="2.0",
    ),
    *_series("visionzip", "visionzip", {192: 192.0, 128: 128.0, 64: 64.0}, "published"),
    Preset("pdrop-official", "pdrop", 270, 270.0, "published"),
    *_series("pdrop", "pdrop", {192: 191.0, 128: 126.3, 64: 62.1}, "unofficial"),
    Preset(
        "lightkv-55", "lightkv", None, 331.2, "published", MappingProxyType({"layers": "12-18-24"})
    ),
    *_series("lightkv", "lightkv", {192: 191.9, 128: 129.1, 64: 66.2}, "extrapolated"),
    *_series("explainc", "explainc", {192: 192.0, 128: 128.0, 64: 64.0}, "extrapolated"),
    *_series("twig", "twigvlm", {192: 192.06, 128: 128.1, 64: 64.2}, "published"),
    *_series("twigpp", "twigvlm-pp", {192: 192.06, 128: 128.1, 64: 64.2}, "published"),
)


def presets_of(method: str) -> list[Preset]:
    """List the presets of a method, by its name."""
    return [preset for preset in PRESETS if preset.method == method]
