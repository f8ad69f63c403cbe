"""The tests that every method passes, for methods of other packages, too.

import pytest
from falcon_jax import testing

@pytest.mark.parametrize("check", testing.METHOD_CHECKS)
def test_my_method(check):
check(MyMethod(rank=2))
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float64

from falcon_jax.methods import ConvSpec, Method, Params, fit, get_method, relative_error

# A plain convolution; strides, uneven padding and a bias; dilations. Two axes, sizes of their own.
SPECS = (
    ConvSpec(kernel_size=(3, 3), in_features=6, out_features=8, use_bias=False),
    ConvSpec(
        kernel_size=(3, 2),
        in_features=6,
        out_features=8,
        strides=(2, 1),
        padding=((1, 0), (2, 1)),
    ),
    ConvSpec(
        kernel_size=(2, 3),
        in_features=6,
        out_features=8,
        padding="VALID",
        kernel_dilation=(1, 2),
        input_dilation=(2, 1),
        use_bias=False,
    ),
)


def standard_conv(
    x: ArrayLike, kernel: ArrayLike, spec: ConvSpec
) -> Float64[np.ndarray, "*batch_out n"]:
    """Return the standard convolution in float64, tap by tap.

    ``y[p, n] = sum_{t, m} x[s p + d t, m] kernel[t, m, n]``

    Args:
        x: shape ``(..., *spatial, M)``.
        kernel: shape ``(*kernel_size, M / groups, N)``.
        spec: the convolution.

    Returns:
        Output of shape ``(..., *spatial_out, N)``, without bias.

    Reference:
        FALCON, Equations 1 and 2.
    """
    values, taps = float64(x), float64(kernel)
    axes = len(spec.kernel_size)
    batch = values.shape[: -1 - axes]
    values = values.reshape(-1, *values.shape[-1 - axes :])
    pads: Any = ((0, 0), *_pads(spec, values.shape[1:-1]), (0, 0))
    if spec.padding in ("CIRCULAR", "REFLECT"):
        modes: Any = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
        values = np.pad(values, pads, mode=modes[spec.padding])
        pads = ((0, 0),) * values.ndim
    sizes = [(n - 1) * d + 1 for n, d in zip(values.shape[1:-1], spec.input_dilation, strict=True)]
    dilated = np.zeros((values.shape[0], *sizes, values.shape[-1]))
    dilated[(slice(None), *(slice(None, None, d) for d in spec.input_dilation))] = values
    values = np.pad(dilated, pads)
    sizes = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(
            values.shape[1:-1], spec.kernel_size, spec.kernel_dilation, spec.strides, strict=True
        )
    ]
    groups, m = spec.feature_group_count, spec.group_in_features
    width = spec.out_features // groups
    y = np.zeros((values.shape[0], *sizes, spec.out_features))
    for tap in np.ndindex(*spec.kernel_size):
        window = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, spec.kernel_dilation, sizes, spec.strides, strict=True)
        )
        seen = values[(slice(None), *window)]
        for group in range(groups):
            inputs = slice(group * m, (group + 1) * m)
            outputs = slice(group * width, (group + 1) * width)
            y[..., outputs] += seen[..., inputs] @ taps[tap][:, outputs]
    return y.reshape(*batch, *y.shape[1:])


def check_is_a_value(method: Method) -> None:
    """Check that a method is a frozen value that its plain data describe."""
    value: Any = method
    assert hash(method) == hash(dataclasses.replace(value))
    _, decided, _, _ = next(_cases(method))
    data = json.loads(json.dumps(decided.options()))
    assert get_method(method.name, **data) == decided
    assert method.name in method.label()


def check_parameters(method: Method) -> None:
    """Check that random and fitted parameters are alike, and as many as `cost` says."""
    for spec, decided, kernel, params in _cases(method):
        random = decided.init(jax.random.key(1), spec)
        for name in {*params, *random}:
            assert params[name].shape == random[name].shape
            assert bool(jnp.isfinite(params[name]).all())
        count = sum(value.size for value in params.values())
        bias = spec.out_features if spec.use_bias else 0
        assert decided.cost(spec, (7, 8, 6)).params == count + bias
        assert decided.kernel(params, spec).shape == spec.kernel_shape
        half = decided.fit(kernel.astype(jnp.bfloat16), spec)
        assert {value.dtype for value in half.values()} == {jnp.dtype(jnp.bfloat16)}


def check_mult_adds(method: Method) -> None:
    """Check that mult-adds are those of one example, and more for larger images."""
    for spec, decided, _, _ in _cases(method):
        one = decided.cost(spec, (7, 8, 6)).mult_adds
        assert decided.cost(spec, (5, 3, 7, 8, 6)).mult_adds == one
        assert decided.cost(spec, (14, 16, 6)).mult_adds > one > 0
        bare = dataclasses.replace(spec, use_bias=False)
        points = int(np.prod(spec.output_shape((7, 8))))
        bias = points * spec.out_features if spec.use_bias else 0
        assert one == decided.cost(bare, (7, 8, 6)).mult_adds + bias


def check_apply_is_the_convolution_with_the_kernel(method: Method) -> None:
    """Check `apply` against the standard convolution in float64, with any batch axes."""
    for spec, decided, _, params in _cases(method):
        for batch in ((), (2,), (2, 1)):
            x = _draw(7, *batch, 7, 8, 6)
            expected = standard_conv(x, decided.kernel(params, spec), spec)
            y = decided.apply(params, x, spec)
            np.testing.assert_allclose(y, expected, atol=1e-5 * max(np.abs(expected).max(), 1))


def check_fit(method: Method) -> None:
    """Check that a fit is no worse than nothing, and does not depend on the kernel's scale."""
    for spec, decided, kernel, params in _cases(method):
        error = float(relative_error(kernel, decided.kernel(params, spec)))
        assert error <= 1 + 1e-5
        for scale in (1e-20, 1e20):
            scaled = decided.kernel(fit(scale * kernel, decided, spec=spec), spec)
            assert abs(float(relative_error(scale * kernel, scaled)) - error) < 1e-2


