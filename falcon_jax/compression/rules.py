"""Rules: which method replaces which convolution."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from falcon_jax.methods import ConvSpec, Falcon, Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What happens to the convolutions that a pattern matches. The first rule that matches decides.

    Attributes:
        path: regular expression that must match the whole ``/``-joined path of the layer.
        method: what replaces the layer; None leaves it alone.
        where: further condition on the layer's `ConvSpec`.

    Raises:
        ValueError: if ``path`` is no regular expression, or another field is of a wrong type.

    >>> Rule(path=r"stem/.*", method=None).matches(
    ...     "stem/conv", ConvSpec(kernel_size=(3, 3), in_features=3, out_features=8))
    True
    """

    path: str = r".*"
    method: Method | None
    where: Callable[[ConvSpec], bool] | None = None

    def __post_init__(self):
        known = isinstance(self.path, str) and isinstance(self.method, (Method, type(None)))
        if not known or not (self.where is None or callable(self.where)):
            raise ValueError(
                "a rule has a path, a method such as Falcon(rank=2) or None, and where, a function "
                f"or None; got {self.path!r}, {self.method!r} and {self.where!r}."
            )
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(f"path {self.path!r} is no regular expression: {error}.") from None

    def matches(self, path: str, spec: ConvSpec) -> bool:
        """Say whether the rule speaks of this layer."""
        if re.fullmatch(self.path, path) is None:
            return False
        return self.where is None or self.where(spec)


def first_match(rules: Sequence[Rule], path: str, spec: ConvSpec) -> int | None:
    """Return the index of the first rule that matches a layer, or None."""
    return next((i for i, rule in enumerate(rules) if rule.matches(path, spec)), None)


def check_all_used(rules: Sequence[Rule], layers: Sequence[tuple[str, ConvSpec]]) -> None:
    """Raise if a rule matches no layer at all, not even one that an earlier rule decided.

    Raises:
        ValueError: naming the rules, and the paths that there are.
    """
    unused = [r for r in rules if not any(r.matches(path, spec) for path, spec in layers)]
    if unused:
        paths = "\n  ".join(path or "(the model itself)" for path, _ in layers)
        raise ValueError(
            f"no convolution matches {', '.join(map(_describe, unused))}. "
            f"A path must match as a whole. The paths are:\n  {paths}"
        )


def _describe(rule: Rule) -> str:
    return f"path={rule.path!r}" + (" with its condition" if rule.where else "")


DEFAULT_METHOD = Falcon(rank=1)
