"""Compression methods: values with pure functions, one file each; and what an author needs."""

from falcon_jax.methods.base import Cost as Cost
from falcon_jax.methods.base import Method as Method
from falcon_jax.methods.base import Params as Params
from falcon_jax.methods.base import scale_outputs as scale_outputs
from falcon_jax.methods.base import standard_cost as standard_cost
from falcon_jax.methods.base import unit_gain as unit_gain
from falcon_jax.methods.chain import Chain as Chain
from falcon_jax.methods.chain import LowRankChain as LowRankChain
from falcon_jax.methods.chain import Stage as Stage
from falcon_jax.methods.channel_decomposition import ChannelDecomposition as ChannelDecomposition
from falcon_jax.methods.cp import CP as CP
from falcon_jax.methods.decoupled import Decoupled as Decoupled
from falcon_jax.methods.depthwise_separable import DepthwiseSeparable as DepthwiseSeparable
from falcon_jax.methods.falcon import Falcon as Falcon
from falcon_jax.methods.filter_summary import (
    DifferentiableFilterSummary as DifferentiableFilterSummary,
)
from falcon_jax.methods.filter_summary import FilterSummary as FilterSummary
from falcon_jax.methods.fit import Solver as Solver
from falcon_jax.methods.fit import check_kernel as check_kernel
from falcon_jax.methods.fit import fit as fit
from falcon_jax.methods.fit import relative_error as relative_error
from falcon_jax.methods.ranks import Budget as Budget
from falcon_jax.methods.ranks import Energy as Energy
from falcon_jax.methods.ranks import Rank as Rank
from falcon_jax.methods.ranks import RankMethod as RankMethod
from falcon_jax.methods.registry import get_method as get_method
from falcon_jax.methods.registry import method_names as method_names
from falcon_jax.methods.registry import register as register
from falcon_jax.methods.spatial_decomposition import SpatialDecomposition as SpatialDecomposition
from falcon_jax.methods.tensor_train import TensorTrain as TensorTrain
from falcon_jax.methods.tucker import Tucker as Tucker
from falcon_jax.ops.geometry import ConvSpec as ConvSpec
