"""Table 2 and Theorems 3 to 5 of the paper as formulas, in the paper's symbols.

D is the size of the kernel, M and N are input and output channels, H and W the height and width of
the input, H' and W' (``H_out``, ``W_out``) those of the output. No biases, no BatchNorm.

The formulas are the paper's: what a layer of ours costs, with its padding, biases and rounding, is
said by `Method.cost` and `profile`.
"""

from fractions import Fraction

from falcon_jax.methods.base import Cost


def standard(*, D: int, M: int, N: int, H_out: int, W_out: int) -> Cost:
    """Return the cost of standard convolution.

    ``D^2 M N`` parameters, ``H' W' D^2 M N`` mult-adds

    Reference:
        FALCON, Table 2.
    """
    params = D**2 * M * N
    return Cost(params=params, mult_adds=H_out * W_out * params)


def falcon(*, D: int, M: int, N: int, H: int, W: int, H_out: int, W_out: int, k: int = 1) -> Cost:
    """Return the cost of rank-k FALCON.

    ``k (M N + D^2 N)`` parameters, ``k (H W M N + H' W' D^2 N)`` mult-adds

    Reference:
        FALCON, Table 2 and Theorem 5.

    >>> falcon(D=3, M=64, N=128, H=32, W=32, H_out=16, W_out=16)
    Cost(params=9344, mult_adds=8683520)
    """
    return Cost(
        params=k * (M * N + D**2 * N),
        mult_adds=k * (H * W * M * N + H_out * W_out * D**2 * N),
    )


def dpconv(*, D: int, M: int, N: int, H_out: int, W_out: int) -> Cost:
    """Return the cost of DPConv, and of GEP-in.

    ``M N + D^2 M`` parameters, ``H' W' (D^2 M + M N)`` mult-adds

    Table 2 prints ``H W D^2 M`` for the depthwise step; it runs at the output's resolution, and so
    it is counted in Tables 4 and 5.

    Reference:
        FALCON, Table 2.
    """
    params = M * N + D**2 * M
    return Cost(params=params, mult_adds=H_out * W_out * params)


def pdpconv(
    *, D: int, M: int, N: int, H: int, W: int, H_out: int, W_out: int, t: float | int | Fraction
) -> Cost:
    """Return the cost of PDPConv-t, without the 1x1 convolution that a shortcut may need.

    ``t (M^2 + D^2 M + M N)`` parameters, ``t (H W M^2 + H' W' D^2 M + H' W' M N)`` mult-adds

    Reference:
        FALCON, Table 2.

    Raises:
        ValueError: if t M is not whole.
    """
    inner = _whole(Fraction(t) * M, f"t M = {t} * {M}")
    return Cost(
        params=inner * (M + D**2 + N),
        mult_adds=inner * (H * W * M + H_out * W_out * (D**2 + N)),
    )


def gdgconv(*, D: int, M: int, N: int, H: int, W: int, H_out: int, W_out: int, g: int) -> Cost:
    """Return the cost of GDGConv with g groups, its inner channels being N / 4.

    ``(M N / g + D^2 N + N^2 / g) / 4`` parameters,
    ``(H W M N / g + H' W' D^2 N + H' W' N^2 / g) / 4`` mult-adds

    Reference:
        FALCON, Table 2.

    Raises:
        ValueError: if the numbers are not whole.
    """
    first, depthwise, last = Fraction(M * N, 4 * g), Fraction(D**2 * N, 4), Fraction(N * N, 4 * g)
    layer = f"GDGConv with M={M}, N={N}, g={g}"
    return Cost(
        params=_whole(first + depthwise + last, layer),
        mult_adds=_whole(H * W * first + H_out * W_out * (depthwise + last), layer),
    )


def pdpconv_split(*, D: int, M: int, H: int, W: int) -> Cost:
    """Return the cost of PDPConv-split with M channels in and out, and stride 1.

    ``(M^2 + D^2 M) / 2`` parameters, ``H W (M^2 + D^2 M) / 2`` mult-adds

    Reference:
        FALCON, Table 2.

    Raises:
        ValueError: if M is odd.
    """
    params = _whole(Fraction(M**2 + D**2 * M, 2), f"PDPConv-split with M={M}")
    return Cost(params=params, mult_adds=H * W * params)


def stconv_branch(*, D: int, M: int, H: int, W: int) -> Cost:
    """Return the cost of StConv-branch with M channels in and out, and stride 1.

    ``D^2 M^2 / 4`` parameters, ``H W D^2 M^2 / 4`` mult-adds

    Reference:
        FALCON, Table 2.

    Raises:
        ValueError: if M is odd.
    """
    half = _half(M)
    return standard(D=D, M=half, N=half, H_out=H, W_out=W)


def falcon_branch(*, D: int, M: int, H: int, W: int, k: int = 1) -> Cost:
    """Return the cost of FALCON-branch of rank k with M channels in and out, and stride 1.

    ``k (M^2 / 4 + D^2 M / 2)`` parameters, ``k H W (M^2 / 4 + D^2 M / 2)`` mult-adds

    Reference:
        FALCON, Table 2.

    Raises:
        ValueError: if M is odd.
    """
    half = _half(M)
    return falcon(D=D, M=half, N=half, H=H, W=W, H_out=H, W_out=W, k=k)


def compression_rate(*, D: int, M: int, k: int = 1) -> float:
    """Return the ratio of the parameters of standard convolution to those of rank-k FALCON.

    ``CR_k = D^2 M N / (k (M N + D^2 N)) = D^2 M / (k (M + D^2))``; N cancels.

    Args:
        D: size of the kernel.
        M: input channels.
        k: rank.

    Returns:
        The rate; above 1 where FALCON has fewer parameters.

    Reference:
        FALCON, Theorems 3 and 5.

    >>> round(compression_rate(D=3, M=512), 2)
    8.84
    """
    return D**2 * M / (k * (M + D**2))


def computation_reduction_rate(
    *, D: int, M: int, H: int, W: int, H_out: int, W_out: int, k: int = 1
) -> float:
    """Return the ratio of the mult-adds of standard convolution to those of rank-k FALCON.

    ``CRR_k = H' W' D^2 M N / (k (H W M N + H' W' D^2 N))``; N cancels.

    Args:
        D: size of the kernel.
        M: input channels.
        H: height of the input.
        W: width of the input.
        H_out: height of the output.
        W_out: width of the output.
        k: rank.

    Returns:
        The rate; above 1 where FALCON makes fewer mult-adds.

    Reference:
        FALCON, Theorems 4 and 5.
    """
    return H_out * W_out * D**2 * M / (k * (H * W * M + H_out * W_out * D**2))


def _half(M: int) -> int:
    return _whole(Fraction(M, 2), f"M / 2 with M={M}")


def _whole(value: Fraction, name: str) -> int:
    if value.denominator != 1:
        raise ValueError(f"{name} gives no whole number of parameters: {float(value)}.")
    return int(value)
