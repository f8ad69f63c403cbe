"""A model's call as a list of equations: what reaches its layers, and what they answer.

Jitted, checkpointed and scanned parts that call a layer are written out, so that everything between
two layers can be computed by itself. A `Network` is a model of either framework as its variables by
name and the program that they take part in.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from falcon_jax.frameworks.interface import Model, by_framework
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.linen import intercepted_jaxpr, unbound
from falcon_jax.frameworks.nnx import ModuleCall, arrays, jaxpr_through, with_arrays
from falcon_jax.frameworks.tracing import (
    CALLS,
    bind,
    inner_jaxprs,
    mark_answer,
    mark_input,
    mark_kernel,
    read_mark,
    scan_parts,
)
from falcon_jax.nn.method_conv import MethodConv

Known = Mapping[Any, Array]
Pure = Callable[[Mapping[str, Array], Sequence[Array]], list[Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One call of a layer, as variables of a program.

    Attributes:
        path: of the layer.
        kernel: its kernel, or another parameter of it; mapped axes first, then one.
        input: what it gets, likewise.
        output: what it gives, likewise.
        answer: what it gives, as what follows uses it.
        input_shape: without mapped axes.
        output_shape: without mapped axes.
        start: position in the program before which nothing depends on the layer.
    """

    path: str
    kernel: Any
    input: Any
    output: Any
    answer: Any
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    start: int


