"""Whole models: rules, plans, and carrying them out."""

from falcon_jax.compression.batchnorm import reestimate_batchnorm as reestimate_batchnorm
from falcon_jax.compression.compress import compress as compress
from falcon_jax.compression.folding import fold_batchnorm as fold_batchnorm
from falcon_jax.compression.inputs import Inputs as Inputs
from falcon_jax.compression.latency import measure_latency as measure_latency
from falcon_jax.compression.narrowing import narrow as narrow
from falcon_jax.compression.plan import Plan as Plan
from falcon_jax.compression.plan import PlanRow as PlanRow
from falcon_jax.compression.planning import make_plan as make_plan
from falcon_jax.compression.profile import Profile as Profile
from falcon_jax.compression.profile import ProfileRow as ProfileRow
from falcon_jax.compression.profile import profile as profile
from falcon_jax.compression.rules import Rule as Rule
from falcon_jax.compression.storage import load_compressed as load_compressed
from falcon_jax.compression.storage import save_compressed as save_compressed
