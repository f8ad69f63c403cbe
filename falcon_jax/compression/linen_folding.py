"""BatchNorm of Linen modules folded into the convolution before it."""

from collections.abc import Callable, Container, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from falcon_jax.compression import linen_layers
from falcon_jax.compression.batchnorm_pairs import conv_of_norm, folded_arrays, mark_call
from falcon_jax.compression.compress import with_folded
from falcon_jax.compression.inputs import Inputs
from falcon_jax.nn.linen_compressed import CompressedModule

Flat = dict[tuple[str, ...], Any]


def fold_linen(
    module: nn.Module, inputs: Inputs, variables: Mapping[str, Any]
) -> tuple[CompressedModule, Mapping[str, Any]]:
    """Return a module without the BatchNorms that a convolution can do the work of.

    Args:
        module: any Linen module.
        inputs: what it is called with, in evaluation mode.
        variables: its variables.

    Returns:
        The module, and its variables.

    Raises:
        ValueError: if the module cannot be called on the inputs, or they are for training.
    """
    layers = linen_layers.find_layers(module, inputs, variables)
    flat: Flat = flatten_dict(unfreeze(nn.meta.unbox(variables)))  # type: ignore[arg-type]
    types = {
        layer.path: flat[_at("params", layer.path, "kernel")].dtype
        for layer in layers
        if layer.kind == "conv" and layer.obstacle is None
    }
    watched = _Watch(types)
    jaxpr = linen_layers.intercepted_jaxpr(module, inputs, variables, watched.intercept)
    if watched.training and not watched.epsilons:
        raise ValueError(
            f"the sample calls {watched.training[0]!r} in training mode; BatchNorm is folded as it "
            "is in evaluation, so give a sample such as falcon_jax.Inputs(x, train=False)."
        )
    pairs = conv_of_norm(jaxpr, types)
    folded = tuple(
        (norm, conv)
        for norm, conv in pairs.items()
        if _fold(flat, norm, conv, epsilon=watched.epsilons[norm])
    )
    new = unflatten_dict(flat)
    return (
        with_folded(module, folded),
        freeze(new) if isinstance(variables, FrozenDict) else new,
    )


class _Watch:
    """Marks the calls of some convolutions, and of every BatchNorm that is in evaluation mode."""

    def __init__(self, convs: Container[str]):
        self._convs = convs
        self.epsilons: dict[str, float] = {}
        self.training: list[str] = []

    def intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        path = "/".join(module.path)
        if context.method_name != "__call__" or not args:
            return next_fun(*args, **kwargs)
        if type(module) is nn.BatchNorm and module.axis == -1:
            if not _by_running_average(module, *args, **kwargs):
                self.training.append(path)
                return next_fun(*args, **kwargs)
            self.epsilons[path] = module.epsilon
        elif type(module) is not nn.Conv or path not in self._convs:
            return next_fun(*args, **kwargs)
        x, *rest = args
        return mark_call(path, lambda x: next_fun(x, *rest, **kwargs), x)


def _by_running_average(
    norm: nn.BatchNorm, x: Any, use_running_average: bool | None = None, **rest: Any
) -> bool:
    return bool(norm.use_running_average if use_running_average is None else use_running_average)


def _at(collection: str, path: str, name: str) -> tuple[str, ...]:
    return (collection, *path.split("/"), name) if path else (collection, name)


def _fold(flat: Flat, norm: str, conv: str, *, epsilon: float) -> bool:
    """Put a BatchNorm's variables into a convolution's, unless they are stacked otherwise."""
    kernel, mean = flat[_at("params", conv, "kernel")], flat[_at("batch_stats", norm, "mean")]
    stack = mean.shape[:-1]
    if kernel.shape[: len(stack)] != stack or kernel.shape[-1] != mean.shape[-1]:
        return False
    bias = flat.get(_at("params", conv, "bias"))
    scale = flat.pop(_at("params", norm, "scale"), None)
    offset = flat.pop(_at("params", norm, "bias"), None)
    new_kernel, new_bias = folded_arrays(
        jnp.asarray(kernel),
        None if bias is None else jnp.asarray(bias),
        mean=jnp.asarray(flat.pop(_at("batch_stats", norm, "mean"))),
        var=jnp.asarray(flat.pop(_at("batch_stats", norm, "var"))),
        scale=None if scale is None else jnp.asarray(scale),
        offset=None if offset is None else jnp.asarray(offset),
        epsilon=epsilon,
    )
    flat[_at("params", conv, "kernel")] = new_kernel
    flat[_at("params", conv, "bias")] = new_bias
    return True
