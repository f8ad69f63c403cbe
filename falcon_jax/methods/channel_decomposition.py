"""Channel decomposition: a convolution to fewer channels, then a pointwise one."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Array, Float

from falcon_jax.methods.base import Params
from falcon_jax.methods.chain import HALF, ChainRank, Inner, LowRankChain, Stage
from falcon_jax.methods.registry import register
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.solvers.responses import positive_part_regression, reduced_rank_regression


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelDecomposition(LowRankChain):
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
    last_stage: ClassVar[str] = "pointwise"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.relu, bool):
            raise ValueError(f"relu is True or False; got {self.relu!r}.")

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        if spec.taps == 1:
            return "a 1x1 kernel is pointwise already"
        return super().supports(spec)

    def stages(self, spec: ConvSpec, rank: int) -> tuple[Stage, ...]:
        """Return the convolution to d channels and the pointwise one."""
        axes = tuple(range(len(spec.kernel_size)))
        return Stage("spatial", rank, axes), Stage("pointwise", spec.out_features)

    def matrix(self, kernel: Float[Array, "*kernel_shape"]) -> Float[Array, "inputs n"]:
        """Return the matrix ``[(D^2 M) x N]``."""
        return kernel.reshape(-1, kernel.shape[-1])

    def from_factors(
        self, left: Float[Array, "inputs rank"], right: Float[Array, "rank n"], spec: ConvSpec
    ) -> tuple[Float[Array, "inputs rank"], Float[Array, "rank n"]]:
        """Return the kernel to d channels and the pointwise one: the factors are these."""
        return left, right

    def fits_responses(self) -> bool:
        """Return True."""
        return True

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
        rank = self.decided_rank(spec, kernel[None])
        left, right, offset = regression(responses, targets, rank=rank, centred=bias is not None)
        params = self.params_of((self.matrix(kernel) @ left, right), spec, rank)
        return params, None if bias is None else (bias @ left) @ right + offset
