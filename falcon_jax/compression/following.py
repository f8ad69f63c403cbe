"""What becomes of a layer's answers in a model, and which other answers would be as good.

Below 0, a ReLU says the same of all; and where the largest of a window is taken, the others may be
anything below it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from falcon_jax.frameworks.program import Program, Site


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("gain", "offset"),
    meta_fields=("rectified", "mean", "window", "padding", "pooled"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Following:
    """What comes after a call of a layer.

    ``relu(gain * answer + offset)``, and then the largest of every window, if ``window`` is given

    Attributes:
        gain: per channel.
        offset: per channel.
        rectified: whether there is a ReLU.
        mean: name of the variable that is subtracted from the answer first; None if none is.
        window: points of a pooling's windows, per spatial axis; they do not overlap.
        padding: points before the first window, per spatial axis.
        pooled: variable of the windows' largest.
    """

    gain: Float[Array, " n"]
    offset: Float[Array, " n"]
    rectified: bool
    mean: str | None
    window: tuple[int, ...] | None = None
    padding: tuple[int, ...] | None = None
    pooled: Any = None

    @property
    def alone(self) -> "Following":
        """Return it without what belongs to one program, so that programs are alike."""
        return dataclasses.replace(self, mean=None, pooled=None)


_SAME = ("name", "copy", "optimization_barrier", "convert_element_type")


def following(program: Program, site: Site) -> Following:
    """Return what a model does with a layer's answers in a call, as far as it is certain."""
    plain = Following(
        gain=jnp.ones(site.output_shape[-1]),
        offset=jnp.zeros(site.output_shape[-1]),
        rectified=False,
        mean=None,
    )
    if site.answer.aval.shape != site.output_shape:
        return plain
    at, mean = site.answer, None
    while not (rectified := _rectifying(program, at)):
        users = program.uses(at)
        if len(users) != 1 or not _continues(program, site, users[0], at):
            return dataclasses.replace(plain, mean=mean)
        (user,) = users
        subtracts = user.primitive.name == "sub" and user.invars[0] is at
        if at is site.answer and subtracts and not hasattr(user.invars[1], "val"):
            mean = program.name_of(user.invars[1])
        at = user.outvars[0]
    plain = dataclasses.replace(plain, mean=mean)
    map_of = _affine(program, site, at)
    if map_of is None:
        return plain
    gain, offset = map_of
    found = dataclasses.replace(plain, gain=gain, offset=offset, rectified=True)
    if len(rectified) > 1:
        return found
    return dataclasses.replace(found, **_pooling(program, site, rectified[0].outvars[0]))


def _continues(program: Program, site: Site, user: Any, at: Any) -> bool:
    """Return whether an equation maps every answer by itself, by parameters alone."""
    name = user.primitive.name
    others = [v for v in user.invars if v is not at]
    affine = name in ("add", "sub", "mul") or (name == "div" and user.invars[0] is at)
    return (
        len(user.outvars) == 1
        and len(others) == len(user.invars) - 1
        and user.outvars[0].aval.shape == site.output_shape
        and not any(not hasattr(v, "val") and program.depends_on_data(v) for v in others)
        and (affine or name in _SAME)
    )


def _rectifying(program: Program, at: Any) -> list[Any]:
    """Return the equations that use an array, if each of them is a ReLU."""
    users = program.uses(at)
    for user in users:
        others = [v for v in user.invars if v is not at]
        if user.primitive.name != "max" or len(others) != 1:
            return []
        known = hasattr(others[0], "val") or not program.depends_on_data(others[0])
        if not known or not _is_zero(program, others[0]):
            return []
    return users


def _affine(program: Program, site: Site, at: Any) -> tuple[Array, Array] | None:
    """Return gain and offset from a layer's answers to a variable; None if not per channel."""
    if at is site.answer:
        n = site.output_shape[-1]
        return jnp.ones(n), jnp.zeros(n)
    # One example shows whether all points of a channel are treated alike.
    compute = program.function([at], [site.answer])
    zeros = jnp.zeros(site.output_shape, site.answer.aval.dtype)
    offset, gain = jax.jit(lambda y: jax.jvp(lambda y: compute([y])[0], (y,), (jnp.ones_like(y),)))(
        zeros
    )
    flat = [np.asarray(a, np.float32).reshape(-1, a.shape[-1]) for a in (offset, gain)]
    if any((a != a[:1]).any() for a in flat):
        return None
    return jnp.asarray(flat[1][0]), jnp.asarray(flat[0][0])


