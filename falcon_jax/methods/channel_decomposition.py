"""Channel decomposition: a convolution to fewer channels, then a pointwise one."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from falcon_jax.fitting.responses import positive_part_regression, reduced_rank_regression
from falcon_jax.methods.base import Params, ResponseMethod
from falcon_jax.methods.chain import HALF, Chain, ChainRank, Inner
from falcon_jax.methods.registry import register
from falcon_jax.methods.spec import ConvSpec


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelDecomposition(Chain, ResponseMethod):
    """A convolution to d channels, then a pointwise one to N.

    ``K[..., m, n] = sum_r spatial[..., m, r] pointwise[r, n]``. From the kernel alone, the best
    approximation of rank d of the matrix ``[(D^2 M) x N]``; by `calibrate`, the one whose responses
    on data are nearest to the original layer's, with a new bias.

    Attributes:
        rank: number d of channels between the two; ``full`` (``min(D^2 M, N)``) reproduces any
            kernel, an `Energy` is decided by the trained kernel, and a `Budget` gives the authors'
            ``d = int(M N h w / (ratio (h w M + N)))``.
        inner: method that the first convolution is given to.
        relu: whether a ReLU follows the layer at once, so that `calibrate` compares positive parts.

    Reference:
        Zhang, Zou, He, Sun: Accelerating Very Deep Convolutional Networks for Classification and
        Detection, TPAMI 2016; combined as in Network Decoupling (arXiv 1808.05517), Section 4.
    """

    rank: ChainRank = HALF
    inner: Inner | Sequence[Inner] = None
    relu: bool = False
    name: ClassVar[str] = "channel_decomposition"
    stage_names: ClassVar[tuple[str, str]] = ("spatial", "pointwise")

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.relu, bool):
            raise ValueError(f"relu is True or False; got {self.relu!r}.")

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        if spec.taps == 1:
            return "a 1x1 kernel is pointwise already"
        return super().supports(spec)

    def stages(self, spec: ConvSpec, rank: int) -> tuple[ConvSpec, ConvSpec]:
        """Return the convolution to d channels and the pointwise one."""
        pointwise = ConvSpec(
            kernel_size=(1,) * len(spec.kernel_size),
            in_features=rank,
            out_features=spec.out_features,
            padding="VALID",
            use_bias=False,
        )
        return dataclasses.replace(spec, out_features=rank, use_bias=False), pointwise

    def matrix(
        self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec
    ) -> Float[Array, "inputs n"]:
        """Return the matrix ``[(D^2 M) x N]``."""
        return kernel.reshape(-1, kernel.shape[-1])

    def stage_kernels(
        self, left: Float[Array, "inputs rank"], right: Float[Array, "rank n"], spec: ConvSpec
    ) -> tuple[Float[Array, "*first_shape"], Float[Array, "*second_shape"]]:
        """Return the kernel to d channels and the pointwise one."""
        ones = (1,) * len(spec.kernel_size)
        return left.reshape(*spec.kernel_shape[:-1], -1), right.reshape(*ones, *right.shape)

    def joined(
        self, first: Float[Array, "*first_shape"], second: Float[Array, "*second_shape"]
    ) -> Float[Array, "*kernel_shape"]:
        """Return the kernel that the two are together."""
        return jnp.einsum("...mr,rn->...mn", first, second.reshape(second.shape[-2:]))

    def fit_responses(
        self,
        kernel: Float[Array, "*kernel_shape"],
        bias: Float[Array, " n"] | None,
        spec: ConvSpec,
        responses: Float[Array, "samples n"],
        targets: Float[Array, "samples n"],
    ) -> tuple[Params, Float[Array, " n"] | None]:
        """Return the parameters, and the bias, whose responses are nearest to the targets.

        ``min || f(targets) - f(responses left right + offset) ||^2``, f the positive part if
        ``relu``; the kernel is then ``[(D^2 M) x N] left right``.
        """
        self.require(spec, kernel)
        regression = positive_part_regression if self.relu else reduced_rank_regression
        left, right, offset = regression(
            responses, targets, rank=self._rank(spec, kernel[None]), centred=bias is not None
        )
        kernels = self.stage_kernels(self.matrix(kernel, spec) @ left, right, spec)
        params = self.stage_params(kernels, spec)
        return params, None if bias is None else (bias @ left) @ right + offset
