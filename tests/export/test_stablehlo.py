"""StableHLO files, read back by JAX alone."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import falcon_jax as fj
from tests.compression.networks import Small
from tests.export.runtime import as_function, evaluating, images

# What a server runs: neither falcon_jax nor Flax can be imported.
ALONE = """
import pathlib, sys
sys.modules["falcon_jax"] = sys.modules["flax"] = None
import jax, numpy as np
folder = pathlib.Path(sys.argv[1])
function = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
for name in ("small", "large"):
    np.save(folder / f"{name}.out.npy", function.call(np.load(folder / f"{name}.npy")))
"""


def test_jax_alone_runs_it_at_other_sizes(tmp_path):
    sample = images(2, 16, 16, 3)
    model = evaluating(Small(nnx.Rngs(0)))
    small = fj.compress(model, fj.make_plan(model, [fj.Rule(method=fj.Falcon(rank=2))], sample))
    small.eval()
    made = fj.export.stablehlo(small, sample, tmp_path / "model.stablehlo", platforms=("cpu",))
    assert made.inputs == (("batch", "height", "width", 3),) and made.platforms == ("cpu",)
    assert "for cpu" in str(made) and "('batch', 5)" in str(made)
    given = {"small": sample, "large": images(3, 24, 20, 3)}
    for name, x in given.items():
        np.save(tmp_path / f"{name}.npy", x)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)],
        env={"PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for name, x in given.items():
        found = np.load(tmp_path / f"{name}.out.npy")
        np.testing.assert_allclose(found, as_function(small)(x), rtol=1e-4, atol=1e-5)


def test_linen_and_all_platforms(tmp_path):
    x = images(2, 8, 8, 3)
    module = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu])
    variables = module.init(jax.random.key(0), x)
    made = fj.export.stablehlo(module.bind(variables), x, tmp_path / "m.stablehlo")
    assert made.platforms == ("cpu", "cuda", "tpu")
    function = jax.export.deserialize(bytearray(made.path.read_bytes()))
    np.testing.assert_allclose(function.call(x), module.apply(variables, x), rtol=1e-5, atol=1e-6)


def test_bad_input(tmp_path, monkeypatch):
    x, file = images(1, 8, 8, 3), tmp_path / "m.stablehlo"
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        fj.export.stablehlo(lambda x: x, x, tmp_path / "nowhere" / "m")
    with pytest.raises(ValueError, match=r"module\.bind\(variables\)"):
        fj.export.stablehlo(nn.Dense(3), x, file)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r'pip install "falcon-jax\[export\]"'):
        fj.export.stablehlo(lambda x: x, x, file)
    assert not list(tmp_path.iterdir())
