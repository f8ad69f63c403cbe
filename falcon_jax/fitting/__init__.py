"""Solvers: trained kernels in, parameters of a method out."""

from falcon_jax.fitting.adamw import AdamWSettings as AdamWSettings
from falcon_jax.fitting.adamw import fit_adamw as fit_adamw
from falcon_jax.fitting.cp import cp_als as cp_als
from falcon_jax.fitting.energy import kept_energy as kept_energy
from falcon_jax.fitting.energy import smallest_rank as smallest_rank
from falcon_jax.fitting.leading_terms import best_terms as best_terms
from falcon_jax.fitting.leading_terms import leading_terms as leading_terms
from falcon_jax.fitting.low_rank import best_low_rank as best_low_rank
from falcon_jax.fitting.low_rank import singular_basis as singular_basis
from falcon_jax.fitting.tucker import tucker2 as tucker2
from falcon_jax.fitting.vbmf import vbmf_rank as vbmf_rank
