"""The paper's kernel fitting: AdamW on the squared error, as one jitted scan."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.settings import is_number, is_whole

Params = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """How the iterative fit runs.

    The learning rate is divided by ten after each of ``drops`` steps. (The authors' code means to
    do so at 400 and 700 but never does, and it trains only the first depthwise kernel; here every
    parameter is trained.)

    Attributes:
        steps: number of updates; the paper uses 600 to 1,000.
        learning_rate: at the start; the paper uses 0.05 for CIFAR-10 and 0.001 otherwise.
        drops: numbers of steps after which the learning rate falls to a tenth.
        weight_decay: decoupled weight decay, 0.01 as PyTorch's AdamW has it.

    >>> AdamWSettings(steps=1000, learning_rate=0.05).drops
    (400, 700)
    """

    steps: int = 600
    learning_rate: float = 0.001
    drops: tuple[int, ...] = (400, 700)
    weight_decay: float = 0.01

    def __post_init__(self):
        whole = is_whole(self.steps) and all(map(is_whole, self.drops))
        finite = is_number(self.learning_rate) and is_number(self.weight_decay)
        if not whole or not finite or self.steps < 1 or self.learning_rate <= 0:
            raise ValueError(
                "AdamW fitting needs steps >= 1, learning_rate > 0 and a finite weight_decay, and "
                f"whole numbers of steps for drops; got {self}."
            )


def fit_adamw(
    kernel: Float[Array, "*kernel_shape"],
    initial: Params,
    build: Callable[[Params], Float[Array, "*kernel_shape"]],
    settings: AdamWSettings | None = None,
) -> tuple[Params, Float[Array, "steps"]]:
    """Minimise the mean squared error between a kernel and one built from parameters.

    ``min_params mean((kernel - build(params))^2)``

    A pure function: jit it, or vmap it over kernels of equal shape.

    Args:
        kernel: the trained kernel.
        initial: parameters to start from.
        build: makes a kernel of the same shape out of parameters.
        settings: steps, learning rate and its drops; the paper's if not given.

    Returns:
        The fitted parameters and the loss before each step.

    Reference:
        FALCON, Algorithm 1, stage 1, and Section 4.1.3.
    """
    settings = settings or AdamWSettings()
    schedule = optax.piecewise_constant_schedule(
        settings.learning_rate, dict.fromkeys(settings.drops, 0.1)
    )
    optimizer = optax.adamw(schedule, weight_decay=settings.weight_decay)
    target = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    start = jax.tree.map(lambda p: p.astype(target.dtype), initial)

    def loss(params: Params) -> Array:
        return jnp.mean((target - build(params)) ** 2)

    def update(
        carry: tuple[Params, optax.OptState], _: None
    ) -> tuple[tuple[Params, optax.OptState], Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), value

    (params, _), losses = lax.scan(
        update, (start, optimizer.init(start)), None, length=settings.steps
    )
    return jax.tree.map(lambda p: p.astype(kernel.dtype), params), losses
