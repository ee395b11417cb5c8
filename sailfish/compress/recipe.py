"""Recipes: YAML files that say how a checkpoint is compressed, and what that may cost. No torch."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import yaml

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.formats.patterns import check_pattern, matches
from sailfish.checkpoint.formats.scheme import Layout

FOLDER = Path(__file__).parent / "recipes"
MAX_BYTES = 1 << 16
_GROUPS = (32, 64, 128)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_Part = TypeVar("_Part", bound="msgspec.Struct")


class Cut(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parts of the model that go, each at least a share of them: what is left is a smaller dense model."""

    layers: float = 0.0
    """Whole layers, those that change their states least."""
    heads: float = 0.0
    """Key/value heads with the query heads that read them, of each layer."""
    width: float = 0.0
    """Channels of each layer's MLP."""
    repair: bool = True
    """Fit the linears that read what is gone to what their outputs were."""
    damp: float = 0.1
    """What is added to the Hessian's diagonal for that, as a share of its mean: little text is overfitted."""


class Fold(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Factors of channels that are moved from activations into weights before anything is rounded."""

    method: Literal["awq", "smoothquant"]
    grid: int = 20
    """AWQ: steps of the search for each factor's exponent."""
    clip: bool = True
    """AWQ: also cut each group's range where that lowers the error of its outputs."""
    duo: bool = True
    """AWQ: the weights' own magnitude may take part in a factor."""
    alpha: float | Literal["search"] = "search"
    """SmoothQuant: share of the activations' range that moves."""


class Prune(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights that become zero: `keep` of every `of` neighbours stay, or a share `zeros` goes."""

    method: Literal["magnitude", "wanda", "sparsegpt"]
    keep: int | None = None
    of: int | None = None
    zeros: float | None = None
    damp: float = 0.01
    block: int = 128
    refit: bool = False
    """Fit the weights that stay to the outputs once it is known which these are."""


class Round(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The numbers that weights are rounded to, and how each is found."""

    method: Literal["rtn", "gptq"] = "rtn"
    to: Literal["int3", "int4", "int8", "fp8"] = "int4"
    group: int | None = 128
    """Inputs that share a scale; null: all of a row."""
    symmetric: bool = True
    search: bool = True
    """Take each group's range of least error among some, else the whole one."""
    act_order: bool = True
    """GPTQ: round the inputs that weigh most first; groups stay where they are."""
    damp: float = 0.01
    """GPTQ: what is added to the Hessian's diagonal, as a share of its mean."""
    refit: bool = False
    """GPTQ: fit the scales to the codes once these are known."""
    sweeps: int = 0
    """GPTQ: rounds of coordinate descent over the codes."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.to[-1])


class Override(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What holds instead for the linears that a pattern names."""

    match: str
    """A module's name, or "re:" and a regular expression."""
    round: Round | None
    """null: they stay dense."""


class Static(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the one scale of all tokens is found, where activations are static."""

    method: Literal["min-max", "percentile", "mse", "entropy"] = "mse"
    """What becomes the largest 8-bit number; see `static_scale`. entropy: int8 only."""
    kept: float = 0.9999
    """percentile: the share of all values that is not cut off."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is read to learn how inputs weigh."""

    samples: int = 128
    tokens: int = 1024
    seed: int = 0


class Bound(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a result may cost at most; null: anything."""

    max_ppl_increase: float | None = None
    """Of the perplexity, as a share: 0.03 is three percent."""
    max_kl: float | None = None
    """Mean divergence from the parent, in nats."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model's blocks are compressed: parts are cut, then linears folded, pruned, rounded.

    Embedding, head and norms stay as they are.
    """

    name: str
    about: str
    """One line for people."""
    layout: Layout | Literal["dense"]
    """How the result is stored: what compressed-tensors, GPTQ and AWQ call it, or dense."""
    cut: Cut | None = None
    fold: Fold | None = None
    prune: Prune | None = None
    round: Round | None = None
    activations: Literal["none", "dynamic", "static"] = "none"
    """dynamic: a token's activations are rounded to 8 bits as it comes, with a scale of its own; static: all
    with one scale for each input of a linear, which is found by calibration."""
    static: Static = Static()
    overrides: list[Override] = []
    calibration: Calibration = Calibration()
    bound: Bound = Bound()

    def round_of(self, module: str) -> Round | None:
        """Return how the weights of a linear are rounded, None if they are not; the first match counts."""
        for override in self.overrides:
            if matches(module, override.match):
                return override.round
        return self.round

    @property
    def needs_inputs(self) -> bool:
        """Whether anything is learned from what linears read."""
        rounds = [self.round, *(override.round for override in self.overrides)]
        is_learned = any(found is not None and found.method == "gptq" for found in rounds)
        return (
            is_learned
            or self.fold is not None
            or (self.prune is not None and self.prune.method != "magnitude")
            or (self.cut is not None and (self.cut.heads > 0 or self.cut.width > 0))
        )

    @property
    def is_calibrated(self) -> bool:
        """Whether anything is learned from the calibration text."""
        is_cut = self.cut is not None and self.cut.layers > 0
        return self.needs_inputs or is_cut or self.activations == "static"

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight of the blocks takes, scales and zero points included; rows of full groups."""
        return 16.0 if self.round is None else stored_bits(self.round)


def stored_bits(rounding: Round, n_in: int | None = None) -> float:
    """Return the bits that a weight takes, its share of 16-bit scales and of zero points included.

    Without the inputs of a row, `n_in`, groups count as full, and scales of whole rows as nothing.
    """
    per_group = 16 + (0 if rounding.symmetric else rounding.bits)
    if n_in is None:
        return rounding.bits + (0.0 if rounding.group is None else per_group / rounding.group)
    n_groups = 1 if rounding.group is None else -(-n_in // rounding.group)
    return rounding.bits + n_groups * per_group / n_in


def names() -> list[str]:
    """Return the names of the packaged recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Recipe:
    """Return a packaged recipe by its name, or one from a path that ends in .yaml; raises ConfigError."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in names():
            near = difflib.get_close_matches(name, names(), n=1)
            hint = f"did you mean {near[0]}?" if near else f"packaged are {', '.join(names())}"
            raise ConfigError(
                f"there is no recipe {name!r}", hint=f"{hint}; a file ends in .yaml", param="recipe"
            )
        path = FOLDER / f"{name}.yaml"
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}", param="recipe") from None
    return parse(data, str(path))


def parse(data: bytes, where: str) -> Recipe:
    """Return the recipe of a YAML text; ConfigError names what is wrong, and the nearest key."""
    if len(data) > MAX_BYTES:
        raise ConfigError(f"recipe {where} has more than {MAX_BYTES} bytes", param="recipe")
    try:
        values = yaml.load(data, Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"recipe {where} is not YAML: {line}", param="recipe") from None
    _check_keys(values, Recipe, where)
    try:
        recipe = msgspec.convert(values, Recipe)
    except msgspec.ValidationError as error:
        raise ConfigError(f"recipe {where}: {error}", param="recipe") from None
    _check(recipe, where)
    return recipe


def text(recipe: Recipe) -> str:
    """Return a recipe as YAML with every value written out; `parse` of it gives the recipe again."""
    return as_yaml(msgspec.to_builtins(recipe))


def as_yaml(values: dict[str, object]) -> str:
    """Return a recipe's values, as a report holds them, as YAML."""
    dumped: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    return dumped


def diff(one: Recipe, other: Recipe) -> str:
    """Return the unified difference of two recipes with every value written out; empty if they are equal."""
    lines = difflib.unified_diff(
        text(one).splitlines(), text(other).splitlines(), one.name, other.name, lineterm="", n=2
    )
    return "\n".join(lines)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """The safe loader without aliases, which can make a small text large, and without doubled keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str) or keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is not a text, or is written twice")
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


_PARTS: dict[str, type[msgspec.Struct]] = {
    "cut": Cut,
    "fold": Fold,
    "prune": Prune,
    "round": Round,
    "static": Static,
    "calibration": Calibration,
    "bound": Bound,
}


def _check_keys(values: Any, kind: type[_Part], where: str) -> None:
    """Refuse unknown keys with the nearest known one."""
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {where} is not a table of keys and values", param="recipe")
    known = [field.name for field in msgspec.structs.fields(kind)]
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"recipe {where}: {key} is not a key here", hint=hint, param="recipe")
        if key in _PARTS and value is not None:
            _check_keys(value, _PARTS[key], f"{where}: {key}")
        if key == "overrides" and isinstance(value, list):
            for number, override in enumerate(value):
                _check_keys(override, Override, f"{where}: overrides {number}")


def _check(recipe: Recipe, where: str) -> None:
    """Refuse what cannot be done, in words."""

    def refuse(what: str, hint: str) -> ConfigError:
        return ConfigError(f"recipe {where}: {what}", hint=hint, param="recipe")

    if not _NAME.fullmatch(recipe.name):
        raise refuse(f"the name {recipe.name!r} is not one", "use small letters, digits and hyphens")
    for override in recipe.overrides:
        check_pattern(override.match, where)
    rounds = [found for found in (recipe.round, *(o.round for o in recipe.overrides)) if found is not None]
    for found in rounds:
        if found.group is not None and (found.group not in _GROUPS or found.to == "fp8"):
            raise refuse(f"groups of {found.group} inputs in {found.to}", "use 32, 64, 128; null for fp8")
        if found.to == "fp8" and not found.symmetric:
            raise refuse("fp8 has no zero points", "write symmetric: true")
        if found.to == "fp8" and found.method == "gptq":
            raise refuse("GPTQ rounds to whole numbers", "use method: rtn for fp8")
        if not 0 <= found.sweeps <= 100 or not _is_number(found.damp):
            raise refuse(f"{found.sweeps} sweeps with damp {found.damp:g}", "use 0 to 100, and at least 0")
    if recipe.round is None and recipe.prune is None and recipe.cut is None:
        raise refuse("nothing is cut, pruned or rounded", "write round:, prune: or cut:")
    _check_layout(recipe, rounds, refuse)
    if recipe.cut is not None:
        _check_cut(recipe.cut, refuse)
    if recipe.prune is not None:
        _check_prune(recipe.prune, rounds, refuse)
    if recipe.fold is not None and recipe.round is None:
        raise refuse("fold makes weights easier to round and nothing is rounded", "write round:")
    bounds = recipe.bound.max_ppl_increase, recipe.bound.max_kl
    if not all(most is None or _is_number(most) for most in bounds):
        raise refuse("the bound is not a number of 0 or more", "write what a result may cost at most")
    calibration = recipe.calibration
    if calibration.samples < 1 or calibration.tokens < 2:
        raise refuse("calibration reads nothing", "use one sample of two tokens at least")


def _check_cut(cut: Cut, refuse: Any) -> None:
    shares = cut.layers, cut.heads, cut.width
    if not all(0 <= share < 1 for share in shares) or not any(shares):
        raise refuse("no share of layers, heads or width is cut", "write one between 0 and 1: width: 0.25")
    if not 0 < cut.damp < math.inf:
        raise refuse(f"a repair with damp {cut.damp:g}", "use 0.1")


def _check_prune(prune: Prune, rounds: list[Round], refuse: Any) -> None:
    if (prune.zeros is None) is (prune.keep is None or prune.of is None):
        raise refuse("prune needs keep and of, or zeros", "write keep: 2 and of: 4, or zeros: 0.5")
    if prune.zeros is not None and not 0 < prune.zeros < 1:
        raise refuse(f"a share of zeros of {prune.zeros:g}", "write one between 0 and 1")
    if prune.keep is not None and prune.of is not None and not 0 < prune.keep < prune.of:
        raise refuse(f"{prune.keep} of {prune.of} weights cannot be kept", "write keep: 2 and of: 4")
    if prune.block < 1 or not _is_number(prune.damp):
        raise refuse(f"steps of {prune.block} columns with damp {prune.damp:g}", "use 128 and 0.01")
    if prune.refit and (prune.method == "magnitude" or (prune.method == "sparsegpt" and rounds)):
        raise refuse(
            f"{prune.method} has no weights to refit: they are rounded, or no input is known",
            "leave refit out, or prune by sparsegpt or wanda and do not round",
        )
    if any(found.method == "gptq" for found in rounds):
        raise refuse("GPTQ would fill the zeros that pruning leaves", "write method: rtn for round")


def _is_number(value: float) -> bool:
    """Say whether a value is finite and not negative."""
    return 0 <= value < math.inf


def _check_layout(recipe: Recipe, rounds: list[Round], refuse: Any) -> None:
    layout = recipe.layout
    if recipe.activations != "none" and layout not in ("int-quantized", "float-quantized"):
        raise refuse(f"{layout} has no 8-bit activations", "use int-quantized or float-quantized")
    if recipe.activations != "static" and recipe.static != Static():
        raise refuse("static: is written, and activations are not static", "write activations: static")
    if not 0 < recipe.static.kept <= 1:
        raise refuse(f"{recipe.static.kept:g} of all values cannot be kept", "write kept: 0.9999")
    if recipe.static.method == "entropy" and layout == "float-quantized":
        raise refuse("entropy compares evenly spaced levels, which fp8 has not", "write method: mse")
    for found in rounds:
        if (found.to == "fp8") is not (layout == "float-quantized") and layout != "dense":
            raise refuse(
                f"{found.to} is not stored as {layout}", "fp8 is float-quantized, and nothing else is"
            )
        if layout == "int-quantized" and found.to != "int8":
            raise refuse(f"{found.to} is not stored as {layout}", "use pack-quantized")
        if layout == "awq" and found.to != "int4":
            raise refuse(f"{found.to} is not stored as {layout}", "AWQ has 4 bits")
    if layout == "dense" and rounds:
        raise refuse("rounded weights stored dense save nothing", "name the layout they are packed in")
    if layout != "dense" and recipe.round is None:
        raise refuse(f"{layout} holds rounded weights and nothing is rounded", "write layout: dense")
