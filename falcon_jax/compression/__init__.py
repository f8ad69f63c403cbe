"""Whole models: rules, plans, and carrying them out."""

from falcon_jax.compression.autotune import autotune as autotune
from falcon_jax.compression.batchnorm import fold_batchnorm as fold_batchnorm
from falcon_jax.compression.batchnorm import reestimate_batchnorm as reestimate_batchnorm
from falcon_jax.compression.calibration import ResponseError as ResponseError
from falcon_jax.compression.calibration import calibrate as calibrate
from falcon_jax.compression.compress import compress as compress
from falcon_jax.compression.compress import narrow as narrow
from falcon_jax.compression.deployment import deploy as deploy
from falcon_jax.compression.plan import Plan as Plan
from falcon_jax.compression.plan import PlanRow as PlanRow
from falcon_jax.compression.plan import Rule as Rule
from falcon_jax.compression.plan import make_plan as make_plan
from falcon_jax.compression.profile import Profile as Profile
from falcon_jax.compression.profile import ProfileRow as ProfileRow
from falcon_jax.compression.profile import measure_latency as measure_latency
from falcon_jax.compression.profile import profile as profile
from falcon_jax.compression.quantization import Quantization as Quantization
from falcon_jax.compression.quantization import QuantizationRow as QuantizationRow
from falcon_jax.compression.quantization import QuantizedArray as QuantizedArray
from falcon_jax.compression.quantization import quantize_linear as quantize_linear
from falcon_jax.compression.quantization import quantize_weights as quantize_weights
from falcon_jax.frameworks.layers import Inputs as Inputs