class Program:
    """A model's call as a list of equations.

    Args:
        closed: jaxpr of the call, with layers marked.
        names: of its first inputs, the variables.
        values: of the variables, by name, as they are when something is computed.
    """

    def __init__(self, closed: Any, names: Sequence[str], values: Mapping[str, Any]):
        flat = _written_out(closed)
        self.values = values
        self.eqns: list[Any] = list(flat.jaxpr.eqns)
        self._names = dict(zip(flat.jaxpr.invars, names, strict=False))
        self.inputs = tuple(flat.jaxpr.invars[len(names) :])
        self._constants = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
        self._maker = {v: i for i, eqn in enumerate(self.eqns) for v in eqn.outvars}
        self._dynamic = set(self.inputs)
        for eqn in self.eqns:
            if any(v in self._dynamic for v in _variables(eqn.invars)):
                self._dynamic.update(eqn.outvars)
        self.outputs = tuple(_variables(flat.jaxpr.outvars))
        self.sites = tuple(_sites(self.eqns))
        self.hidden = tuple(dict.fromkeys(_hidden(self.eqns)))
        self._compiled: dict[Any, Any] = {}

    def start(self, arrays: Sequence[Any]) -> dict[Any, Array]:
        """Return the state before the first equation, of a batch of inputs."""
        return {v: jnp.asarray(a) for v, a in zip(self.inputs, arrays, strict=True)}

    def depends_on_data(self, variable: Any) -> bool:
        """Return whether a variable is more than parameters and constants."""
        return variable in self._dynamic

    def name_of(self, variable: Any) -> str | None:
        """Return the name of a variable of the model that is used as it is, or reshaped."""
        while variable in self._maker:
            eqn = self.eqns[self._maker[variable]]
            if eqn.primitive.name not in ("broadcast_in_dim", "reshape", "copy", "squeeze"):
                return None
            variable = eqn.invars[0]
        return self._names.get(variable)

    def used_once(self, name: str) -> bool:
        """Return whether a variable of the model, as it is, is used by one equation only."""
        (variable,) = (v for v, known in self._names.items() if known == name)
        return sum(v is variable for eqn in self.eqns for v in eqn.invars) == 1

    def uses(self, variable: Any) -> list[Any]:
        """Return the equations that use a variable, but for the notes of marks.

        None are returned of what the model gives, which is used for more than these.
        """
        if variable in self.outputs:
            return []
        return [
            eqn
            for eqn in self.eqns
            if any(v is variable for v in eqn.invars) and not self._is_note(eqn)
        ]

    def _is_note(self, eqn: Any) -> bool:
        (out,) = eqn.outvars if len(eqn.outvars) == 1 else (None,)
        users = [e for e in self.eqns if any(v is out for v in e.invars)]
        marks = [read_mark(user) for user in users]
        return bool(marks) and all(m is not None and m[0] in ("flat", "input") for m in marks)

    def frontier(self, position: int, wanted: Iterable[Any]) -> tuple[Any, ...]:
        """Return what must be known before an equation to compute variables from there on."""
        seen: dict[Any, None] = {}
        stack = list(wanted)
        done = set()
        while stack:
            variable = stack.pop()
            if variable in done or variable not in self._dynamic:
                continue
            done.add(variable)
            maker = self._maker.get(variable, -1)
            if maker < position:
                seen[variable] = None
            else:
                stack += _variables(self.eqns[maker].invars)
        return tuple(seen)

    def compute(
        self,
        wanted: Sequence[Any],
        state: Known,
        values: Mapping[str, Any] | None = None,
    ) -> list[Array]:
        """Return variables, from a state and the model's variables.

        Args:
            wanted: what to compute.
            state: variables that are known.
            values: in place of the model's.
        """
        known = tuple(v for v in state if v in self._reach(wanted, state))
        key = tuple(wanted), known
        if key not in self._compiled:
            self._compiled[key] = jax.jit(self._function(tuple(wanted), known))
        values = self.values if values is None else values
        named = {n: values[n] for n in self._needed_names(wanted, known)}
        return self._compiled[key](named, [state[v] for v in known])

    def _reach(self, wanted: Iterable[Any], state: Iterable[Any]) -> set[Any]:
        stop, seen, stack = set(state), set(), list(wanted)
        while stack:
            variable = stack.pop()
            if variable in seen:
                continue
            seen.add(variable)
            if variable not in stop and variable in self._maker:
                stack += _variables(self.eqns[self._maker[variable]].invars)
        return seen

    def _needed_names(self, wanted: Iterable[Any], known: Iterable[Any]) -> list[str]:
        reach = self._reach(wanted, known)
        return sorted(name for v, name in self._names.items() if v in reach)

    def sensitivity(self, key: PRNGKeyArray) -> Pure:
        """Return a function that says how much outputs change with answers of layers.

        ``||d (r . outputs) / d y||^2`` over the channels of an answer y, point by point, r drawn
        at random: a layer's error is felt at the output by as much, to first order. Of every
        call of a layer in turn.

        Args:
            key: for r.
        """
        answers = tuple(site.answer for site in self.sites)
        outputs = [v for v in self.outputs if jnp.issubdtype(v.aval.dtype, jnp.floating)]
        run = self._function(tuple(outputs), self.inputs, answers)

        def squares(named: Mapping[str, Array], arrays: Sequence[Array]) -> list[Array]:
            def felt(added: list[Array]) -> Array:
                total = jnp.zeros(())
                for index, value in enumerate(run(named, arrays, added)):
                    drawn = jax.random.normal(jax.random.fold_in(key, index), value.shape)
                    total += jnp.sum(drawn * value.astype(jnp.float32))
                return total

            zeros = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in answers]
            gradients = jax.grad(felt)(zeros)
            return [jnp.sum(jnp.square(g.astype(jnp.float32)), -1) for g in gradients]

        return squares

    def function(self, wanted: Sequence[Any], known: Sequence[Any]) -> Any:
        """Return a function of known arrays (a list) that gives the wanted ones."""
        return functools.partial(self.pure(wanted, known), self.variables(wanted, known))

    def pure(self, wanted: Sequence[Any], known: Sequence[Any]) -> Pure:
        """Return a function of the model's variables by name, and of known arrays.

        Args:
            wanted: what it returns.
            known: what it is given.
        """
        return self._function(tuple(wanted), tuple(known))

    def variables(self, wanted: Iterable[Any], known: Iterable[Any]) -> dict[str, Array]:
        """Return the model's variables, by name, that are needed for it."""
        return {name: self.values[name] for name in self._needed_names(wanted, known)}

    def _function(
        self, wanted: tuple[Any, ...], known: tuple[Any, ...], changed: tuple[Any, ...] = ()
    ) -> Any:
        reach = self._reach(wanted, known)
        # Of what is known already, the equations are not needed.
        makers = {self._maker[v] for v in reach - set(known) if v in self._maker}
        eqns = [self.eqns[index] for index in sorted(makers)]
        inputs = {v: n for v, n in self._names.items() if v in reach}

        def run(
            named: Mapping[str, Array], arrays: Sequence[Array], added: Sequence[Array] = ()
        ) -> list[Array]:
            changes = dict(zip(changed, added, strict=True))
            env: dict[Any, Any] = dict(self._constants)
            env |= {v: named[n] for v, n in inputs.items()} | dict(zip(known, arrays, strict=True))
            for eqn in eqns:
                _bind(eqn, env)
                for v in eqn.outvars:
                    if v in changes:
                        env[v] = env[v] + changes[v]
            return [_value(env, v) for v in wanted]

        return run


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [v for v in atoms if not hasattr(v, "val")]


