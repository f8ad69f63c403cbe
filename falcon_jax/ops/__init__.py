"""Convolutions as plain functions on channels-last arrays."""

from falcon_jax.ops.convolution import conv as conv
from falcon_jax.ops.convolution import conv_on_small_maps as conv_on_small_maps
from falcon_jax.ops.convolution import max_pool_2x2 as max_pool_2x2
from falcon_jax.ops.depthwise import depthwise_conv as depthwise_conv
from falcon_jax.ops.geometry import output_shape as output_shape
from falcon_jax.ops.normalization import normalize_batch as normalize_batch
from falcon_jax.ops.separable import (
    depthwise_then_pointwise as depthwise_then_pointwise,
)
from falcon_jax.ops.separable import pointwise_conv as pointwise_conv
from falcon_jax.ops.separable import (
    pointwise_then_depthwise as pointwise_then_depthwise,
)
from falcon_jax.ops.separable import (
    separable_conv as separable_conv,
)
