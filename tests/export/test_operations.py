"""Operations one by one: what onnxruntime computes is what JAX does, sizes open and fixed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import falcon_jax as fj
from tests.export.runtime import exported, images

X = images(2, 6, 8, 4)
ENTRYWISE = {
    "abs": jnp.abs,
    "arctan": jnp.arctan,
    "arithmetic": lambda x: (x + 1) * 2 - x / 3,
    "cbrt": jnp.cbrt,
    "ceil": jnp.ceil,
    "clip": lambda x: jnp.clip(x, -0.5, 0.25),
    "compare": lambda x: (x > 0.1) & ~(x >= 0.5) | (x == 0),
    "elu": jax.nn.elu,
    "erfc": lax.erfc,
    "exp2": jnp.exp2,
    "floor": jnp.floor,
    "gelu": jax.nn.gelu,
    "hard_swish": jax.nn.hard_swish,
    "integers": lambda x: (x * 10).astype(jnp.int32) // 3,
    "isfinite": lambda x: jnp.isfinite(1 / jnp.where(x > 0, 0.0, x)),
    "leaky": jax.nn.leaky_relu,
    "log": lambda x: jnp.log1p(jnp.abs(x)) + jnp.expm1(x),
    "mish": jax.nn.mish,
    "ne": lambda x: x != 0.5,
    "power": lambda x: x**3 + jnp.abs(x) ** 0.5 + x**2,
    "relu6": jax.nn.relu6,
    "rem": lambda x: lax.rem(x, jnp.full_like(x, 0.3)),
    "round": jnp.round,
    "rsqrt": lambda x: lax.rsqrt(x * x + 1),
    "sigmoid": jax.nn.sigmoid,
    "sign": jnp.sign,
    "silu": jax.nn.silu,
    "softmax": jax.nn.softmax,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
    "trigonometry": lambda x: jnp.sin(x) * jnp.cos(x),
    "where": lambda x: jnp.where(x > 0, x, -2.0),
}
MOVED = {
    "argmax": lambda x: jnp.argmax(x, axis=-1),
    "broadcast": lambda x: x + jnp.arange(4.0)[None, None, None],
    "concatenate": lambda x: jnp.concatenate([x, 2 * x, jnp.ones((*x.shape[:3], 1))], axis=-1),
    "cumsum": lambda x: jnp.cumsum(x, axis=1) + jnp.cumsum(x, axis=2)[:, :, ::-1],
    "flip": lambda x: x[:, ::-1, :, ::-1],
    "gather": lambda x: jnp.take(x, jnp.array([3, 0, 0]), axis=-1),
    "gather_two": lambda x: x[:, jnp.array([[0, 2], [1, 1]]), :, jnp.array([3, 0])],
    "index": lambda x: x[:, 2, 1:5, -1],
    "iota": lambda x: x * jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None, None],
    "max_min": lambda x: x.max(axis=3) - x.min(axis=(1, 2))[:, None, None, 0],
    "mean": lambda x: x.mean(axis=(1, 2), keepdims=True) + x.mean(),
    "none": lambda x: x,
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 3), (0, 0)), constant_values=0.5),
    "pad_inside": lambda x: lax.pad(x, 1.0, ((0, 0, 0), (1, -1, 2), (-1, 2, 1), (0, 0, 0))),
    "reflect": lambda x: jnp.pad(x, ((0, 0), (2, 2), (1, 1), (0, 0)), mode="reflect"),
    "repeat": lambda x: jnp.repeat(x, 2, axis=-1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "reshape_apart": lambda x: x.reshape(*x.shape[:3], 2, 2).swapaxes(3, 4).reshape(x.shape),
    "rows": lambda x: x.reshape(-1, x.shape[-1]),
    "shuffle": lambda x: fj.models.channel_shuffle(x, 2),
    "sort": lambda x: jnp.sort(x, axis=-1),
    "split": lambda x: jnp.split(x, 2, axis=-1),
    "squeeze": lambda x: x[:, :1].squeeze(1)[..., None],
    "stack": lambda x: jnp.stack([x, -x], axis=1),
    "strides": lambda x: x[..., ::2],
    "sum": lambda x: x.sum(axis=1) + x.prod(axis=3, keepdims=True)[:, 0],
    "tile": lambda x: jnp.tile(x, (1, 1, 1, 3)),
    "top_k": lambda x: lax.top_k(x, 2),
    "transpose": lambda x: x.transpose(0, 3, 1, 2),
    "wrap": lambda x: jnp.pad(x, ((0, 0), (1, 1), (2, 2), (0, 0)), mode="wrap"),
}
PRODUCTS = {
    "matmul": lambda x: x @ jnp.asarray(images(4, 3)),
    "matmul_left": lambda x: jnp.asarray(images(3, 6)) @ x[:, :, 0] if x.shape[1] == 6 else x,
    "batched": lambda x: jnp.einsum("bhwc,bhvc->bhwv", x, x),
    "attention": lambda x: jax.nn.softmax(jnp.einsum("bhwc,bhvc->bhwv", x, x) / 2) @ x,
    "outer": lambda x: jnp.einsum("bhwc,bhwd->bcd", x, x),
    "conv": lambda x: conv(x, 3, 5),
    "conv_transposed": lambda x: lax.conv_transpose(x, images(3, 3, 4, 5), (2, 2), "SAME"),
    "conv_groups": lambda x: conv(x, 3, 6, feature_group_count=2),
    "conv_dilated": lambda x: conv(x, 3, 5, rhs_dilation=(2, 1)),
    "conv_apart": lambda x: conv(
        x, 3, 5, lhs_dilation=(2, 3), window_strides=(2, 1), padding=((1, 0), (0, 2))
    ),
    "conv_same": lambda x: conv(x, 3, 5, window_strides=(2, 2), padding="SAME"),
    "conv_same_lower": lambda x: conv(x, 4, 5, window_strides=(1, 1), padding="SAME_LOWER"),
    "conv_pads": lambda x: conv(x, 3, 5, padding=((2, 0), (-1, 3))),
    "max_pool": lambda x: nnx.max_pool(x, (2, 3), (2, 1), "SAME"),
    "min_pool": lambda x: nnx.min_pool(x, (2, 2), (2, 2)),
    "avg_pool": lambda x: nnx.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))),
    "avg_pool_valid": lambda x: nnx.avg_pool(
        x, (3, 3), (2, 2), ((1, 1), (1, 1)), count_include_pad=False
    ),
    "max_pool_2x2": fj.ops.max_pool_2x2,
    "channels": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 1, 1, 2), (1, 1, 1, 2), "VALID"
    ),
    "bilinear": lambda x: resize(x, 2, "bilinear"),
    "nearest": lambda x: resize(x, 3, "nearest"),
    "cubic": lambda x: resize(x, 2, "cubic"),
    "smaller": lambda x: jax.image.resize(x, (x.shape[0], 3, 5, 4), "bilinear"),
}


def conv(x, size, n, **options):
    m = x.shape[-1] // options.get("feature_group_count", 1)
    options = {"window_strides": (1, 1), "padding": "VALID", **options}
    kernel = jnp.asarray(images(size, size, m, n))
    return lax.conv_general_dilated(
        x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def resize(x, factor, method):
    b, h, w, c = x.shape
    return jax.image.resize(x, (b, factor * h, factor * w, c), method)


@pytest.mark.parametrize("name", ENTRYWISE)
def test_entry_by_entry(tmp_path, name):
    """Whatever the order in which the entries lie: after a convolution, channels are first."""

    def after_conv(x):
        return ENTRYWISE[name](conv(x, 1, 4))

    exported(tmp_path, after_conv, X, others=[(images(3, 5, 4, 4),)])


@pytest.mark.parametrize("name", {**MOVED, **PRODUCTS})
def test_with_sizes_fixed_but_for_the_batch(tmp_path, name):
    function = {**MOVED, **PRODUCTS}[name]
    made = exported(tmp_path, function, X, open_sizes=())
    assert made.inputs == {"x": X.shape}
    other = images(3, 6, 8, 4)
    exported(
        tmp_path, lambda x: function(conv(x, 1, 4)), X, others=[(other,)], open_sizes=("batch",)
    )


@pytest.mark.parametrize("name", sorted({*MOVED, *PRODUCTS} - {"matmul_left", "smaller", "wrap"}))
def test_with_an_open_image_size(tmp_path, name):
    function = {**MOVED, **PRODUCTS}[name]
    others = [(images(3, 9, 10, 4),), (images(1, 11, 8, 4),)]
    made = exported(tmp_path, lambda x: function(conv(x, 1, 4)), X, others=others)
    assert made.inputs == {"x": ("batch", "height", "width", 4)} and not made.fixed


def test_what_resizes_is_a_resize(tmp_path):
    for name in ("bilinear", "nearest", "cubic"):
        assert exported(tmp_path, PRODUCTS[name], X).nodes["Resize"] == 1


def test_loops_and_branches(tmp_path):
    def scanned(x):
        def step(state, row):
            state = jnp.tanh(state + row @ jnp.full((4, 4), 0.1))
            return state, state * 2

        last, rows = lax.scan(step, jnp.zeros_like(x[:, 0, 0]), x[:, 0].swapaxes(0, 1))
        _, back = lax.scan(step, last, x[:, 1].swapaxes(0, 1), reverse=True)
        return last, rows, back

    def counted(x):
        return lax.fori_loop(0, 5, lambda i, y: y * 0.5 + i, x)

    def powers(x):
        return lax.scan(lambda y, _: (y * 0.5, y.sum()), x, None, length=4)

    def halved(x):
        return lax.while_loop(lambda y: jnp.abs(y).max() > 0.01, lambda y: y / 2, x)

    def branched(x):
        return lax.cond(x.sum() > 0, jnp.sin, lambda x: x * 2, x)

    def switched(x):
        which = (x[0, 0, 0, 0] * 100).astype(jnp.int32)
        return lax.switch(which, [jnp.sin, jnp.cos, lambda x: -x], x)

    made = exported(tmp_path, scanned, X, others=[(images(3, 6, 5, 4),)])
    assert made.nodes["Scan"] == 2
    for function in (counted, powers, halved, branched, switched):
        exported(tmp_path, function, X, others=[(-X,), (X / 500,)])


def test_indices_that_are_computed(tmp_path):
    table = jnp.asarray(images(7, 3))

    def embedded(i):
        return table[i], jnp.take(table, i + 5, axis=0, mode="clip"), table.at[i + 5].get()

    exported(tmp_path, embedded, np.array([[0, 3], [6, 1]], np.int32))

    def window(x, i):
        return lax.dynamic_slice_in_dim(x, i[0], 3, axis=2), x[:, i[1]]

    others = [(X, np.array([7, 3], np.int32)), (X, np.array([-2, -1], np.int32))]
    exported(tmp_path, window, X, np.array([1, 0], np.int32), others=others, open_sizes=())


@pytest.mark.parametrize("axes", [1, 3])
def test_other_numbers_of_spatial_axes(tmp_path, axes):
    layer = nnx.Conv(3, 4, (3,) * axes, strides=2, rngs=nnx.Rngs(0))
    pool = functools.partial(nnx.max_pool, window_shape=(2,) * axes, strides=(2,) * axes)
    sample, other = images(2, *(8,) * axes, 3), images(1, *(10,) * axes, 3)
    made = exported(tmp_path, lambda x: pool(layer(x)), sample, others=[(other,)])
    assert made.nodes["Conv"] == made.nodes["MaxPool"] == 1
    named = ("length",) if axes == 1 else ("depth", "height", "width")
    assert made.inputs["x"] == ("batch", *named, 3)


def test_other_types(tmp_path):
    exported(tmp_path, lambda x: x * 2 + 1, X.astype(np.float16))
    exported(
        tmp_path,
        lambda x: (x.astype(jnp.float32) / 255).mean(axis=(1, 2)),
        np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3),
    )
