"""Models by name, for configs and the command line."""

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx

from falcon_jax.models.resnet import resnet18_cifar, resnet34_cifar
from falcon_jax.models.vgg import vgg8_cifar, vgg16_cifar, vgg19_cifar

MODELS: Mapping[str, Callable[..., nnx.Module]] = MappingProxyType(
    {
        model.__name__: model
        for model in (resnet18_cifar, resnet34_cifar, vgg8_cifar, vgg16_cifar, vgg19_cifar)
    }
)


def get_model(name: str, *, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    """Build a model by its name.

    Args:
        name: a key of ``MODELS``.
        rngs: for parameters and dropout.
        **options: as the builder takes them: ``num_classes``, ``in_features``, ``dtype``, ...

    Returns:
        The model.

    Raises:
        ValueError: if there is no such model; the message lists those there are.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no model is called {name!r}; there are {', '.join(MODELS)}.{hint}")
    return MODELS[name](rngs=rngs, **options)
