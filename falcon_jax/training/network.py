"""A network as pure functions of plain dictionaries of arrays.

NNX modules are split once, before training: calling jitted functions on a flat dictionary costs a
tenth of what ``nnx.jit`` on a module does.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

Arrays = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Network:
    """The structure of an NNX classifier, without its arrays.

    Attributes:
        train_graph: structure in training mode.
        eval_graph: structure in evaluation mode.
        param_tree: where the parameters go.
        statistic_tree: where BatchNorm statistics and other state go.
        random_tree: where the states of random number generators go.
    """

    train_graph: Any
    eval_graph: Any
    param_tree: Any
    statistic_tree: Any
    random_tree: Any

    @classmethod
    def split(cls, model: nnx.Module) -> tuple["Network", Arrays, Arrays]:
        """Split a model into its structure, its parameters and its statistics.

        Args:
            model: an NNX classifier; it is not changed.

        Returns:
            The structure; parameters and statistics by path.
        """
        model = nnx.clone(model)
        model.train()
        train_graph, params, random, statistics = nnx.split(model, nnx.Param, nnx.RngState, ...)
        model.eval()
        eval_graph = nnx.graphdef(model)
        network = cls(train_graph, eval_graph, *map(_tree, (params, statistics, random)))
        return network, _flat(params), _flat(statistics)

    def changed(self, change: Callable[[nnx.Module], nnx.Module]) -> "Network":
        """Return the structure with its training mode changed, but not the names of its arrays.

        Args:
            change: gets the model in training mode, with arrays that mean nothing, and returns
                another.
        """
        params, statistics = _blank(self.param_tree), _blank(self.statistic_tree)
        random = _random(self.random_tree, jax.random.key(0))
        model = change(nnx.merge(self.train_graph, params, random, statistics))
        graph, params, random, statistics = nnx.split(model, nnx.Param, nnx.RngState, ...)
        return dataclasses.replace(
            self,
            train_graph=graph,
            param_tree=_tree(params),
            random_tree=_tree(random),
            statistic_tree=_tree(statistics),
        )

    def merge(self, params: Arrays, statistics: Arrays) -> nnx.Module:
        """Return a model with these arrays, in evaluation mode."""
        random = _random(self.random_tree, jax.random.key(0))
        return nnx.merge(
            self.eval_graph,
            _unflat(self.param_tree, params),
            random,
            _unflat(self.statistic_tree, statistics),
        )

    def apply(
        self, params: Arrays, statistics: Arrays, x: Float[Array, "b h w c"]
    ) -> Float[Array, "b classes"]:
        """Return logits in evaluation mode."""
        return self.merge(params, statistics)(x)  # type: ignore[operator]

    def apply_training(
        self,
        params: Arrays,
        statistics: Arrays,
        x: Float[Array, "b h w c"],
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, "b classes"], Arrays]:
        """Return logits in training mode, and the new statistics.

        Args:
            params: parameters by path.
            statistics: statistics by path.
            x: images.
            key: of this step's dropout; generators in the model start from it anew every step, so
                that nothing about them needs to be kept.

        Returns:
            Logits and statistics.
        """
        model = nnx.merge(
            self.train_graph,
            _unflat(self.param_tree, params),
            _random(self.random_tree, key),
            _unflat(self.statistic_tree, statistics),
        )
        logits = model(x)  # type: ignore[operator]
        new = nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))
        return logits, _flat(new)


def _tree(state: nnx.State) -> Any:
    return tuple(_flat(state)), jax.tree.structure(state), _random_kinds(state)


def _flat(state: nnx.State) -> Arrays:
    leaves, _ = jax.tree.flatten_with_path(state)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    # The entries without a key are attributes of the variable at the end of the path.
    return "/".join(str(entry.key) for entry in path if hasattr(entry, "key"))


def _unflat(tree: Any, arrays: Arrays) -> nnx.State:
    names, structure, _ = tree
    return jax.tree.unflatten(structure, [arrays[name] for name in names])


def _blank(tree: Any) -> nnx.State:
    names, structure, _ = tree
    return jax.tree.unflatten(structure, [jax.numpy.zeros(())] * len(names))


def _random_kinds(state: nnx.State) -> tuple[bool, ...]:
    """Say of every leaf whether it is a key (or else a counter)."""
    leaves = jax.tree.leaves(state)
    return tuple(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves)


def _random(tree: Any, key: PRNGKeyArray) -> nnx.State:
    _, structure, kinds = tree
    leaves = [
        jax.random.fold_in(key, i) if is_key else jax.numpy.zeros((), jax.numpy.uint32)
        for i, is_key in enumerate(kinds)
    ]
    return jax.tree.unflatten(structure, leaves)
