"""The config of an experiment: its fields, their defaults, and what they may be."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ml_collections import ConfigDict

from falcon_jax.compression.plan import Rule
from falcon_jax.data.augmentation import Augmentation
from falcon_jax.data.decoding import RESIZE_MODES
from falcon_jax.data.loading import SOURCES, check_fractions
from falcon_jax.data.streamed import StreamSettings
from falcon_jax.export.stored_formats import FORMATS
from falcon_jax.methods.base import Method
from falcon_jax.methods.fit import Solver, check_solver
from falcon_jax.methods.registry import get_method, method_from
from falcon_jax.models.registry import MODELS, UNIT_NAMES, get_unit
from falcon_jax.models.units import UnitFactory
from falcon_jax.settings import is_number, unknown_field
from falcon_jax.training.run import LogSettings, ParallelSettings, TrainSettings, defaults


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the report beside the standard model.

    Attributes:
        name: also the name of its folder.
        method: replaces the convolutions that no rule speaks of; None where units are built.
        rules: in order; the last one is the method's own.
        solver: how kernels are fitted; ``random`` starts from a network that was never trained.
        of: the variant whose network is compressed; the standard one if empty.
        width: multiplier of the channels; with a method, kernels start from the leading ones.
        unit: builds the network from these units, with random weights; None for the standard.
        unit_options: the unit's name and options, as in the config; None for the standard.
        kind: the method's or the unit's name.
    """

    name: str
    method: Method | None
    rules: tuple[Rule, ...]
    solver: Solver
    of: str = ""
    width: float = 1.0
    unit: UnitFactory | None = None
    unit_options: Mapping[str, Any] | None = None
    kind: str

    @property
    def rank(self) -> int | str | None:
        """The method's rank, as a number where it is one."""
        rank = None if self.method is None else self.method.options().get("rank")
        return rank if rank is None or isinstance(rank, int) else str(rank)


def chosen_variants(compression: Mapping[str, Any]) -> tuple[Variant, ...]:
    """Return the variants of ``config.compression``, those that others compress first.

    Raises:
        ValueError: with the dotted name of what is wrong.
    """
    given = compression["variants"]
    variants = {name: _variant(name, compression) for name in given}
    for name, variant in variants.items():
        _check_base(name, variant, variants)
    chosen = [name.strip() for name in compression["only"].split(",") if name.strip()]
    for name in chosen:
        if name not in variants:
            raise ValueError(unknown_field("config.compression.only", name, variants))
    kept = {*(chosen or variants)}
    kept |= {variants[name].of for name in kept}
    ordered = sorted(variants.values(), key=lambda variant: bool(variant.of))
    return tuple(variant for variant in ordered if variant.name in kept)


def _check_base(name: str, variant: Variant, variants: Mapping[str, Variant]) -> None:
    if not variant.of:
        return
    units = [other for other, value in variants.items() if value.unit is not None]
    if variant.of not in units:
        listed = ", ".join(units) or "none"
        raise ValueError(
            f"config.compression.variants.{name}.of names a variant that has a unit (there are: "
            f"{listed}), but is {variant.of!r}"
        )


def _variant(name: str, compression: Mapping[str, Any]) -> Variant:
    dotted = f"config.compression.variants.{name}"
    given = compression["variants"][name]
    if name == "standard" or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) is None:
        raise ValueError(
            f"{dotted}: a variant's name is that of its folder; use letters, digits, _ and -, and "
            "not 'standard'"
        )
    if not isinstance(given, Mapping) or ("method" in given) == ("unit" in given):
        raise ValueError(
            f"{dotted} must be a group with a method, such as "
            f"{{'method': 'falcon', 'rank': 2}}, or with a unit, such as {{'unit': 'pdp'}}, but is "
            f"{given!r}"
        )
    options = dict(given)
    try:
        width = options.pop("width", 1.0)
        if not is_number(width) or width <= 0:
            raise ValueError(f"width must be a finite number above 0, but is {width!r}")
        if "unit" in options:
            unit_options = dict(options)
            kind = options.pop("unit")
            unit = get_unit(kind, **options)
            return Variant(
                name=name,
                method=None,
                rules=(),
                solver="random",
                width=float(width),
                unit=unit,
                unit_options=unit_options,
                kind=kind,
            )
        solver = options.pop("solver", compression["solver"])
        check_solver(solver)
        pairs = options.pop("rules", compression["rules"])
        of = options.pop("of", "")
        if not isinstance(of, str):
            raise ValueError(f"of names a variant, but is {of!r}")
        if of and width != 1:
            raise ValueError(f"its width is that of {of!r}; leave width out")
        method = _method(options)
        rules = rules_from(pairs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{dotted}: {error}") from None
    return Variant(
        name=name,
        method=method,
        rules=(*rules, Rule(method=method)),
        solver=solver,
        of=of,
        width=float(width),
        kind=method.name,
    )


def rules_from(pairs: Any) -> list[Rule]:
    """Return the rules that pairs of a path and a method describe.

    Args:
        pairs: each method None, a name, or a group with a name and settings.

    Raises:
        ValueError: if they are no such pairs.
    """
    if not isinstance(pairs, (tuple, list)):
        raise ValueError(f"rules are pairs of a path and a method, such as {_PAIR}; got {pairs!r}")
    return [_rule(pair) for pair in pairs]


_PAIR = "('stem/.*', None) or ('head/.*', 'falcon')"


def _rule(pair: Any) -> Rule:
    good = isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)
    if not good or not isinstance(pair[1], (str, Mapping, type(None))):
        raise ValueError(f"a rule is a pair of a path and a method, such as {_PAIR}; got {pair!r}")
    path, method = pair
    if isinstance(method, str):
        return Rule(path=path, method=get_method(method))
    return Rule(path=path, method=None if method is None else _method(method))


