"""`deploy`: a model as one fast function for inference."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from falcon_jax.compression.folding import fold_batchnorm
from falcon_jax.frameworks.inspection import Model
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.linen import applied
from falcon_jax.frameworks.nnx import (
    clone,
    in_evaluation,
    map_modules,
    named_variables,
)
from falcon_jax.frameworks.tracing import inner_jaxprs
from falcon_jax.nn.method_conv import MethodConv
from falcon_jax.ops.convolution import conv_on_small_maps


def deploy(
    model: Model,
    sample: Any | None = None,
    variables: Mapping[str, Any] | None = None,
    *,
    chunk: int | None = 32,
) -> Callable[..., Any]:
    """Return a jitted function that gives what a model gives in evaluation mode, faster.

    BatchNorms are folded into the convolutions before them, kernels that are built in every call
    are built once, weights are constants of the compiled function, and batches of more than
    ``chunk`` examples go through in chunks, so that activations stay in the cache and no large
    buffers are asked of the system in every call. The function is pure; ``jax.export`` takes it.
    A Linen module that draws random numbers draws the same in every call, unless the sample has
    keys, ``falcon_jax.Inputs(x, rngs={"noise": key})``: they are arguments like all other arrays.

    Args:
        model: an NNX model, compressed or not, or a Linen module; it is not changed.
        sample: what it is called with, arrays or shapes. An NNX model can do without; then its
            BatchNorms are not folded. A Linen module in evaluation mode, such as
            ``falcon_jax.Inputs(x, train=False)``; constants stay as they are in the sample.
        variables: of a Linen module.
        chunk: examples that go through together; None for all. A model whose examples depend on
            each other must not be cut; one that draws random numbers or writes variables, or that
            has an output without batch axis, is not.

    Returns:
        A function of the model's arrays, in the order of its arguments.

    Raises:
        ValueError: if ``chunk`` is not positive, the model cannot be called on the sample, or a
            Linen module comes without sample or variables.

    >>> layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    >>> deploy(layer, jnp.ones((1, 8, 8, 3)))(jnp.ones((2, 8, 8, 3))).shape
    (2, 8, 8, 4)
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is a number of examples, at least 1, or None; got {chunk}.")
    inputs = None if sample is None else Inputs.of(sample).shapes
    written: list[bool] = [False]
    if isinstance(model, nn.Module):
        call = _linen_call(model, inputs, variables)
    else:
        call = _nnx_call(model, inputs, written)

    def forward(*arrays: Any) -> Any:
        bound = Inputs(*arrays) if inputs is None else inputs.with_arrays(list(arrays))
        return bound.call(call)

    return jax.jit(forward if chunk is None else _in_chunks(forward, chunk, written))


def _nnx_call(model: nnx.Module, inputs: Inputs | None, written: list[bool]) -> Callable[..., Any]:
    """Return the model's call; it notes in ``written`` whether it wrote a variable."""
    copy = in_evaluation(model)
    if inputs is not None:
        copy = fold_batchnorm(copy, inputs)
    copy = map_modules(_with_built_kernel, copy)

    def call(*args: Any, **kwargs: Any) -> Any:
        # What the call writes, it writes to the variables of a clone, in partials and all.
        cloned = clone(copy)
        before = [v.get_raw_value() for _, v in named_variables(cloned)]
        y = cloned(*args, **kwargs)  # type: ignore[operator]
        after = [v.get_raw_value() for _, v in named_variables(cloned)]
        written[0] = len(before) != len(after) or any(map(operator.is_not, before, after))
        return y

    return call


def _linen_call(
    model: nn.Module, inputs: Inputs | None, variables: Mapping[str, Any] | None
) -> Callable[..., Any]:
    if inputs is None or variables is None:
        raise ValueError("to deploy a Linen module, give sample and variables, too.")
    folded, folded_variables = fold_batchnorm(model, inputs, variables)
    return lambda *args, **kwargs: applied(folded, folded_variables, *args, **kwargs)


def _with_built_kernel(path: str, module: nnx.Module) -> nnx.Module | None:
    """Return the standard convolution for a layer whose method would build its kernel."""
    if not isinstance(module, MethodConv) or not module.method.builds_kernel():
        return None
    spec, kernel = module.spec, module.kernel
    if kernel.ndim > len(spec.kernel_shape):  # stacked
        return None
    conv = nnx.Conv(
        spec.in_features,
        spec.out_features,
        spec.kernel_size,
        spec.strides,
        padding=spec.padding,
        input_dilation=spec.input_dilation,
        kernel_dilation=spec.kernel_dilation,
        feature_group_count=spec.feature_group_count,
        use_bias=module.bias is not None,
        dtype=module.dtype,
        precision=module.precision,  # type: ignore[arg-type]  # Flax knows fewer names
        conv_general_dilated=conv_on_small_maps,
        kernel_init=nnx.initializers.zeros_init(),
        rngs=nnx.Rngs(0),
    )
    conv.kernel[...] = kernel
    if module.bias is not None:
        conv.bias = nnx.Param(module.bias[...])
    return conv


def _in_chunks(forward: Callable[..., Any], chunk: int, written: list[bool]) -> Callable[..., Any]:
    """Return the function that carries large batches out chunk by chunk, the rest at the end.

    A model that draws random numbers, or writes variables, sees the batch as a whole.
    """

    def chunked(*arrays: Any) -> Any:
        batch = arrays[0].shape[0] if arrays and jnp.ndim(arrays[0]) else 0
        if not isinstance(batch, int) or batch <= chunk:  # a batch of any size in jax.export
            return forward(*arrays)
        if not _has_batch_axis(arrays, batch):
            return forward(*arrays)
        jaxpr, outputs = jax.make_jaxpr(forward, return_shape=True)(*arrays)
        if not _has_batch_axis(jax.tree.leaves(outputs), batch):
            return forward(*arrays)
        if written[0] or _is_random(jaxpr.jaxpr):
            return forward(*arrays)
        whole = batch // chunk * chunk
        split = [a[:whole].reshape(whole // chunk, chunk, *a.shape[1:]) for a in arrays]
        y = jax.lax.map(lambda parts: forward(*parts), tuple(split))
        y = jax.tree.map(lambda a: a.reshape(math.prod(a.shape[:2]), *a.shape[2:]), y)
        if whole == batch:
            return y
        rest = forward(*(a[whole:] for a in arrays))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), y, rest)

    return chunked


def _is_random(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in ("random_bits", "threefry2x32", "rng_bit_generator")
        or any(map(_is_random, inner_jaxprs(tuple(eqn.params.values()))))
        for eqn in jaxpr.eqns
    )


def _has_batch_axis(arrays: Any, batch: int) -> bool:
    return all(jnp.shape(a)[:1] == (batch,) for a in arrays)
