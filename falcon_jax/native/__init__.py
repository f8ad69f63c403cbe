"""Convolutions for CPUs written in C++, an optional extra: models are deployed faster with them."""

from falcon_jax.native.library import build as build
from falcon_jax.native.library import is_built as is_built