def _method(options: Mapping[str, Any]) -> Method:
    name = options.get("method")
    if name in UNIT_NAMES:
        raise ValueError(
            f"{name!r} is a conv unit: it stands for convolution, BatchNorm and activation "
            "together and is no drop-in for a bare convolution; give it as 'unit' to build the "
            "network of it"
        )
    return method_from(options)


_INTEGERS = 2**31  # steps and seeds are 32-bit on devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A config, checked.

    Attributes:
        seed: of everything random.
        model: name of the model.
        data: arguments of ``load_dataset``.
        augmentation: of training images.
        train: of the standard model.
        finetune: of the compressed ones.
        start: ``train``, ``scratch``, the workdir of an experiment whose standard model was
            trained, or a stored model.
        variants: in the order of the report.
        calibration_batches: training batches whose answers layers are fitted to, without labels; 0
            for fits to kernels only.
        batchnorm_batches: training batches for BatchNorm statistics after fits to kernels only; 0
            for none.
        keep: latest checkpoints kept beside the best.
        every_steps: steps between two checkpoints within an epoch; 0 for none there.
        parallel: how the devices share a batch.
        log: what is shown and kept.
        export: formats that every model is written in, beside the stored one, out of
            ``falcon_jax.export.FORMATS``.
    """

    seed: int
    model: str
    data: dict[str, Any]
    augmentation: Augmentation
    train: TrainSettings
    finetune: TrainSettings
    start: str
    variants: tuple[Variant, ...]
    calibration_batches: int
    batchnorm_batches: int
    keep: int
    every_steps: int
    parallel: ParallelSettings
    log: LogSettings
    export: tuple[str, ...]


def default_config() -> ConfigDict:
    """Return a config with every field there is, to be changed by a config file."""
    config: Any = ConfigDict(
        {
            "seed": 0,
            "model": {"name": "vgg19_cifar"},
            "data": {
                "source": "digits",
                "name": "",
                "data_dir": "",
                "image_size": 32,
                "resize": "auto",
                "shorter_side": 0,
                "interpolation": "bilinear",
                "workers": 0,
                "skip_broken": False,
                "train_fraction": 1.0,
                "validation_fraction": 0.1,
                "augmentation": {"crop_padding": 0, "flip": False},
            },
            "train": defaults(),
            "finetune": defaults(),
            "compression": {
                "start": "train",
                "solver": "exact",
                "calibration_batches": 8,
                "batchnorm_batches": 8,
                "rules": (),
                "variants": {},
                "only": "",
            },
            "checkpoint": {"keep": 2, "every_steps": 0},
            "export": (),
            **dataclasses.asdict(ParallelSettings()),
            "log": dataclasses.asdict(LogSettings()),
        }
    )
    config.lock()
    return config


def check_config(config: Any) -> Experiment:
    """Check every field of a config.

    Args:
        config: made from `default_config`.

    Returns:
        The experiment that it describes.

    Raises:
        ValueError: with the dotted name of the field, what it is and what it may be.
    """
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config() must return a ConfigDict, but returns {config!r}")
    fields: dict[str, Any] = config.to_dict()
    known = default_config().to_dict()
    _check_fields(fields, known, "config")
    _check_complete(fields, known, "config")
    model, data, compression = fields["model"], fields["data"], fields["compression"]
    if model["name"] not in MODELS:
        raise ValueError(unknown_field("config.model.name", model["name"], MODELS))
    if data["source"] not in SOURCES:
        raise ValueError(unknown_field("config.data.source", data["source"], SOURCES))
    streamed = [field.name for field in dataclasses.fields(StreamSettings)]
    _built("config.data", StreamSettings, {field: data[field] for field in streamed})
    if data["resize"] not in RESIZE_MODES:
        raise ValueError(unknown_field("config.data.resize", data["resize"], RESIZE_MODES))
    with _below("config.data."):
        check_fractions(
            train_fraction=data["train_fraction"], validation_fraction=data["validation_fraction"]
        )
    if fields["seed"] < 0:
        raise ValueError(f"config.seed must be 0 or more, but is {fields['seed']}")
    if not compression["start"].strip():
        raise ValueError(
            "config.compression.start must be train, scratch, the workdir of an experiment or a "
            f"stored model, but is {compression['start']!r}"
        )
    with _below("config.compression."):
        check_solver(compression["solver"])
    with _below("config.compression.rules: "):
        rules_from(compression["rules"])
    for field in ("calibration_batches", "batchnorm_batches"):
        if compression[field] < 0:
            raise ValueError(
                f"config.compression.{field} must be 0 or more, but is {compression[field]}"
            )
    for field, least in (("keep", 1), ("every_steps", 0)):
        if fields["checkpoint"][field] < least:
            raise ValueError(
                f"config.checkpoint.{field} must be {least} or more, but is "
                f"{fields['checkpoint'][field]}"
            )
    for name in fields["export"]:
        if name not in FORMATS:
            raise ValueError(unknown_field("config.export", str(name), FORMATS))
    return Experiment(
        seed=fields["seed"],
        model=model["name"],
        augmentation=_built("config.data.augmentation", Augmentation, data.pop("augmentation")),
        data=data | {"seed": fields["seed"]},
        train=_built("config.train", TrainSettings, fields["train"]),
        finetune=_built("config.finetune", TrainSettings, fields["finetune"]),
        start=compression["start"],
        variants=chosen_variants(compression),
        calibration_batches=compression["calibration_batches"],
        batchnorm_batches=compression["batchnorm_batches"],
        keep=fields["checkpoint"]["keep"],
        every_steps=fields["checkpoint"]["every_steps"],
        parallel=_built(
            "config",
            ParallelSettings,
            {field: fields[field] for field in ("parallel", "batchnorm")},
        ),
        log=_built("config.log", LogSettings, fields["log"]),
        export=tuple(fields["export"]),
    )


def check_override(dotted: str) -> None:
    """Raise unless a config has such a field.

    Args:
        dotted: name of the field, such as ``config.train.epochs``.

    Raises:
        ValueError: naming the fields there are, and the nearest.
    """
    known: Any = default_config().to_dict()
    for field in dotted.split(".")[1:]:
        if known is _FREE_FORM:
            return
        if not isinstance(known, dict) or field not in known:
            raise ValueError(unknown_field(dotted, field, known if isinstance(known, dict) else ()))
        known = _FREE_FORM if field == "variants" else known[field]


_FREE_FORM = object()


def _check_fields(given: Mapping[str, Any], known: Mapping[str, Any], name: str) -> None:
    for field, value in given.items():
        dotted = f"{name}.{field}"
        if field not in known:
            raise ValueError(unknown_field(dotted, field, known))
        default = known[field]
        if dotted == "config.compression.variants":
            continue
        if isinstance(default, dict):
            if not isinstance(value, Mapping):
                raise ValueError(f"{dotted} is a group of fields, but is {value!r}")
            _check_fields(value, default, dotted)
        elif not _same_type(value, default):
            raise ValueError(f"{dotted} must be a {type(default).__name__}, but is {value!r}")
        else:
            _check_numbers(value, dotted)


def _check_complete(given: Mapping[str, Any], known: Mapping[str, Any], name: str) -> None:
    for field, default in known.items():
        if field not in given:
            raise ValueError(f"{name}.{field} is missing; make configs from default_config()")
        if isinstance(default, dict) and field != "variants":
            _check_complete(given[field], default, f"{name}.{field}")


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    if isinstance(default, tuple):
        numbers = all(isinstance(d, float) for d in default) and default
        return isinstance(value, (tuple, list)) and (
            not numbers or all(_same_type(v, 0.0) for v in value)
        )
    return isinstance(value, type(default))


def _check_numbers(value: Any, dotted: str) -> None:
    """Raise if a number, or one in a tuple, is not finite or has more than 32 bits."""
    for number in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{dotted} must be finite, but is {value!r}")
        if isinstance(number, int) and abs(number) >= _INTEGERS:
            raise ValueError(f"{dotted} must have less than 32 bits, but is {value!r}")


def _built(name: str, cls: Any, fields: Mapping[str, Any]) -> Any:
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    values = dict(fields)
    for field, value in fields.items():
        if types[field] is float:
            values[field] = float(value)
        elif isinstance(value, (tuple, list)):
            values[field] = tuple(float(v) if isinstance(v, int) else v for v in value)
    with _below(f"{name}."):
        return cls(**values)


@contextmanager
def _below(prefix: str) -> Iterator[None]:
    """Put the dotted name of a group before what is wrong in it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None
