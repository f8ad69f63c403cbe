"""Models by name, for configs and the command line."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx
from jaxtyping import Array

from falcon_jax.models.resnet import resnet18_cifar, resnet34_cifar
from falcon_jax.models.resnet_cifar import (
    resnet20_cifar,
    resnet56_cifar,
    resnet110_cifar,
    resnet164_cifar,
)
from falcon_jax.models.resnet_imagenet import resnet18, resnet34, resnet50, resnet101, resnet152
from falcon_jax.models.vgg import vgg8_cifar, vgg16_cifar, vgg19_cifar
from falcon_jax.models.vgg_imagenet import (
    vgg11,
    vgg11_bn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_bn,
    vgg19,
    vgg19_bn,
)
from falcon_jax.names import no_such

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