def _value(env: Mapping[Any, Any], atom: Any) -> Any:
    return atom.val if hasattr(atom, "val") else env[atom]


def _bind(eqn: Any, env: dict[Any, Any]) -> None:
    made = bind(eqn.primitive, eqn.params, [_value(env, v) for v in eqn.invars])
    env.update(zip(eqn.outvars, made, strict=True))


def _written_out(closed: Any) -> Any:
    """Return a jaxpr with calls, and scans that call a layer, replaced by what they do."""

    def run(*args: Array) -> list[Array]:
        return _run(closed.jaxpr, closed.consts, args)

    return jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.in_avals))


def _run(jaxpr: Any, constants: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env = dict(zip(jaxpr.constvars, constants, strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        inner = [v for v in eqn.params.values() if inner_jaxprs(v)]
        name = eqn.primitive.name
        # A derivative of one's own is lost with the call that it belongs to.
        whole = name.startswith("custom_vjp") and not any(
            any(_marks(j)) for j in inner_jaxprs(inner)
        )
        if name in CALLS and len(inner) == 1 and not whole:
            given = [_value(env, v) for v in eqn.invars]
            made = _run(*_open(inner[0]), given)
            env.update(zip(eqn.outvars, made, strict=True))
        elif name == "scan" and any(_marks(*inner_jaxprs(inner[0]))):
            given = [_value(env, v) for v in eqn.invars]
            env.update(zip(eqn.outvars, _steps(eqn, *_open(inner[0]), given), strict=True))
        else:
            _bind(eqn, env)
    return [_value(env, v) for v in jaxpr.outvars]


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    constants = getattr(jaxpr, "consts", ())
    return (jaxpr if hasattr(jaxpr, "eqns") else jaxpr.jaxpr), constants


def _steps(eqn: Any, body: Any, constants: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """Return what a scan gives, step by step."""
    fixed, carried = scan_parts(eqn.invars, eqn.outvars, body)
    carry, stacks = list(given[fixed : fixed + carried]), given[fixed + carried :]
    length = int(eqn.params["length"])
    steps = range(length - 1, -1, -1) if eqn.params["reverse"] else range(length)
    kept: dict[int, list[Any]] = {}
    for step in steps:
        each = [lax.index_in_dim(stack, step, keepdims=False) for stack in stacks]
        made = _run(body, constants, [*given[:fixed], *carry, *each])
        carry, kept[step] = made[:carried], made[carried:]
    return carry + [
        jnp.stack([kept[step][i] for step in range(length)])
        for i in range(len(eqn.outvars) - carried)
    ]


def _marks(jaxpr: Any) -> Iterator[str]:
    """Yield the paths of the layers that a jaxpr calls."""
    for eqn in jaxpr.eqns:
        mark = read_mark(eqn)
        if mark is not None:
            yield mark[1]
        for inner in inner_jaxprs(tuple(eqn.params.values())):
            yield from _marks(inner)


def _hidden(eqns: Iterable[Any]) -> Iterator[str]:
    """Yield the paths of layers inside of loops and branches that are not written out."""
    for eqn in eqns:
        for inner in inner_jaxprs(tuple(eqn.params.values())):
            yield from _marks(inner)


def _sites(eqns: Sequence[Any]) -> Iterator[Site]:
    begun: dict[str, dict[str, Any]] = {}
    for position, eqn in enumerate(eqns):
        mark = read_mark(eqn)
        if mark is None:
            continue
        kind, path, shape = mark
        found = begun.setdefault(path, {})
        if kind == "input":
            reshaped = position > 0 and eqns[position - 1].outvars[0] is eqn.invars[0]
            start = position - 1 if reshaped else position
            found |= {"input": eqn.invars[0], "input_shape": shape, "start": start}
        elif kind == "answer":
            found |= {"answer": eqn.outvars[0]}
        elif kind == "kernel":
            found |= {"kernel": eqn.invars[0]}
        else:
            found |= {"output": eqn.invars[0], "output_shape": shape}
            yield Site(path=path, **begun.pop(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A model, taken apart.

    Attributes:
        values: of its variables, by name; changing them changes what its programs compute.
        prefix: of the names of parameters, before their paths.
        program: returns the program of a call in evaluation mode, with some layers marked.
        rebuilt: returns a model with the values as they are now.
    """

    values: dict[str, Array]
    prefix: str
    program: Callable[[Inputs, Collection[str]], Program]
    rebuilt: Callable[[], Any]

    @classmethod
    def of(cls, model: Model) -> "Network":
        """Return a model taken apart.

        Raises:
            ValueError: if a Linen module is not bound to variables.
        """
        taken_apart: Any = by_framework(model, nnx_=_nnx, linen=_linen)
        return taken_apart(model)

    def name(self, path: str, parameter: str) -> str:
        """Return the name of a layer's parameter."""
        return self.prefix + f"{path}/{parameter}".lstrip("/")

    def params(self, path: str) -> dict[str, Array]:
        """Return a layer's parameters."""
        start = self.name(path, "")
        return {
            name.removeprefix(start): value
            for name, value in self.values.items()
            if name.startswith(start) and "/" not in name.removeprefix(start)
        }


def _nnx(model: nnx.Module) -> Network:
    values = {name: jnp.asarray(value) for name, value in sorted(arrays(model).items())}

    def program(inputs: Inputs, paths: Collection[str]) -> Program:
        def around(path: str, layer: ModuleCall, x: Any) -> Any:
            if path not in paths:
                return layer(x)
            module = layer.module
            name = module.param_names[0] if isinstance(module, MethodConv) else "kernel"
            kernel = getattr(module, name)[...]
            return _marked(path, name, kernel, layer, x)

        closed = jaxpr_through(model, inputs, lambda m: isinstance(m, nnx.Conv), around)
        return Program(closed, list(values), values)

    return Network(
        values=values, prefix="", program=program, rebuilt=lambda: with_arrays(model, values)
    )


def _linen(bound: nn.Module) -> Network:
    module, variables = unbound(bound)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    names = [_joined(keys) for keys, _ in leaves]
    values = {name: jnp.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}

    def program(inputs: Inputs, paths: Collection[str]) -> Program:
        def intercept(
            next_fun: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: Mapping[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            conv, path = context.module, "/".join(context.module.path)
            own = path in paths and context.method_name == "__call__"
            if not (own and isinstance(conv, nn.Conv)):
                return next_fun(*args, **kwargs)
            held: Any = conv.variables.get("params", {})
            name = min((n for n in held if n != "bias"), default="kernel")
            kernel: Any = nn.meta.unbox(held[name])
            x, args = (args[0], args[1:]) if args else (next(iter(kwargs.values())), ())
            return _marked(path, name, kernel, lambda x: next_fun(x, *args), x)

        closed = intercepted_jaxpr(module, inputs, variables, intercept)
        return Program(closed, names, values)

    def rebuilt() -> nn.Module:
        new = jax.tree_util.tree_map_with_path(lambda keys, _: values[_joined(keys)], variables)
        return module.bind(new)

    return Network(values=values, prefix="params/", program=program, rebuilt=rebuilt)


def _joined(keys: Any) -> str:
    return "/".join(str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey))


def _marked(path: str, name: str, kernel: Array, layer: Callable[[Any], Any], x: Any) -> Any:
    x = jnp.asarray(x)
    mark_kernel(path, kernel, f"{path}/{name}".lstrip("/"))
    mark_input(path, x)
    return mark_answer(path, layer(x))
