"""Other people's weights into our models."""

from falcon_jax.convert.assignment import assign as assign
from falcon_jax.convert.checkpoint import convert_file as convert_file
from falcon_jax.convert.falcon import falcon as falcon
from falcon_jax.convert.families import torchvision as torchvision
from falcon_jax.convert.state_dicts import load_torch as load_torch