def _is_zero(program: Program, atom: Any) -> bool:
    if hasattr(atom, "val"):
        return not np.any(np.asarray(atom.val))
    return not np.any(np.asarray(program.function([atom], [])([])[0]))


def _pooling(program: Program, site: Site, at: Any) -> dict[str, Any]:
    users = program.uses(at)
    axes = len(site.output_shape) - 2
    if len(users) != 1 or users[0].primitive.name != "reduce_window_max":
        return {}
    params = users[0].params
    window = tuple(params["window_dimensions"])
    ones = (1,) * len(window)
    whole = window == tuple(params["window_strides"]) and window[0] == window[-1] == 1
    bare = tuple(params["base_dilation"]) == tuple(params["window_dilation"]) == ones
    if not (whole and bare and axes > 0 and len(window) == axes + 2):
        return {}
    padding = tuple(low for low, _ in params["padding"])
    return {"window": window[1:-1], "padding": padding[1:-1], "pooled": users[0].outvars[0]}


def intervals(
    answers: Float[Array, "b points n"],
    after: Following,
    now: Following,
    largest: Float[Array, "b points n"] | None,
    inside: Bool[Array, "b points"] | None,
) -> tuple[Float[Array, "b points n"], Float[Array, "b points n"]]:
    """Return the least and the largest answers after which a model says the same.

    Args:
        answers: of the original layer, at some points.
        after: what the original does with them.
        now: what the compressed model does with them.
        largest: of the windows around the points, as `largest_around` says; None without pooling.
        inside: whether the points are in a window.
    """
    if not (after.rectified and now.rectified):
        return answers, answers
    exact = answers
    seen = answers * after.gain[None, None] + after.offset[None, None]
    best = jnp.maximum(seen, 0) if largest is None else largest
    inside = jnp.ones(answers.shape[:2], bool) if inside is None else inside
    # Of two computations of the same number, one may be larger by rounding.
    wins = (seen > 0) & (seen >= best * (1 - 1e-5))
    upper = jnp.where(inside[..., None], jnp.where(wins, seen, best), jnp.inf)
    lower = jnp.where(wins & inside[..., None], seen, -jnp.inf)
    gain, offset = now.gain[None, None], now.offset[None, None]
    moves = gain != 0

    def back(bound: Array) -> Array:
        return jnp.where(moves, (bound - offset) / jnp.where(moves, gain, 1), bound)

    low, high = back(lower), back(upper)
    low, high = jnp.where(gain < 0, high, low), jnp.where(gain < 0, low, high)
    low, high = jnp.where(moves, low, -jnp.inf), jnp.where(moves, high, jnp.inf)
    same = jnp.array_equal(after.gain, now.gain) & jnp.array_equal(after.offset, now.offset)
    alone = wins & inside[..., None] & moves & same
    return jnp.where(alone, exact, low), jnp.where(alone, exact, high)


def largest_around(
    chosen: Int[Array, "b points"],
    spatial: tuple[int, ...],
    after: Following,
    pooled: Float[Array, "b *windows n"],
) -> tuple[Float[Array, "b points n"], Bool[Array, "b points"]]:
    """Return the largest answer of every point's window, and whether it is in one.

    Args:
        chosen: the points, in row-major order.
        spatial: sizes of the answers' spatial axes.
        after: what the original does with its answers, a pooling at the end.
        pooled: the largest of every window.
    """
    assert after.window is not None and after.padding is not None
    sizes = pooled.shape[1:-1]
    at = jnp.zeros_like(chosen)
    inside = jnp.ones(chosen.shape, bool)
    places = jnp.unravel_index(chosen, spatial)
    for place, window, padding, size in zip(
        places, after.window, after.padding, sizes, strict=True
    ):
        index = (place + padding) // window
        inside = inside & (index < size)
        at = at * size + jnp.minimum(index, size - 1)
    flat = pooled.reshape(pooled.shape[0], -1, pooled.shape[-1])
    return jnp.take_along_axis(flat, at[..., None], axis=1), inside
