"""Published and tabulated settings by name: what to ask a method for.

``--method fastv-192`` stands for ``--method fastv --tokens 192`` on LLaVA-1.5 and for the same
share of each picture's tokens on other backbones, ``--tokens 1/3`` (spec selective 10.1). A run is
that of the method: nothing in it tells by which name it was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Literal

from etcbench import registry
from etcbench.budget import NOMINAL, Budget, ModelSpec, settle
from etcbench.errors import UsageError, unknown_name
from etcbench.stages import LAYERS, scaled_layers

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
        Options of the method on 32 layers; ``layers``, a list of layers, goes by the depth.
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

    def budget(self, spec: ModelSpec) -> Budget | None:
        """Take the same share of a picture's tokens: a number where all pictures have as many."""
        return None if self.tokens is None else Budget.part(Fraction(self.tokens, NOMINAL)).on(spec)

    def options_on(self, spec: ModelSpec) -> dict[str, Any]:
        """Give the options for a backbone: listed layers at the same share of its depth."""
        options = dict(self.options)
        if "layers" in options and spec.layers != LAYERS:
            listed = scaled_layers([int(n) for n in options["layers"].split("-")], spec.layers)
            # The last layer has none behind it that could be shorter.
            options["layers"] = "-".join(str(n) for n in listed if n + 1 < spec.layers)
        return options


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
    # The authors state the split of 64 alone (4.3); those of 192 and 128 come from a toolkit.
    *_series("visionzip", "visionzip", {192: 192.0, 128: 128.0}, "unofficial"),
    *_series("visionzip", "visionzip", {64: 64.0}, "published"),
    Preset("pdrop-official", "pdrop", 270, 270.0, "published"),
    *_series("pdrop", "pdrop", {192: 191.0, 128: 126.3, 64: 62.1}, "unofficial"),
    Preset(
        "lightkv-55", "lightkv", None, 331.2, "published", MappingProxyType({"layers": "12-18-24"})
    ),
    *_series("lightkv", "lightkv", {192: 191.9, 128: 129.1, 64: 66.2}, "extrapolated"),
    # The paper's own are 50 % and 25 % (8.7).
    *_series("explainc", "explainc", {288: 288.0, 144: 144.0}, "published"),
    *_series("explainc", "explainc", {192: 192.0, 128: 128.0, 64: 64.0}, "extrapolated"),
    *_series("twig", "twigvlm", {192: 192.06, 128: 128.1, 64: 64.2}, "published"),
    *_series("twigpp", "twigvlm-pp", {192: 192.06, 128: 128.1, 64: 64.2}, "published"),
)


NAMED: Mapping[str, Preset] = {preset.name: preset for preset in PRESETS}


def method_class(name: str) -> type[Any]:
    """Find the class of a method, or of the method of a preset.

    Raises
    ------
    UsageError
        If there is neither, with the nearest names.
    """
    methods = registry.names("baselines")
    chosen = NAMED[name].method if name in NAMED else name
    if chosen not in methods:
        raise unknown_name("method", name, [*methods, *NAMED])
    return registry.load("baselines", chosen)


def resolved(
    name: str, budget: Budget | None, spec: ModelSpec, options: Mapping[str, Any]
) -> tuple[str, Budget | None, dict[str, Any]]:
    """Replace a preset by its method, budget and options; a share by a number where it is one.

    Raises
    ------
    UsageError
        If a preset is given a budget, or another value for one of its options, or a method cannot
        serve a share.
    """
    preset = NAMED.get(name)
    if preset is None:
        # before anything looks for weights, which are those of a number
        settled = None if budget is None else settle(budget, spec, method_class(name))
        return name, settled, dict(options)
    if budget is not None:
        raise UsageError(f"{name} is a setting with its own budget; leave out --tokens")
    fixed = preset.options_on(spec)
    for key, value in fixed.items():
        if str(options.get(key, value)) != str(value):
            raise UsageError(f"{name} fixes {key}={value}; for another one use {preset.method}")
    return preset.method, preset.budget(spec), {**fixed, **options}


def presets_of(method: str) -> list[Preset]:
    """List the presets of a method, by its name."""
    return [preset for preset in PRESETS if preset.method == method]
