"""safetensors files: names, bytes, codes, and what does not fit."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx

import falcon_jax as fj
from falcon_jax.frameworks.nnx import arrays
from tests.compression.networks import Small
from tests.export.runtime import as_function, evaluating, images


@pytest.fixture
def model():
    return evaluating(Small(nnx.Rngs(0)))


def test_there_and_back(tmp_path, model):
    file = fj.export.safetensors(model, tmp_path / "m.safetensors")
    content = safetensors.numpy.load_file(file)
    named = arrays(model)
    assert set(content) == {name.replace("/", ".") for name in named}
    for name, array in named.items():
        np.testing.assert_array_equal(content[name.replace("/", ".")], array)
    blank = Small(nnx.Rngs(1))
    loaded = fj.export.load_safetensors(file, blank)
    loaded.eval()
    x = images(2, 8, 8, 3)
    np.testing.assert_array_equal(as_function(loaded)(x), as_function(model)(x))


def test_linen(tmp_path):
    x = images(2, 8, 8, 3)
    module = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Dense(3)])
    bound = module.bind(module.init(jax.random.key(0), x))
    file = fj.export.safetensors(bound, tmp_path / "m.safetensors")
    assert "params.layers_0.kernel" in safetensors.numpy.load_file(file)
    other = module.bind(module.init(jax.random.key(1), x))
    np.testing.assert_array_equal(fj.export.load_safetensors(file, other)(x), bound(x))


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 3])
def test_codes_are_as_small_as_the_report_says(tmp_path, bits):
    model = fj.models.vgg8_cifar(width=0.5, rngs=nnx.Rngs(0))
    small, report = fj.quantize_weights(model, bits=bits)
    file = fj.export.safetensors(small, tmp_path / "m.safetensors", quantization=report)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    statistics = sum(a.size for n, a in arrays(model).items() if n.endswith(("mean", "var")))
    said = 4 * (report.effective_params + statistics)
    assert 0 <= file.stat().st_size - 8 - header - said < len(report.rows)
    loaded = fj.export.load_safetensors(file, model)
    for name, array in arrays(small).items():
        np.testing.assert_array_equal(arrays(loaded)[name], array)


def test_what_does_not_fit(tmp_path, model):
    file = fj.export.safetensors(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        fj.export.load_safetensors(file, Small(nnx.Rngs(0), m=6))
    with pytest.raises(FileNotFoundError, match="no file"):
        fj.export.load_safetensors(tmp_path / "other", model)
    small, report = fj.quantize_weights(model)
    with pytest.raises(ValueError, match="is not what its codes say"):
        fj.export.safetensors(model, file, quantization=report)
    with pytest.raises(ValueError, match=r"give module\.bind\(variables\)"):
        fj.export.safetensors(nn.Dense(3), file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        fj.export.load_safetensors(file, model)
    fj.export.safetensors(small, file, quantization=report)
    damaged = file.read_bytes().replace(b'\\"bits\\": 8', b'\\"bits\\": 9')
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        fj.export.load_safetensors(file, model)
