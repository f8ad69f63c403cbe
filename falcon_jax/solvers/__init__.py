"""Solvers: trained kernels in, parameters of a method out."""

from falcon_jax.solvers.adamw import AdamWSettings as AdamWSettings
from falcon_jax.solvers.adamw import fit_adamw as fit_adamw
from falcon_jax.solvers.decompositions import cp_als as cp_als
from falcon_jax.solvers.decompositions import tucker2 as tucker2
from falcon_jax.solvers.low_rank import best_low_rank as best_low_rank
from falcon_jax.solvers.low_rank import best_terms as best_terms
from falcon_jax.solvers.low_rank import leading_terms as leading_terms
from falcon_jax.solvers.low_rank import singular_basis as singular_basis
from falcon_jax.solvers.rank_selection import kept_energy as kept_energy
from falcon_jax.solvers.rank_selection import smallest_rank as smallest_rank
from falcon_jax.solvers.rank_selection import vbmf_rank as vbmf_rank
