import subprocess
import sys

import pytest

import falcon_jax as fj

NAMES = [
    "AdamWSettings", "BatchNorm", "ConvSpec", "Cost", "DepthwiseConv", "DepthwiseSeparable",
    "DepthwiseSeparableConv", "Falcon", "FalconConv", "Plan", "Profile", "Rule", "autotune",
    "compress", "deploy", "depthwise_conv", "fit", "gep", "get_method", "linen", "make_plan",
    "models", "profile", "reestimate_batchnorm", "separable_conv",
]  # fmt: skip
MODELS = ["resnet18_cifar", "resnet34_cifar", "vgg16_cifar", "vgg19_cifar"]


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    assert hasattr(fj, name)


def test_names_inside_namespaces():
    assert callable(fj.FalconConv.from_conv)
    assert hasattr(fj.linen, "FalconConv")
    assert hasattr(fj.linen, "DepthwiseSeparableConv")
    for name in MODELS:
        assert callable(getattr(fj.models, name))


def test_importing_sets_no_flag_and_brings_in_nothing_heavy():
    script = """
import sys
import flax.linen, flax.nnx, jax, optax
before = dict(jax.config.values)
import falcon_jax
changed = {k for k, v in jax.config.values.items() if before.get(k, v) != v}
heavy = {"tensorflow", "tensorflow_datasets", "sklearn", "matplotlib", "tensorboardX", "torch"}
print(sorted(changed), sorted(heavy & set(sys.modules)))
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == "[] []"
