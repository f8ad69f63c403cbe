"""Models and conv units by name, for configs and the command line."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx
from jaxtyping import Array

from falcon_jax.models.mobile import branch_unit, gdg_unit, pdp_split_unit, pdp_unit
from falcon_jax.models.resnet import (
    resnet18,
    resnet18_cifar,
    resnet20_cifar,
    resnet34,
    resnet34_cifar,
    resnet50,
    resnet56_cifar,
    resnet101,
    resnet110_cifar,
    resnet152,
    resnet164_cifar,
)
from falcon_jax.models.units import UnitFactory
from falcon_jax.models.vgg import (
    vgg8_cifar,
    vgg11,
    vgg11_bn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_bn,
    vgg16_cifar,
    vgg19,
    vgg19_bn,
    vgg19_cifar,
)
from falcon_jax.settings import no_such

_UNITS: Mapping[str, Callable[..., UnitFactory]] = MappingProxyType(
    {
        "branch": lambda: branch_unit(),
        "gdg": lambda *, groups=2: gdg_unit(groups),
        "pdp": lambda *, expansion=0.5: pdp_unit(expansion),
        "pdp_split": lambda: pdp_split_unit,
    }
)
UNIT_NAMES = tuple(_UNITS)
_OPTIONS = MappingProxyType({"gdg": ("groups",), "pdp": ("expansion",)})


def get_unit(name: str, /, **options: Any) -> UnitFactory:
    """Return the factory of a conv unit by its name.

    Args:
        name: ``branch`` (StConv-branch), ``gdg``, ``pdp`` or ``pdp_split``.
        **options: ``groups`` of ``gdg``, ``expansion`` of ``pdp``.

    Returns:
        The factory, for the ``unit`` of a model.

    Raises:
        ValueError: if there is no such unit, or it has no such option.

    >>> make = get_unit("gdg", groups=2)
    >>> type(make(8, 8, rngs=nnx.Rngs(0))).__name__
    'GDGUnit'
    """
    if not isinstance(name, str) or name not in _UNITS:
        raise ValueError(no_such("unit", name, _UNITS))
    known = _OPTIONS.get(name, ())
    unknown = sorted(set(options) - set(known))
    if unknown:
        listed = ", ".join(known) or "none"
        raise ValueError(
            f"unit {name!r} has no option {', '.join(unknown)}; its options: {listed}."
        )
    return _UNITS[name](**options)


MODELS: Mapping[str, Callable[..., nnx.Module]] = MappingProxyType(
    {
        model.__name__: model
        for model in (
            resnet18_cifar,
            resnet34_cifar,
            resnet20_cifar,
            resnet56_cifar,
            resnet110_cifar,
            resnet164_cifar,
            vgg8_cifar,
            vgg16_cifar,
            vgg19_cifar,
            resnet18,
            resnet34,
            resnet50,
            resnet101,
            resnet152,
            vgg11,
            vgg11_bn,
            vgg13,
            vgg13_bn,
            vgg16,
            vgg16_bn,
            vgg19,
            vgg19_bn,
        )
    }
)


def get_model(name: str, *, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    """Build a model by its name.

    Args:
        name: a key of ``MODELS``.
        rngs: for parameters and dropout.
        **options: as the builder takes them: ``num_classes``, ``in_features``, ``width``,
            ``unit``, ``dtype``, ...

    Returns:
        The model.

    Raises:
        ValueError: if there is no such model; the message lists those there are.

    >>> options = {"num_classes": 2, "in_features": 1, "width": 1 / 32}
    >>> get_model("vgg8_cifar", **options, rngs=nnx.Rngs(0)).head.kernel.shape
    (128, 2)
    """
    if name not in MODELS:
        raise ValueError(no_such("model", name, MODELS))
    return MODELS[name](rngs=rngs, **options)


def model_shapes(name: str, **options: Any) -> nnx.Module:
    """Build a model whose arrays are shapes, so that nothing is computed.

    Args:
        name: a key of ``MODELS``.
        **options: as in `get_model`.

    Returns:
        The model, to be planned or profiled.

    Raises:
        ValueError: if there is no such model, or it cannot be built so.

    >>> model_shapes("resnet18", num_classes=10).head.kernel.shape
    (512, 10)
    """
    return nnx.eval_shape(lambda: get_model(name, rngs=same_key_rngs(), **options))


def same_key_rngs() -> nnx.Rngs:
    """Return streams for tracing: one that counts takes time quadratic in its calls then."""
    rngs = nnx.Rngs(0)
    rngs.params = _SameKey(0, tag="params")  # type: ignore[attr-defined]
    return rngs


class _SameKey(nnx.RngStream):
    def __call__(self) -> Array:
        return self.key[...]
