"""Models on disk: compressed ones with their plans, and those that say what they are."""

from falcon_jax.storage.compressed import load_compressed as load_compressed
from falcon_jax.storage.compressed import open_compressed as open_compressed
from falcon_jax.storage.compressed import save_compressed as save_compressed
