"""Small Linen modules with the shapes of trouble that real ones have."""

import functools

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import falcon_jax as fj


class Block(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    features: int = 4

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train)(x))


JITTED = nn.jit(Block, static_argnums=2)


class Setup(nn.Module):
    """Submodules defined in setup, in lists and dicts, one of them used twice."""

    def setup(self):
        self.stem = nn.Conv(4, (3, 3))
        self.blocks = [Block(), nn.Sequential([nn.Conv(4, (1, 1)), nn.relu, nn.Conv(4, (3, 3))])]
        self.table = {"left": nn.Conv(4, (3, 3)), "unused": nn.Conv(4, (3, 3))}
        self.head = nn.Dense(5)

    def __call__(self, x, train=True):
        x = self.blocks[1](self.blocks[0](self.stem(x), train))
        x = self.table["left"](nn.relu(self.table["left"](x)))
        return self.head(x.mean((1, 2)))


class Compact(nn.Module):
    """Submodules named by Flax, as most models have them; strides, groups, dilation, dropout."""

    @nn.compact
    def __call__(self, x, train=True):
        x = Block()(nn.Conv(4, (5, 5), strides=2)(x), train)
        x = nn.Conv(8, (3, 3), feature_group_count=2, kernel_dilation=2, name="grouped")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(5)(x.mean((1, 2)))


class Lifted(nn.Module):
    """Blocks under jit, remat, scan and vmap."""

    @nn.compact
    def __call__(self, x, train=True):
        x = JITTED()(nn.Conv(4, (3, 3))(x), train)
        x = nn.remat(Block, static_argnums=2)()(x, train)
        scanned = nn.scan(
            lambda block, carry, _: (block(carry, train), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = scanned(Block(name="scanned"), x, None)
        side_by_side = nn.vmap(
            nn.Conv,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        x = side_by_side(4, (3, 3), name="vmapped")(x).sum(0)
        return nn.Dense(5)(x.mean((1, 2)))


NETWORKS = {"setup": Setup, "compact": Compact, "lifted": Lifted}


def inputs(batch=2, side=8, *, train=False):
    x = np.random.default_rng(0).normal(size=(batch, side, side, 3)).astype(np.float32)
    return fj.Inputs(x, train=train)


def drawn(module, example=None, seed=0):
    """Return variables of a module, all random, so that no BatchNorm hides what comes before."""
    example = inputs() if example is None else example
    variables = jax.eval_shape(
        functools.partial(module.init, **example.kwargs),
        {"params": jax.random.key(0), "dropout": jax.random.key(0)},
        *example.args,
    )
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1] in ("scale", "var"):
            return rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
        return (rng.normal(size=leaf.shape) / 4).astype(np.float32)

    flat = {path: draw(path, leaf) for path, leaf in flatten_dict(variables).items()}
    return unflatten_dict(flat)


def shapes(variables):
    return {path: leaf.shape for path, leaf in flatten_dict(variables, sep="/").items()}
