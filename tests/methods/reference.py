"""Float64 references: the optimum of a fit, kernels built from parameters, the convolution."""

import numpy as np
from jax import lax

import falcon_jax as fj


def float64(values):
    # Through float32: NumPy has no cast of its own from bfloat16.
    return np.asarray(np.asarray(values, np.float32), np.float64)


def matrices(kernel, method, groups=1):
    """The matrices that the method approximates, each by one of rank k (Theorems 1 and 2)."""
    kernel = float64(kernel)
    *size, m, n = kernel.shape
    flat = kernel.reshape(int(np.prod(size)), m, n)
    if isinstance(method, fj.Falcon):
        return [flat[:, :, column] for column in range(n)]
    width = n // groups
    return [
        flat[:, row, group * width : (group + 1) * width]
        for group in range(groups)
        for row in range(m)
    ]


def optimum(kernel, method, groups=1):
    """The least possible error, from NumPy's SVD in float64."""
    tails = [
        np.linalg.svd(matrix, compute_uv=False)[method.rank :]
        for matrix in matrices(kernel, method, groups)
    ]
    return np.sqrt(sum(float((tail**2).sum()) for tail in tails))


def built(params, method, groups=1):
    """The kernel that parameters stand for, in float64."""
    depthwise, pointwise = float64(params["depthwise"]), float64(params["pointwise"])
    if isinstance(method, fj.Falcon):
        return np.einsum("...rn,mrn->...mn", depthwise, pointwise)
    m, _, n = pointwise.shape
    width = n // groups
    blocks = [
        np.einsum(
            "...mr,mrn->...mn",
            depthwise[..., group * m : (group + 1) * m, :],
            pointwise[..., group * width : (group + 1) * width],
        )
        for group in range(groups)
    ]
    return np.concatenate(blocks, axis=-1)


def fit_error(kernel, params, method, groups=1):
    return np.linalg.norm(float64(kernel) - built(params, method, groups))


def pads_of(spec, spatial):
    """Points added before and after each axis of the (dilated) input, as lax and Flax have them."""
    extents = [(k - 1) * d + 1 for k, d in zip(spec.kernel_size, spec.kernel_dilation, strict=True)]
    if spec.padding in ("SAME", "SAME_LOWER", "VALID"):
        points = [(n - 1) * d + 1 for n, d in zip(spatial, spec.input_dilation, strict=True)]
        return lax.padtype_to_pads(points, extents, spec.strides, spec.padding)
    if spec.padding in ("CIRCULAR", "REFLECT"):
        return [((e - 1) // 2, e // 2) for e in extents]
    if spec.padding == "CAUSAL":
        return [(e - 1, 0) for e in extents]
    return spec.padding


def standard_conv(x, kernel, spec):
    """The standard convolution in float64, tap by tap, from Equations 1 and 2."""
    x, kernel = float64(x), float64(kernel)
    axes = len(spec.kernel_size)
    batch = x.shape[: -1 - axes]
    x = x.reshape(-1, *x.shape[-1 - axes :])
    pads = ((0, 0), *pads_of(spec, x.shape[1:-1]), (0, 0))
    if spec.padding in ("CIRCULAR", "REFLECT"):
        x = np.pad(x, pads, mode={"CIRCULAR": "wrap", "REFLECT": "reflect"}[spec.padding])
        pads = ((0, 0),) * x.ndim
    sizes = [(n - 1) * d + 1 for n, d in zip(x.shape[1:-1], spec.input_dilation, strict=True)]
    dilated = np.zeros((x.shape[0], *sizes, x.shape[-1]))
    dilated[(slice(None), *(slice(None, None, d) for d in spec.input_dilation))] = x
    x = np.pad(dilated, pads)
    sizes = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(
            x.shape[1:-1], spec.kernel_size, spec.kernel_dilation, spec.strides, strict=True
        )
    ]
    groups, m = spec.feature_group_count, spec.group_in_features
    width = spec.out_features // groups
    y = np.zeros((x.shape[0], *sizes, spec.out_features))
    for tap in np.ndindex(*spec.kernel_size):
        window = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, spec.kernel_dilation, sizes, spec.strides, strict=True)
        )
        seen = x[(slice(None), *window)]
        for group in range(groups):
            inputs = slice(group * m, (group + 1) * m)
            outputs = slice(group * width, (group + 1) * width)
            y[..., outputs] += seen[..., inputs] @ kernel[tap][:, outputs]
    return y.reshape(*batch, *y.shape[1:])
