"""A model of either framework as compression sees it: its layers and their kernels."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jaxtyping import Array

from falcon_jax.frameworks import linen as linen_layers
from falcon_jax.frameworks import nnx as nnx_layers
from falcon_jax.frameworks.layers import Inputs, Layer
from falcon_jax.nn.method_conv import whole_kernel

Model = nnx.Module | nn.Module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found in a model.

    Attributes:
        layers: in the order of use if the model was traced, else of definition.
        kernels: of the convolutions, by path; none if there are only shapes.
    """

    layers: tuple[Layer, ...]
    kernels: Mapping[str, Array]


def inspect_model(
    model: Model, inputs: Inputs | None, variables: Mapping[str, Any] | None
) -> Inspection:
    """Look at a model without running it.

    Args:
        model: an NNX model, or a Linen module.
        inputs: what it is called with; a Linen module cannot do without.
        variables: of a Linen module; shapes are found out if not given.

    Raises:
        ValueError: if arguments are missing or left over, or do not fit the model.
    """
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise ValueError("variables are for Linen modules; an NNX model holds its own.")
        layers = nnx_layers.find_layers(model, inputs)
        kernels = {
            p: whole_kernel(k) for p, k in nnx_layers.kernels(model).items() if _is_concrete(k)
        }
        return Inspection(layers=tuple(layers), kernels=kernels)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"a model is an nnx.Module or a linen.Module; got a {type(model).__name__}. Of a "
            "TrainState give what made it: the module, and its params as "
            "variables={'params': state.params}."
        )
    if inputs is None:
        raise ValueError(
            f"{type(model).__name__} is a Linen module: its layers show themselves only when it is "
            "called. Give sample, an example input; shapes suffice (jax.ShapeDtypeStruct)."
        )
    layers = linen_layers.find_layers(model, inputs, variables)
    if variables is None:
        return Inspection(layers=tuple(layers), kernels={})
    params = linen_layers.named_params(variables)
    kernels = {
        layer.path: params[f"{layer.path}/kernel".lstrip("/")]
        for layer in layers
        if layer.kind == "conv" and layer.obstacle is None
    }
    return Inspection(
        layers=tuple(layers),
        kernels={p: whole_kernel(jnp.asarray(k)) for p, k in kernels.items() if _is_concrete(k)},
    )


def _is_concrete(array: Any) -> bool:
    return not isinstance(array, jax.ShapeDtypeStruct)