def check_transformations(method: Method) -> None:
    """Check `apply` under jit, vmap, reverse and forward mode, against the standard convolution."""
    spec, decided, _, params = next(_cases(method))
    x, direction = _draw(7, 2, 7, 8, 6), _draw(8, 2, 7, 8, 6)

    def ours(params: Params, x: Array) -> Array:
        return decided.apply(params, x, spec)

    def standard(params: Params, x: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            decided.kernel(params, spec),
            spec.strides,
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )

    def everything(function: Callable[[Params, Array], Array]) -> Any:
        y, pull = jax.vjp(function, params, x)
        _, tangent = jax.jvp(lambda x: function(params, x), (x,), (direction,))
        rows = jax.vmap(function, in_axes=(None, 0))(params, x[:, None])[:, 0]
        return y, rows, tangent, pull(jnp.cos(y))

    found, expected = (jax.jit(lambda f=f: everything(f))() for f in (ours, standard))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(float(jnp.abs(b).max()), 1))


def check_gain(method: Method) -> None:
    """Check that `with_gain` multiplies the kernel's output channels, where a method has it."""
    spec, decided, _, params = next(_cases(method))
    gain = _draw(9, spec.out_features)
    changed = decided.with_gain(params, gain)
    if changed is not None:
        expected = float64(decided.kernel(params, spec)) * float64(gain)
        np.testing.assert_allclose(decided.kernel(changed, spec), expected, atol=1e-5)


def check_refusal(method: Method) -> None:
    """Check that what `supports` refuses is refused with its reason."""
    spec = ConvSpec(kernel_size=(1, 1), in_features=2, out_features=2)
    reason = method.supports(spec)
    if reason is None:
        return
    try:
        method.init(jax.random.key(0), spec)
    except ValueError as error:
        assert reason in str(error)
    else:
        raise AssertionError(f"{method} gives parameters for {spec}, which it does not support")


METHOD_CHECKS: tuple[Callable[[Method], None], ...] = (
    check_is_a_value,
    check_parameters,
    check_mult_adds,
    check_apply_is_the_convolution_with_the_kernel,
    check_fit,
    check_transformations,
    check_gain,
    check_refusal,
)


def _cases(method: Method) -> Iterator[tuple[ConvSpec, Method, Array, Params]]:
    """Yield spec, the method as that layer needs it, a kernel, and the parameters fitted to it."""
    for spec, decided, kernel, params in _fitted(method):
        yield spec, decided, kernel, dict(params)


@functools.lru_cache(maxsize=32)  # every check asks for them anew
def _fitted(method: Method) -> tuple[tuple[ConvSpec, Method, Array, Params], ...]:
    supported = [spec for spec in SPECS if method.supports(spec) is None]
    assert supported, f"{method} supports none of {SPECS}"
    cases = []
    for index, spec in enumerate(supported):
        kernel = _draw(index, *spec.kernel_shape)
        decided = method.for_layer(spec, kernel[None])
        cases.append((spec, decided, kernel, decided.fit(kernel, spec)))
    return tuple(cases)


def _draw(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def float64(values: ArrayLike) -> Float64[np.ndarray, "*shape"]:
    """Return values as NumPy's float64."""
    # Through float32: NumPy has no cast of its own from bfloat16.
    return np.asarray(np.asarray(values, np.float32), np.float64)


def _pads(spec: ConvSpec, spatial: tuple[int, ...]) -> Any:
    """Return the points added to each axis of the (dilated) input, as lax and Flax have them."""
    extents = [(k - 1) * d + 1 for k, d in zip(spec.kernel_size, spec.kernel_dilation, strict=True)]
    if spec.padding in ("SAME", "SAME_LOWER", "VALID"):
        points = [(n - 1) * d + 1 for n, d in zip(spatial, spec.input_dilation, strict=True)]
        return lax.padtype_to_pads(points, extents, spec.strides, str(spec.padding))
    if spec.padding in ("CIRCULAR", "REFLECT"):
        return [((e - 1) // 2, e // 2) for e in extents]
    if spec.padding == "CAUSAL":
        return [(e - 1, 0) for e in extents]
    return spec.padding
