"""Any model by a table: torch's outputs, and everything that does not fit."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj


class Net(nnx.Module):
    """A user's own model, with a grouped convolution, a transposed one and a matrix."""

    def __init__(self, rngs):
        self.first = nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=rngs)
        self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.up = nnx.ConvTranspose(6, 5, (2, 3), strides=(2, 3), padding="VALID", rngs=rngs)
        self.line = nnx.Conv(5, 3, (3,), padding="VALID", rngs=rngs)
        self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        x = self.up(self.norm(self.first(x)))
        return self.out(self.line(x.mean(axis=1)))


TABLE = (
    (r"body\.0", "first"),
    (r"body\.1\.(weight|bias|running_mean|running_var)", r"norm"),
    (r"body\.(2)", "up"),
    (r"(line|out)", r"\1"),
)


def weights():
    rng = np.random.default_rng(0)
    shapes = {
        "body.0.weight": (6, 2, 3, 3), "body.0.bias": (6,), "body.1.weight": (6,),
        "body.1.bias": (6,), "body.1.running_mean": (6,), "body.1.running_var": (6,),
        "body.2.weight": (6, 5, 2, 3), "body.2.bias": (5,), "line.weight": (3, 5, 3),
        "line.bias": (3,), "out.weight": (2, 3, 1, 1), "out.bias": (2,),
    }  # fmt: skip
    state = {k: rng.uniform(0.5, 1.5, shape).astype(np.float32) for k, shape in shapes.items()}
    return state | {"body.1.num_batches_tracked": np.asarray(3)}


def test_outputs_are_those_of_torch(torch):
    state = {name: torch.from_numpy(np.asarray(array)) for name, array in weights().items()}
    functional = torch.nn.functional
    x = np.random.default_rng(1).standard_normal((2, 4, 4, 4)).astype(np.float32)
    y = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    y = functional.conv2d(y, state["body.0.weight"], state["body.0.bias"], padding=1, groups=2)
    names = ("running_mean", "running_var", "weight", "bias")
    y = functional.batch_norm(y, *(state[f"body.1.{name}"] for name in names))
    y = functional.conv_transpose2d(y, state["body.2.weight"], state["body.2.bias"], stride=(2, 3))
    y = functional.conv1d(y.mean(dim=2), state["line.weight"], state["line.bias"])
    y = y.transpose(1, 2) @ state["out.weight"][:, :, 0, 0].T + state["out.bias"]
    model = Net(nnx.Rngs(0))
    before = np.asarray(model.out.bias[...])
    state["out.bias"] = torch.nn.Parameter(state["out.bias"].bfloat16())
    filled = fj.convert.assign(model, weights(), TABLE)
    np.testing.assert_allclose(filled(jnp.asarray(x)), y.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(model.out.bias[...], before)
    rounded = fj.convert.assign(model, state, TABLE)
    np.testing.assert_array_equal(rounded.out.bias[...], state["out.bias"].detach().float().numpy())


def test_kernels_of_a_transposed_convolution_that_flax_transposes():
    model = nnx.ConvTranspose(6, 5, (2, 3), transpose_kernel=True, rngs=nnx.Rngs(0))
    kernel = weights()["body.2.weight"]
    state = {"weight": kernel, "bias": weights()["body.2.bias"]}
    filled = fj.convert.assign(model, state, [("weight", "kernel"), ("bias", "bias")])
    np.testing.assert_array_equal(filled.kernel[...], kernel.transpose(2, 3, 1, 0))


def test_rows_with_a_function_without_a_path_and_what_is_kept():
    state = weights() | {"extra.weight": np.zeros(3)}
    del state["line.bias"]
    table = [(r"extra\..*", None), (r"out\.weight", "out/kernel", lambda w: 2 * w[:, :, 0, 0].T)]
    model = Net(nnx.Rngs(0))
    filled = fj.convert.assign(model, state, [*table, *TABLE], keep=[r"line/bias"])
    np.testing.assert_array_equal(filled.out.kernel[...], 2 * state["out.weight"][:, :, 0, 0].T)
    np.testing.assert_array_equal(filled.line.bias[...], model.line.bias[...])


def test_everything_that_does_not_fit_is_told_at_once():
    state = weights()
    del state["body.0.bias"]
    state |= {
        "\x1b[2J": np.zeros(1), "out.weight": np.zeros((3, 3)), "second.bias": np.zeros(2),
        "nowhere.weight": np.zeros(2), "line.bias": np.zeros(3, np.int32),
        "body.1.bias": np.full(6, 1e300), "line.weight": "text",
    }  # fmt: skip
    table = [(r"second", "out"), (r"nowhere", "first/norm"), *TABLE]
    with pytest.raises(ValueError, match="do not fit this Net") as caught:
        fj.convert.assign(Net(nnx.Rngs(0)), state, table)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.strip() for line in lines) == sorted(
        [
            "body.1.bias for norm/bias has numbers too large for float32",
            "line.bias for line/bias is int32 instead of float32",
            "line.weight for line/kernel is str, not an array",
            "nowhere.weight is to go to first/norm, which the model has not",
            "out.weight for out/kernel has shape (3, 3) instead of (3, 2)",
            r"\x1b[2J matches no row of the table",
            "second.bias and out.bias both go to out/bias",
            "first/bias gets no array",
        ]
    )
