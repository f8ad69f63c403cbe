"""BatchNorm after compression: its statistics estimated anew, or its work done by convolutions."""

from collections.abc import Iterable
from typing import Any

from falcon_jax.frameworks import linen_norms, nnx_norms
from falcon_jax.frameworks.interface import M, by_framework
from falcon_jax.frameworks.layers import Inputs


def reestimate_batchnorm(model: M, batches: Iterable[Any]) -> M:
    """Return a copy of a model with the BatchNorm statistics of the given batches.

    ``mean`` and ``var`` are those of all points of all batches together, so that batches may be of
    unequal size. Meanwhile every BatchNorm normalises by the statistics of its batch, whatever the
    model or the call says. No labels are used, and nothing else changes; dropout is off unless the
    call turns it on.

    Args:
        model: an NNX model, or a Linen module bound to its variables (``module.bind(variables)``);
            it is not changed.
        batches: model inputs, a few hundred examples in all: arrays, tuples that are spread over
            the arguments, or `Inputs`.

    Returns:
        The copy; an NNX model in evaluation mode, a Linen module bound.

    Raises:
        ValueError: if there is no batch, the model cannot be called on one, no BatchNorm is
            reached, statistics are not finite, or a Linen module is not bound.

    Warns:
        UserWarning: naming the BatchNorms that no batch reached, and statistics that are not those
            of a BatchNorm of Flax; they stay as they were.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> reestimate_batchnorm(norm, [jnp.array([[1.0], [3.0]])]).mean[...].tolist()
    [2.0]
    """
    reestimate: Any = by_framework(model, nnx_=nnx_norms.reestimate, linen=linen_norms.reestimate)
    return reestimate(model, batches)


def fold_batchnorm(model: M, sample: Any) -> M:
    """Return a copy of a model without the BatchNorms that a convolution can do the work of.

    ``K' = K g / sqrt(v + eps)``, ``b' = (b - m) g / sqrt(v + eps) + beta``

    A BatchNorm is folded if its input is the output of a convolution of Flax, or of one whose
    method can multiply its output channels by a gain (`Method.with_gain`), nothing else uses that
    output, and both are used once. One that normalises by the batch's own statistics in evaluation,
    too, stays, and so do those that change the type. The copy gives what the model gives in
    evaluation mode; it is for deployment or training-free compression, not for further training.

    Args:
        model: an NNX model, or a Linen module bound to its variables; it is not changed.
        sample: what it is called with, arrays or shapes, to see what follows what; a Linen module
            in evaluation mode, such as ``falcon_jax.Inputs(x, train=False)``.

    Returns:
        The copy, with the BatchNorms that were not folded; an NNX model in evaluation mode, a Linen
        module bound.

    Raises:
        ValueError: if the model cannot be called on the sample, the sample is for
            training, or a Linen module is not bound.

    Reference:
        Network Decoupling (Guo et al., BMVC 2018), Section 4.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    >>> model = nnx.Sequential(conv, nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    >>> folded = fold_batchnorm(model, jnp.ones((1, 8, 8, 3)))
    >>> any(isinstance(module, nnx.BatchNorm) for _, module in nnx.iter_modules(folded))
    False
    """
    fold: Any = by_framework(model, nnx_=nnx_norms.fold, linen=linen_norms.fold)
    return fold(model, Inputs.of(sample).shapes)
