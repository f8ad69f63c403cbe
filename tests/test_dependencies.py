"""What pyproject.toml declares is what the package needs, and computes right."""

import ast
import functools
import pathlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The rooms that a library user imports; the rest may ask for the extra of the training script.
LIBRARY = ("compression", "convert", "frameworks", "methods", "models", "nn", "ops", "solvers")

# Rows of a small product summed over more than 32,768 rows, and a sum that crashed.
PROGRAMS = """
import jax
import jax.numpy as jnp
import numpy as np

rows = np.random.default_rng(0).normal(size=(32769, 3)).astype(np.float32)
squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
np.testing.assert_allclose(np.sum(squares), np.sum(rows.astype(np.float64) ** 2), rtol=1e-5)

a, b = np.random.default_rng(1).normal(size=(2, 3, 1, 2, 2, 8, 8, 8)).astype(np.float32)
sums = jax.jit(lambda a, b: jnp.sum(a * b, axis=3))(a, b)
np.testing.assert_allclose(sums, np.sum(a.astype(np.float64) * b, axis=3), rtol=1e-5, atol=1e-6)
"""


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*extras):
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def imported(folder):
    """The top-level packages imported anywhere below a folder or in a file, ours left out."""
    names = set()
    for path in [folder] if folder.is_file() else folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(str(node.module).split(".")[0])
    return names - set(sys.stdlib_module_names) - {"falcon_jax"}


def test_sums_are_right_without_the_suites_own_flags():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAMS],
        env={"PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_no_python_gets_the_jaxlib_that_computes_wrong_sums(python):
    for name in ("jax", "jaxlib"):
        found = [
            r for r in requirements() if r.name == name and r.marker and holds(r.marker, python)
        ]
        assert len(found) == 1
        assert "0.10.2" not in found[0].specifier
        assert ("0.10.1" if python == "3.11" else "0.12.0.1") in found[0].specifier


def holds(marker: Marker, python: str) -> bool:
    return marker.evaluate({"python_version": python})


# It reads the records of everything that is installed.
packages_distributions = functools.cache(metadata.packages_distributions)


def undeclared(path, *extras):
    declared = {canonical(r.name) for r in requirements(*extras)}
    distributions = packages_distributions()
    return {
        name
        for name in imported(path)
        if not declared & {canonical(d) for d in distributions.get(name, [name])}
    }


@pytest.mark.parametrize(
    ("path", "extras"),
    [
        *((f"falcon_jax/{room}", ()) for room in LIBRARY),
        ("falcon_jax", ("train",)),
        ("train.py", ("train",)),
    ],
)
def test_every_import_is_declared(path, extras):
    assert undeclared(ROOT / path, *extras) == set()


def test_every_import_of_the_tests_is_declared():
    ours = {"benchmarks", "configs", "examples", "tests", "train"}
    of_parity_tests = {"torch", "torchvision"}
    assert undeclared(ROOT / "tests", "train", "test") <= ours | of_parity_tests
