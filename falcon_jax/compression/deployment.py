"""`deploy`: a model as one fast function for inference."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from falcon_jax.compression.batchnorm import fold_batchnorm
from falcon_jax.frameworks.interface import Model, framework_of
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.tracing import inner_jaxprs
from falcon_jax.native.joining import with_native_steps
from falcon_jax.native.library import load as kernels_are_loaded
from falcon_jax.native.library import multiplies_bfloat16
from falcon_jax.native.library import serve as kernels_serve
from falcon_jax.wording import shown

Precision = Literal["float32", "bfloat16"]
_MOST_EXAMPLES = 32  # that go through together
_LARGEST = 1 << 25  # bytes of an array between layers that costs no page faults in every call


def deploy(
    model: Model,
    sample: Any | None = None,
    *,
    chunk: int | Literal["auto"] | None = "auto",
    native: bool | None = None,
    precision: Precision = "float32",
) -> Callable[..., Any]:
    """Return a jitted function that gives what a model gives in evaluation mode, faster.

    BatchNorms are folded into the convolutions before them, kernels that are built in every call
    are built once, weights are constants of the compiled function, and batches of more than
    ``chunk`` examples go through in chunks, so that no large buffers are asked of the system in
    every call. The function is pure; ``jax.export`` takes it.
    A Linen module that draws random numbers draws the same in every call, unless the sample has
    keys, ``falcon_jax.Inputs(x, rngs={"noise": key})``: they are arguments like all other arrays.

    Args:
        model: an NNX model, compressed or not, or a Linen module bound to its variables; it is not
            changed.
        sample: what it is called with, arrays or shapes. Without, BatchNorms are not folded. A
            Linen module in evaluation mode, such as ``falcon_jax.Inputs(x, train=False)``;
            constants stay as they are in the sample.
        chunk: examples that go through together; None for all, ``"auto"`` for up to 32 whose
            largest activations have 32 MB. A model whose examples depend on
            each other must not be cut; one that draws random numbers or writes variables, or that
            has an output without batch axis, is not.
        native: whether convolutions are carried out by the kernels of `falcon_jax.native`, each
            with the bias, sum, rectification and pooling that follow it; on CPUs, in float32. If
            not given, where they are built. What `jax.export` writes is plain JAX.
        precision: ``"bfloat16"`` to round what is multiplied, inputs and weights of convolutions
            over channels and of matrix products, where that is faster: by native kernels on
            processors with AMX. Sums, depthwise steps and all else stay in float32.

    Returns:
        A function of the model's arrays, in the order of its arguments.

    Raises:
        ValueError: if ``chunk`` is not positive, ``precision`` is neither, the model cannot be
            called on the sample, a Linen module is not bound, or ``native`` kernels are asked for
            and not built.

    >>> from flax import nnx
    >>> layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    >>> deploy(layer, jnp.ones((1, 8, 8, 3)))(jnp.ones((2, 8, 8, 3))).shape
    (2, 8, 8, 4)
    """
    if not (chunk in (None, "auto") or (isinstance(chunk, int) and chunk >= 1)):
        raise ValueError(
            f"chunk is a number of examples, at least 1, 'auto' or None; got {shown(chunk)}."
        )
    if precision not in get_args(Precision):
        raise ValueError(f"precision is 'float32' or 'bfloat16'; got {shown(precision)}.")
    inputs = None if sample is None else Inputs.of(sample).shapes
    written: list[bool] = [False]
    framework: Any = framework_of(model)
    if inputs is not None:
        model = fold_batchnorm(model, inputs)
    inference = framework.inference(framework.with_built_kernels(model))

    def call(*args: Any, **kwargs: Any) -> Any:
        y, written[0] = inference.call(inference.state, *args, **kwargs)
        return y

    def forward(*arrays: Any) -> Any:
        bound = Inputs(*arrays) if inputs is None else inputs.with_arrays(list(arrays))
        return bound.call(call)

    if native and not kernels_are_loaded():
        raise ValueError(
            "the native kernels are not built on this machine: run `python -m falcon_jax build`, "
            "which needs a C++ compiler, or leave native=True out."
        )
    if native is not False and kernels_serve():
        rounded = precision == "bfloat16" and multiplies_bfloat16()
        forward = with_native_steps(forward, bfloat16=rounded)
    return jax.jit(forward if chunk is None else _in_chunks(forward, chunk, written))


def _in_chunks(
    forward: Callable[..., Any], size: int | Literal["auto"], written: list[bool]
) -> Callable[..., Any]:
    """Return the function that carries large batches out chunk by chunk, the rest at the end.

    A model that draws random numbers, or writes variables, sees the batch as a whole.
    """

    def chunked(*arrays: Any) -> Any:
        batch = arrays[0].shape[0] if arrays and jnp.ndim(arrays[0]) else 0
        least = 1 if size == "auto" else size
        if not isinstance(batch, int) or batch <= least:  # a batch of any size in jax.export
            return forward(*arrays)
        if not _has_batch_axis(arrays, batch):
            return forward(*arrays)
        jaxpr, outputs = jax.make_jaxpr(forward, return_shape=True)(*arrays)
        chunk = _fitting(jaxpr.jaxpr, batch) if size == "auto" else size
        if chunk >= batch:
            return forward(*arrays)
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


def _fitting(jaxpr: Any, batch: int) -> int:
    """Return how many examples go through together: a divisor of the batch, if one is near."""
    each = max(1, _largest(jaxpr, batch) // batch)
    most = max(1, min(_MOST_EXAMPLES, _LARGEST // each))
    divisors = (n for n in range(min(most, batch), 0, -1) if batch % n == 0)
    even = next(divisors)
    return even if 2 * even > most else most


def _largest(jaxpr: Any, batch: int) -> int:
    """Return the bytes of the largest array with a batch axis that is computed."""
    found = 0
    for eqn in jaxpr.eqns:
        for y in eqn.outvars:
            if getattr(y.aval, "shape", ())[:1] == (batch,):
                found = max(found, math.prod(y.aval.shape) * jnp.dtype(y.aval.dtype).itemsize)
        for inner in inner_jaxprs(tuple(eqn.params.values())):
            found = max(found, _largest(inner, batch))
    return found


def _is_random(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in ("random_bits", "threefry2x32", "rng_bit_generator")
        or any(map(_is_random, inner_jaxprs(tuple(eqn.params.values()))))
        for eqn in jaxpr.eqns
    )


def _has_batch_axis(arrays: Any, batch: int) -> bool:
    return all(jnp.shape(a)[:1] == (batch,) for a in arrays)
