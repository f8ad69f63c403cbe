"""The rows of a report beside the standard model: what their methods, units and rules stand for."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from falcon_jax.compression.plan import Rule
from falcon_jax.compression.target import Target
from falcon_jax.methods.base import Method
from falcon_jax.methods.fit import Solver, check_solver
from falcon_jax.methods.registry import get_method, method_from
from falcon_jax.models.registry import UNIT_NAMES, get_unit
from falcon_jax.models.units import UnitFactory
from falcon_jax.settings import is_number, unknown_field

SEARCHED = "searched"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the report beside the standard model.

    Attributes:
        name: also the name of its folder.
        method: replaces the convolutions that no rule speaks of; None where units are built.
        rules: in order; the last one is the method's own.
        solver: how kernels are fitted; ``random`` starts from a network that was never trained.
        of: the variant whose network is compressed; the standard one if empty.
        width: multiplier of the channels; with a method, kernels start from the leading ones.
        unit: builds the network from these units, with random weights; None for the standard.
        unit_options: the unit's name and options, as in the config; None for the standard.
        kind: the method's or the unit's name, or ``search``.
        target: what a plan is searched for; None where methods are given.
        candidates: what the search chooses from; empty for its own.
    """

    name: str
    method: Method | None
    rules: tuple[Rule, ...]
    solver: Solver
    of: str = ""
    width: float = 1.0
    unit: UnitFactory | None = None
    unit_options: Mapping[str, Any] | None = None
    kind: str
    target: Target | None = None
    candidates: tuple[Method, ...] = ()

    @property
    def rank(self) -> int | str | None:
        """The method's rank, as a number where it is one."""
        rank = None if self.method is None else self.method.options().get("rank")
        return rank if rank is None or isinstance(rank, int) else str(rank)


def chosen_variants(
    variants: Mapping[str, Any],
    *,
    solver: str,
    rules: Any,
    only: str,
    target: Mapping[str, Any] | None = None,
    candidates: Sequence[Any] = (),
) -> tuple[Variant, ...]:
    """Return the variants to be made, those that others compress first.

    Args:
        variants: by name, a group with a method or a unit and its settings.
        solver: of those that have none of their own.
        rules: likewise; see `rules_from`.
        only: names, with commas between them, to choose some; empty for all.
        target: of one more variant, `SEARCHED`; empty for none.
        candidates: of its search, each a method's name or a group with a method.

    Raises:
        ValueError: with the dotted name of what is wrong, from ``variants`` or ``only`` on.
    """
    every = {name: _variant(name, variants[name], solver, rules) for name in variants}
    for name, variant in every.items():
        _check_base(name, variant, every)
    if target:
        every[SEARCHED] = _searched(target, candidates, rules, every)
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    for name in chosen:
        if name not in every:
            raise ValueError(unknown_field("only", name, every))
    kept = {*(chosen or every)}
    kept |= {every[name].of for name in kept}
    ordered = sorted(every.values(), key=lambda variant: bool(variant.of))
    return tuple(variant for variant in ordered if variant.name in kept)


def _searched(
    target: Mapping[str, Any],
    candidates: Sequence[Any],
    rules: Any,
    others: Mapping[str, Variant],
) -> Variant:
    if SEARCHED in others:
        raise ValueError(f"variants.{SEARCHED}: target makes a variant of this name; rename it")
    try:
        methods = tuple(_method_of(given) for given in candidates)
    except (TypeError, ValueError) as error:
        raise ValueError(f"candidates: {error}") from None
    try:
        return Variant(
            name=SEARCHED,
            method=None,
            rules=tuple(rules_from(rules)),
            solver="exact",
            kind="search",
            target=Target(**target),
            candidates=methods,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"target: {error}") from None


def _check_base(name: str, variant: Variant, variants: Mapping[str, Variant]) -> None:
    if not variant.of:
        return
    units = [other for other, value in variants.items() if value.unit is not None]
    if variant.of not in units:
        listed = ", ".join(units) or "none"
        raise ValueError(
            f"variants.{name}.of names a variant that has a unit (there are: "
            f"{listed}), but is {variant.of!r}"
        )


def _variant(name: str, given: Any, solver: str, rules: Any) -> Variant:
    dotted = f"variants.{name}"
    if name == "standard" or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) is None:
        raise ValueError(
            f"{dotted}: a variant's name is that of its folder; use letters, digits, _ and -, and "
            "not 'standard'"
        )
    if not isinstance(given, Mapping) or ("method" in given) == ("unit" in given):
        raise ValueError(
            f"{dotted} must be a group with a method, such as "
            f"{{'method': 'falcon', 'rank': 2}}, or with a unit, such as {{'unit': 'pdp'}}, but is "
            f"{given!r}"
        )
    options = dict(given)
    try:
        width = options.pop("width", 1.0)
        if not is_number(width) or width <= 0:
            raise ValueError(f"width must be a finite number above 0, but is {width!r}")
        if "unit" in options:
            unit_options = dict(options)
            kind = options.pop("unit")
            unit = get_unit(kind, **options)
            return Variant(
                name=name,
                method=None,
                rules=(),
                solver="random",
                width=float(width),
                unit=unit,
                unit_options=unit_options,
                kind=kind,
            )
        solver = options.pop("solver", solver)
        check_solver(solver)
        pairs = options.pop("rules", rules)
        of = options.pop("of", "")
        if not isinstance(of, str):
            raise ValueError(f"of names a variant, but is {of!r}")
        if of and width != 1:
            raise ValueError(f"its width is that of {of!r}; leave width out")
        method = _method(options)
        own = rules_from(pairs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{dotted}: {error}") from None
    return Variant(
        name=name,
        method=method,
        rules=(*own, Rule(method=method)),
        solver=cast(Solver, solver),
        of=of,
        width=float(width),
        kind=method.name,
    )


def rules_from(pairs: Any) -> list[Rule]:
    """Return the rules that pairs of a path and a method describe.

    Args:
        pairs: each method None, a name, or a group with a name and settings.

    Raises:
        ValueError: if they are no such pairs.
    """
    if not isinstance(pairs, (tuple, list)):
        raise ValueError(f"rules are pairs of a path and a method, such as {_PAIR}; got {pairs!r}")
    return [_rule(pair) for pair in pairs]


_PAIR = "('stem/.*', None) or ('head/.*', 'falcon')"


def _rule(pair: Any) -> Rule:
    good = isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)
    if not good or not isinstance(pair[1], (str, Mapping, type(None))):
        raise ValueError(f"a rule is a pair of a path and a method, such as {_PAIR}; got {pair!r}")
    path, method = pair
    return Rule(path=path, method=None if method is None else _method_of(method))


def _method_of(given: Any) -> Method:
    """Return the method that a name, or a group with settings, stands for."""
    if isinstance(given, str):
        return get_method(given)
    if not isinstance(given, Mapping):
        raise ValueError(
            "a method is a name, or a group such as {'method': 'falcon', 'rank': 2}; got "
            f"{given!r}"
        )
    return _method(given)


def _method(options: Mapping[str, Any]) -> Method:
    name = options.get("method")
    if name in UNIT_NAMES:
        raise ValueError(
            f"{name!r} is a conv unit: it stands for convolution, BatchNorm and activation "
            "together and is no drop-in for a bare convolution; give it as 'unit' to build the "
            "network of it"
        )
    return method_from(options)
