"""Other people's weights into our models."""

from falcon_jax.convert.torch_file import load_torch as load_torch
from falcon_jax.convert.torchvision import torchvision as torchvision
