"""The shared suite, on every method of ours and on one from outside."""

import dataclasses
import sys
import types
from importlib import metadata
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax import testing
from falcon_jax.methods import Cost, Method, registry

METHODS = [
    fj.Falcon(rank=2),
    pytest.param(fj.Falcon(rank=1, impl="gep"), marks=pytest.mark.slow),
    fj.DepthwiseSeparable(rank=2),
    fj.Tucker(rank=(3, 4)),
    fj.CP(rank=3),
    fj.TensorTrain(rank=3),
    pytest.param(fj.TensorTrain(rank=fj.Budget(2.0)), marks=pytest.mark.slow),
    fj.SpatialDecomposition(rank=3),
    pytest.param(
        fj.SpatialDecomposition(rank=3, inner=fj.Decoupled(terms=1)), marks=pytest.mark.slow
    ),
    fj.ChannelDecomposition(rank=3),
    fj.Decoupled(terms=2, order="dw-pw"),
    fj.FilterSummary(ratio=2.0),
    fj.DifferentiableFilterSummary(ratio=2.0),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared(Method):
    """One filter of taps for all channels, as a stranger would write it."""

    name: ClassVar[str] = "shared_taps"

    def supports(self, spec):
        return "it has one group" if spec.feature_group_count > 1 else None

    def init(self, key, spec):
        return {"taps": jnp.ones(spec.kernel_size), "mix": jnp.ones(spec.kernel_shape[-2:])}

    def fit(self, kernel, spec):
        flat = kernel.reshape(spec.taps, -1).astype(jnp.float32)
        scale = jnp.abs(flat).max()
        u, s, vt = jnp.linalg.svd(flat / scale, full_matrices=False)
        taps, mix = u[:, 0].reshape(spec.kernel_size), scale * s[0] * vt[0]
        mix = mix.reshape(spec.kernel_shape[-2:])
        return {"taps": taps.astype(kernel.dtype), "mix": mix.astype(kernel.dtype)}

    def kernel(self, params, spec):
        return params["taps"][..., None, None] * params["mix"][(None,) * len(spec.kernel_size)]

    def apply(self, params, x, spec):
        return fj.ops.conv(x, self.kernel(params, spec), **spec.geometry)

    def cost(self, spec, input_shape):
        params = spec.taps + spec.in_features * spec.out_features
        points = int(np.prod(spec.output_shape(input_shape[:-1])))
        return Cost(params=params, mult_adds=points * params)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method))
@pytest.mark.parametrize("check", testing.METHOD_CHECKS, ids=lambda check: check.__name__)
def test_every_method_passes_the_shared_suite(method, check):
    check(method)


@pytest.mark.parametrize("check", testing.METHOD_CHECKS, ids=lambda check: check.__name__)
def test_a_method_from_outside_passes_too(check):
    fj.methods.register(Shared)
    check(Shared())


def test_a_method_from_outside_compresses_models():
    fj.methods.register(Shared)
    model = nnx.Conv(6, 8, (3, 3), rngs=nnx.Rngs(0))
    plan = fj.make_plan(model, [fj.Rule(method=Shared())], jnp.ones((1, 7, 8, 6)))
    small = fj.compress(model, fj.Plan.from_json(plan.to_json()))
    x = jnp.ones((2, 7, 8, 6))
    expected = testing.standard_conv(x, small.method.kernel(small.params, small.spec), small.spec)
    np.testing.assert_allclose(small(x), expected, atol=1e-5)
    assert fj.profile(small, x).params == plan.after.params == 9 + 48 + 8


def test_installed_packages_bring_methods_by_entry_points(monkeypatch):
    module = types.ModuleType("a_package_of_methods")
    module.Shared = Shared
    monkeypatch.setitem(sys.modules, module.__name__, module)
    point = metadata.EntryPoint("shared_taps", f"{module.__name__}:Shared", registry.ENTRY_POINTS)
    monkeypatch.setattr(
        metadata, "entry_points", lambda **chosen: metadata.EntryPoints([point]).select(**chosen)
    )
    assert "shared_taps" in fj.method_names()
    assert fj.get_method("shared_taps") == Shared()


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (type("Plain", (Method,), {"name": "plain"}), "a frozen dataclass that subclasses Method"),
        (dataclasses.make_dataclass("Falcon2", [], bases=(Shared,), frozen=True), None),
        (
            type("Falcon3", (Shared,), {"name": "falcon"}),
            "is the name of falcon_jax.methods.falcon",
        ),
        (type("Nameless", (Shared,), {"name": ""}), "Nameless needs a name"),
    ],
)
def test_what_is_no_method_is_not_registered(cls, message):
    if message is None:
        assert fj.methods.register(cls) is cls
        return
    with pytest.raises(ValueError, match=message):
        fj.methods.register(cls)


def test_a_tensor_train_is_the_product_of_its_cores():
    spec = fj.ConvSpec(kernel_size=(3, 2), in_features=6, out_features=8)
    kernel = testing._draw(0, *spec.kernel_shape)
    params = {n: testing.float64(v) for n, v in fj.TensorTrain(rank=4).fit(kernel, spec).items()}
    product = np.einsum(
        "ma,iab,jbc,cn->ijmn",
        params["inner"],
        params["axis0"][:, 0],
        params["axis1"][0],
        params["outer"],
    )
    np.testing.assert_allclose(
        fj.TensorTrain(rank=4).kernel(fj.TensorTrain(rank=4).fit(kernel, spec), spec),
        product,
        atol=1e-5,
    )


def test_a_tensor_train_is_as_near_as_tensorlys():
    tensorly = pytest.importorskip("tensorly.decomposition")
    spec = fj.ConvSpec(kernel_size=(3, 3), in_features=8, out_features=10)
    kernel = testing._draw(1, *spec.kernel_shape)
    tensor = testing.float64(kernel).transpose(2, 0, 1, 3)
    theirs = tensorly.tensor_train(tensor, [1, 4, 5, 6, 1]).to_tensor()
    method = fj.TensorTrain(rank=(4, 5, 6))
    ours = testing.float64(method.kernel(method.fit(kernel, spec), spec))
    error = np.linalg.norm(ours.transpose(2, 0, 1, 3) - tensor)
    assert error == pytest.approx(np.linalg.norm(theirs - tensor), rel=1e-4)
    full = fj.TensorTrain(rank="full")
    assert fj.relative_error(kernel, full.kernel(full.fit(kernel, spec), spec)) < 1e-5
