"""One 3x3 layer in every form that the benchmarks compare: falcon_jax, lax and PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

import falcon_jax as fj
from benchmarks.timing import synchronised
from falcon_jax.methods.falcon import Impl
from falcon_jax.ops.geometry import pad, tap_slices


@dataclasses.dataclass(frozen=True)
class Layer:
    """A 3x3 convolution with stride 1, padded by one.

    Attributes:
        network: where it occurs.
        size: height and width.
        channels: in and out.
    """

    network: str
    size: int
    channels: int

    @property
    def spec(self) -> fj.ConvSpec:
        """The convolution."""
        return fj.ConvSpec(
            kernel_size=(3, 3),
            in_features=self.channels,
            out_features=self.channels,
            padding=((1, 1), (1, 1)),
            use_bias=False,
        )

    def __str__(self) -> str:
        return f"{self.size}x{self.size}x{self.channels}"


LAYERS = (
    *(Layer("VGG19", s, c) for s, c in [(32, 64), (16, 128), (8, 256), (4, 512), (2, 512)]),
    *(Layer("ResNet18", s, c) for s, c in [(56, 64), (28, 128), (14, 256), (7, 512)]),
)


def im2col(spec: fj.ConvSpec, x: Array, kernel: Array) -> Array:
    """Return the standard convolution as one matrix product over the taps side by side."""
    assert not isinstance(spec.padding, str)
    geometry = (spec.strides, spec.padding, spec.input_dilation, spec.kernel_dilation)
    columns = jnp.concatenate(list(tap_slices(geometry, pad(geometry, x), spec.kernel_size)), -1)
    y = columns.reshape(-1, columns.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(*columns.shape[:-1], -1)


def jax_calls(layer: Layer, batch: int, *, backward: bool) -> dict[str, Callable[[], Any]]:
    """Return calls of the layer in JAX: ours, grouped, and two forms of the standard convolution.

    Args:
        layer: the layer.
        batch: images.
        backward: whether the gradients of input and parameters are computed, too.
    """
    spec = layer.spec
    key_x, key_k, key_dy = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(key_x, (batch, layer.size, layer.size, layer.channels))
    dy = jax.random.normal(key_dy, x.shape)
    kernel = jax.random.normal(key_k, spec.kernel_shape)

    def falcon(impl: Impl) -> Callable[..., Array]:
        return lambda x, params: fj.Falcon(impl=impl).apply(params, x, spec)

    def standard(x: Array, kernel: Array) -> Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    params = fj.Falcon().init(key_k, spec)
    functions = {
        "ours": (falcon("auto"), params),
        "grouped": (falcon("grouped"), params),
        "standard": (standard, kernel),
        "im2col": (lambda x, kernel: im2col(spec, x, kernel), kernel),
    }

    def with_gradients(function: Callable[..., Array]) -> Callable[..., Any]:
        def both(x: Array, weights: Any, dy: Array) -> Any:
            y, gradients = jax.vjp(function, x, weights)
            return y, gradients(dy)

        return both

    if backward:
        return {
            name: synchronised(jax.jit(with_gradients(f)), x, weights, dy)
            for name, (f, weights) in functions.items()
        }
    return {name: synchronised(jax.jit(f), x, weights) for name, (f, weights) in functions.items()}


def torch_calls(
    layer: Layer, batch: int, *, backward: bool, compiled: bool
) -> dict[str, Callable[[], Any]]:
    """Return calls of the same layer in PyTorch, channels last; none where it is not installed.

    Args:
        layer: the layer.
        batch: images.
        backward: whether the gradients of input and parameters are computed, too.
        compiled: whether ``torch.compile`` is measured, too.
    """
    try:
        import torch
        from torch.nn import functional
    except ImportError:
        return {}
    rng = np.random.default_rng(0)
    c, size = layer.channels, layer.size

    def tensor(*shape: int) -> Any:
        values = torch.tensor(rng.normal(size=shape), dtype=torch.float32)
        return values.to(memory_format=torch.channels_last)

    x, dy = tensor(batch, c, size, size), tensor(batch, c, size, size)
    kernel, pointwise, depthwise = tensor(c, c, 3, 3), tensor(c, c, 1, 1), tensor(c, 1, 3, 3)

    def falcon(x: Any, pointwise: Any, depthwise: Any) -> Any:
        z = functional.conv2d(x, pointwise)
        return functional.conv2d(z, depthwise, padding=1, groups=depthwise.shape[0])

    def standard(x: Any, kernel: Any) -> Any:
        return functional.conv2d(x, kernel, padding=1)

    def call(function: Callable[..., Any], *tensors: Any) -> Callable[[], Any]:
        leaves = [t.clone().requires_grad_(backward) for t in tensors]

        def forward() -> Any:
            with torch.inference_mode():
                return function(*leaves)

        def both() -> Any:
            return torch.autograd.grad(function(*leaves), leaves, dy)

        return both if backward else forward

    calls = {
        "torch": call(falcon, x, pointwise, depthwise),
        "torch standard": call(standard, x, kernel),
    }
    if compiled:
        calls["torch compiled"] = call(torch.compile(falcon), x, pointwise, depthwise)
    return calls
