"""Trained NNX convolutions: their geometry, whether they can be replaced, and the fit."""

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax.methods import ConvSpec, Method, Params, Solver, fit
from falcon_jax.ops import conv_on_small_maps


def conv_spec(conv: nnx.Conv) -> ConvSpec:
    """Return the spec of an NNX convolution."""
    return ConvSpec(
        kernel_size=conv.kernel_size,
        in_features=conv.in_features,
        out_features=conv.out_features,
        strides=conv.strides,
        padding=conv.padding,  # type: ignore[arg-type]
        kernel_dilation=conv.kernel_dilation,
        input_dilation=conv.input_dilation,
        feature_group_count=conv.feature_group_count,
        use_bias=conv.bias is not None,
    )


def conv_obstacle(conv: nnx.Conv) -> str | None:
    """Return why a convolution must stay whatever the method, or None."""
    if conv.mask is not None:
        return "masked kernel"
    if conv.conv_general_dilated not in (lax.conv_general_dilated, conv_on_small_maps):
        return "own convolution function"
    if conv.promote_dtype is not promote_dtype:
        return "own type promotion"
    if conv.preferred_element_type is not None:
        return "preferred_element_type is set"
    return None


def for_trained(
    method: Method, kernel: Float[Array, "*stacked_kernel_shape"], spec: ConvSpec
) -> Method:
    """Return the method as a layer needs it, one for all layers of a stack."""
    return method.for_layer(spec, kernel.reshape(-1, *spec.kernel_shape))


def fit_stacked(
    kernel: Float[Array, "*stacked_kernel_shape"],
    method: Method,
    spec: ConvSpec,
    solver: Solver = "exact",
    key: PRNGKeyArray | None = None,
) -> Params:
    """Fit a kernel that may have leading axes; the parameters get the same leading axes.

    Args:
        kernel: shape ``(*stack, *spec.kernel_shape)``.
        method: what to fit.
        spec: the convolution.
        solver: as in `fit`.
        key: as in `fit`; every layer of a stack starts from a key of its own.

    Returns:
        Parameters of shape ``(*stack, ...)``.
    """
    stack = kernel.shape[: kernel.ndim - len(spec.kernel_shape)]
    if not stack:
        return fit(kernel, method, solver, spec=spec, key=key)
    flat = kernel.reshape(-1, *spec.kernel_shape)
    keys = jax.random.split(jax.random.key(0) if key is None else key, flat.shape[0])
    params = jax.vmap(lambda k, s: fit(k, method, solver, spec=spec, key=s))(flat, keys)
    return {name: value.reshape(*stack, *value.shape[1:]) for name, value in params.items()}
