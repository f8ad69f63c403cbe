"""Small models with the shapes of trouble that real ones have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.nn.weights import WEIGHTS, draw


def conv(m, n, kernel_size=(3, 3), *, rngs, **options):
    return nnx.Conv(m, n, kernel_size, rngs=rngs, **WEIGHTS, **options)


class OwnConv(nnx.Conv):
    """Acts otherwise than its parent."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Nested(nnx.Module):
    """Convolutions in every kind of container, one of them used twice."""

    def __init__(self, rngs):
        self.stem = conv(3, 4, rngs=rngs)
        self.blocks = nnx.List(
            [
                nnx.List([conv(4, 4, rngs=rngs)]),
                nnx.List([conv(4, 4, (1, 1), rngs=rngs)]),
            ]
        )
        self.sequence = nnx.Sequential(conv(4, 4, strides=2, rngs=rngs), jax.nn.relu)
        self.table = nnx.Dict({"left": conv(4, 4, rngs=rngs), "right": self.blocks[0][0]})
        self.pair = nnx.data((conv(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)))
        self.partial = functools.partial(scaled, conv(4, 4, rngs=rngs), scale=0.5)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.up = nnx.ConvTranspose(4, 4, (2, 2), strides=2, rngs=rngs, **WEIGHTS)
        self.own = OwnConv(4, 4, (3, 3), rngs=rngs, **WEIGHTS)
        self.head = nnx.Linear(4, 5, rngs=rngs, **WEIGHTS)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            for layer in block:
                x = layer(x)
        x = self.sequence(x)
        x = self.table["left"](x) + self.table["right"](x)
        x = self.pair[1](self.pair[0](x))
        x = self.norm(self.partial(x))
        x = self.own(self.up(x))
        return self.head(x.mean(axis=(1, 2)))


def scaled(layer, x, *, scale):
    return scale * layer(x)


class Small(nnx.Module):
    """Convolution, BatchNorm, ReLU, twice, and a dropout."""

    def __init__(self, rngs, m=4, n=4):
        self.conv1 = conv(3, m, rngs=rngs)
        self.norm1 = nnx.BatchNorm(m, momentum=0.9, rngs=rngs)
        self.conv2 = conv(m, n, strides=2, rngs=rngs)
        self.norm2 = nnx.BatchNorm(n, momentum=0.8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(n, 5, rngs=rngs, **WEIGHTS)

    def __call__(self, x):
        x = jax.nn.relu(self.norm1(self.conv1(x)))
        x = jax.nn.relu(self.norm2(self.conv2(x)))
        return self.head(self.dropout(x.mean(axis=(1, 2))))


class Scanned(nnx.Module):
    """Three equal convolutions, one after the other, their kernels stacked."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return conv(4, 4, rngs=rngs)

        self.stem = conv(3, 4, rngs=rngs)
        self.layers = make(rngs)
        self.layers.kernel[...] = draw(3, 3, 3, 4, 4, seed=5) / 6

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return jax.nn.relu(layer(x))

        return run(self.layers, self.stem(x))


class Vmapped(nnx.Module):
    """Three equal convolutions side by side, their kernels stacked."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return conv(4, 4, rngs=rngs)

        self.stem = conv(3, 4, rngs=rngs)
        self.layers = make(rngs)
        self.layers.kernel[...] = draw(3, 3, 3, 4, 4, seed=5) / 6

    def __call__(self, x):
        run = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None), out_axes=0)
        return run(self.layers, self.stem(x)).sum(axis=0)


def randomised(model, seed=0):
    """Give every BatchNorm of a model random scales, offsets and statistics."""
    rng = np.random.default_rng(seed)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            for name, low, high in (("scale", 0.5, 2), ("bias", -1, 1), ("mean", -1, 1)):
                variable = getattr(module, name)
                variable[...] = jnp.asarray(rng.uniform(low, high, variable.shape), jnp.float32)
            module.var[...] = jnp.asarray(rng.uniform(0.5, 2, module.var.shape), jnp.float32)
    model.eval()
    return model


def images(batch=2, side=8, seed=0):
    return draw(batch, side, side, 3, seed=seed)


def arrays(model):
    """Every array of a model by its path, as NumPy arrays."""
    return {
        "/".join(map(str, path)): np.array(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(model))
        if not jnp.issubdtype(leaf[...].dtype, jax.dtypes.prng_key)
    }


@jax.jit
def forward(model, x):
    return model(x)
