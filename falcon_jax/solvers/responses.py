"""Linear maps of low rank between the responses of layers: fits to data, not to kernels."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

Factors = tuple[Array, Array, Array]
State = tuple[Factors, Factors, Array]

# The authors' penalties, and how often each is used.
_PENALTIES = (0.01, 1.0)
_ITERATIONS = 25


@functools.partial(jax.jit, static_argnames=("rank", "centred"))
def reduced_rank_regression(
    responses: Float[Array, "samples p"],
    targets: Float[Array, "samples n"],
    *,
    rank: int,
    centred: bool = True,
) -> tuple[Float[Array, "p rank"], Float[Array, "rank n"], Float[Array, " n"]]:
    """Return the map of a given rank that takes responses nearest to targets.

    ``min || targets - (responses left right + offset) ||^2``. Where responses and targets are the
    same, these are the leading principal components.

    Args:
        responses: what there is.
        targets: what there should be.
        rank: at most ``min(p, n)``.
        centred: whether there is an offset; it is zero if not.

    Returns:
        ``left``, ``right`` with orthonormal rows, and ``offset``.

    Reference:
        Zhang et al.: Accelerating Very Deep Convolutional Networks, TPAMI 2016, Equations 4 to 7
        and 12; Izenman: Reduced-rank regression for the multivariate linear model, 1975.
    """
    return _regression(_whitened(responses, centred), targets, rank, centred)


@functools.partial(jax.jit, static_argnames=("rank", "centred"))
def positive_part_regression(
    responses: Float[Array, "samples p"],
    targets: Float[Array, "samples n"],
    *,
    rank: int,
    centred: bool = True,
) -> tuple[Float[Array, "p rank"], Float[Array, "rank n"], Float[Array, " n"]]:
    """Return the map of a given rank for responses that a ReLU follows.

    ``min || relu(targets) - relu(responses left right + offset) ||^2``, relaxed to
    ``|| relu(targets) - relu(z) ||^2 + c || z - (responses left right + offset) ||^2`` and
    minimised over z and the map in turn, c = 0.01 first and then 1, 25 times each. The map returned
    is the best one seen, `reduced_rank_regression` included.

    Args:
        responses: what there is, before the ReLU.
        targets: what there should be, before the ReLU.
        rank: at most ``min(p, n)``.
        centred: whether there is an offset; it is zero if not.

    Returns:
        As `reduced_rank_regression`.

    Reference:
        Zhang et al.: Accelerating Very Deep Convolutional Networks, TPAMI 2016, Section 3.2.
    """
    whitened = _whitened(responses, centred)
    positive = jax.nn.relu(targets)

    def predicted(factors: Factors) -> Array:
        left, right, offset = factors
        y = _product(_product(responses, left), right)
        return y + jnp.broadcast_to(offset, y.shape)

    def error(factors: Factors) -> Array:
        return jnp.sum((positive - jax.nn.relu(predicted(factors))) ** 2)

    def improve(state: State, penalty: Array) -> tuple[State, None]:
        factors, best, least = state
        z = _auxiliary(predicted(factors), positive, penalty)
        factors = _regression(whitened, z, rank, centred)
        now = error(factors)
        best = jax.tree.map(lambda new, old: jnp.where(now < least, new, old), factors, best)
        return (factors, best, jnp.minimum(now, least)), None

    start = _regression(whitened, targets, rank, centred)
    penalties = jnp.repeat(jnp.array(_PENALTIES, targets.dtype), _ITERATIONS)
    (_, best, _), _ = lax.scan(improve, (start, start, error(start)), penalties)
    return best


def _auxiliary(y: Array, positive: Array, penalty: Array) -> Array:
    """Return the z nearest to ``y`` whose positive part is nearest to ``positive``."""
    below = jnp.minimum(y, 0)
    above = jnp.maximum((penalty * y + positive) / (penalty + 1), 0)
    cost_below = positive**2 + penalty * (below - y) ** 2
    cost_above = (positive - above) ** 2 + penalty * (above - y) ** 2
    return jnp.where(cost_below < cost_above, below, above)


def _whitened(responses: Array, centred: bool) -> tuple[Array, Array, Array]:
    """Return mean, orthonormal coordinates u of the samples, and the map from responses to u."""
    mean = jnp.mean(responses, axis=0) if centred else jnp.zeros_like(responses[0])
    centre = responses - jnp.broadcast_to(mean, responses.shape)
    u, s, vt = jnp.linalg.svd(centre, full_matrices=False)
    # Directions in which the samples do not reach say nothing about the map.
    known = s > s[0] * max(responses.shape) * jnp.finfo(s.dtype).eps
    inverse = jnp.where(known, 1 / jnp.where(known, s, 1), 0)
    u = u * jnp.broadcast_to(known, u.shape)
    return mean, u, vt.T * jnp.broadcast_to(inverse, vt.T.shape)


def _regression(
    whitened: tuple[Array, Array, Array], targets: Array, rank: int, centred: bool
) -> Factors:
    mean, u, to_u = whitened
    middle = jnp.mean(targets, axis=0) if centred else jnp.zeros_like(targets[0])
    coordinates = _product(u.T, targets - jnp.broadcast_to(middle, targets.shape))
    _, vectors = jnp.linalg.eigh(_product(coordinates.T, coordinates))
    right = vectors[:, ::-1][:, :rank].T
    left = _product(to_u, _product(coordinates, right.T))
    return left, right, middle - _product(_product(mean, left), right)
