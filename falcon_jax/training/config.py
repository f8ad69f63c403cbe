"""The config of an experiment: one tree of its fields, their defaults, meanings and checks.

A config file changes the fields of `default_config`; `check_config` makes the tree of it, whose
parts the code is given. Fields are added to the dataclasses here, and nowhere else.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from ml_collections import ConfigDict

from falcon_jax.data.loading import DataConfig
from falcon_jax.export.files import FORMATS
from falcon_jax.methods.fit import Solver
from falcon_jax.models.registry import MODELS
from falcon_jax.settings import (
    at_least,
    below,
    check_fields,
    checked,
    each,
    must_be,
    named,
    one_of,
    unknown_field,
)
from falcon_jax.training.monitoring import LOGGERS
from falcon_jax.training.variants import Variant, chosen_variants, rules_from


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network is trained and compressed.

    Attributes:
        name: as ``falcon_jax.models.get_model`` has it.
    """

    name: str = checked("vgg19_cifar", named(MODELS))

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How much the standard model's answers count in fine-tuning, beside the labels.

    Attributes:
        weight: share of the loss that is the divergence from the standard model's answers; 0 for
            labels only, 1 for no labels.
        temperature: that both models' logits are divided by for it.
    """

    weight: float = checked(0.0, must_be("in [0, 1]", lambda share, _: 0 <= share <= 1))
    temperature: float = checked(
        2.0, must_be("positive and finite", lambda value, _: 0 < value < math.inf)
    )

    def __post_init__(self):
        check_fields(self)


def _rising(epochs: tuple[float, ...], _: Any) -> bool:
    if not all(isinstance(epoch, (int, float)) and math.isfinite(epoch) for epoch in epochs):
        return False
    return min(epochs, default=0) >= 0 and list(epochs) == sorted(set(epochs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a network is trained or fine-tuned. The defaults are the paper's (Section 4.1.3).

    Attributes:
        epochs: passes over the training split.
        batch_size: images per step, over all devices.
        accumulate: parts that a batch is worked on in, one after another, to save memory; their
            gradients are averaged, and BatchNorm sees one part at a time.
        eval_batch_size: images per step of evaluation, over all devices.
        optimizer: ``sgd`` or ``adamw``.
        learning_rate: at its highest.
        momentum: of sgd.
        nesterov: whether sgd looks ahead.
        weight_decay: of every parameter; added to the gradient for sgd, decoupled for adamw.
        schedule: ``step``, ``cosine`` or ``constant``.
        boundaries: epochs at which ``step`` multiplies the learning rate by ``factor``.
        factor: see ``boundaries``.
        warmup_epochs: epochs of linear warm-up, before the schedule proper.
        label_smoothing: share of the target spread evenly over all classes.
        skip_nonfinite: steps whose loss or gradient is not finite that are skipped before the run
            stops.
        dtype: of the computation, ``float32`` or ``bfloat16``; parameters and statistics stay
            float32.
        distillation: of fine-tuning.
    """

    epochs: int = checked(350, at_least(0))
    batch_size: int = checked(128, at_least(1))
    accumulate: int = checked(
        1, must_be("in [1, batch_size]", lambda parts, whole: 1 <= parts <= whole.batch_size)
    )
    eval_batch_size: int = checked(256, at_least(1))
    optimizer: str = checked("sgd", one_of(("sgd", "adamw")))
    learning_rate: float = checked(
        0.1, must_be("positive and finite", lambda rate, _: 0 < rate < math.inf)
    )
    momentum: float = checked(0.9, must_be("in [0, 1)", lambda share, _: 0 <= share < 1))
    nesterov: bool = False
    weight_decay: float = checked(
        1e-4, must_be("0 or more, and finite", lambda decay, _: 0 <= decay < math.inf)
    )
    schedule: str = checked("step", one_of(("step", "cosine", "constant")))
    boundaries: tuple[float, ...] = checked(
        (150.0, 250.0), must_be("rising epochs, 0 or more", _rising)
    )
    factor: float = checked(0.1, must_be("in (0, 1]", lambda factor, _: 0 < factor <= 1))
    warmup_epochs: float = checked(
        0.0, must_be("in [0, epochs]", lambda epochs, whole: 0 <= epochs <= whole.epochs)
    )
    label_smoothing: float = checked(0.0, must_be("in [0, 1)", lambda share, _: 0 <= share < 1))
    skip_nonfinite: int = checked(0, at_least(0))
    dtype: str = checked("float32", one_of(("float32", "bfloat16")))
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """How the standard model comes about, and what is made of it.

    Attributes:
        start: ``train``; ``scratch``, for random weights; the workdir of an experiment whose
            standard model was trained; or a stored model, such as converted weights.
        solver: how kernels are fitted, ``exact`` or ``adamw``; ``random`` starts from a network
            that was never trained.
        calibration_batches: training batches whose answers layers are fitted to, without labels; 0
            for fits to kernels only.
        batchnorm_batches: training batches for BatchNorm statistics after fits to kernels only; 0
            for none.
        rules: pairs of a regular expression and a method's name, a group like a variant's, or
            None; the first that matches a layer's whole path decides, then the variant's method
            takes the rest.
        variants: by name, a group with a ``method`` or a ``unit`` and its settings, and if need be
            with ``solver``, ``rules``, ``width`` and ``of`` of its own (docs/training.md
            says what they mean).
        only: names of variants, with commas between them; empty for all.
        target: one field of `falcon_jax.Target`, such as ``{"mult_adds": 0.15}``, for one more
            variant, ``searched``: ``search`` finds its plan on the calibration batches, obeying
            the rules. Empty for none.
        candidates: what the search chooses from, each a method's name or a group like a variant's;
            empty for `falcon_jax.search`'s own.
    """

    start: str = checked(
        "train",
        must_be(
            "train, scratch, the workdir of an experiment or a stored model",
            lambda start, _: bool(start.strip()),
        ),
    )
    solver: str = checked("exact", one_of(get_args(Solver)))
    calibration_batches: int = checked(8, at_least(0))
    batchnorm_batches: int = checked(8, at_least(0))
    rules: tuple[Any, ...] = ()
    variants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    only: str = ""
    target: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    candidates: tuple[Any, ...] = ()

    def __post_init__(self):
        check_fields(self)
        with below("rules: "):
            rules_from(self.rules)
        if self.candidates and not self.target:
            raise ValueError("candidates are what a search chooses from; give its target, too")
        if self.target and not self.calibration_batches:
            raise ValueError("target needs calibration_batches of 1 or more to search on, but is 0")
        _ = self.chosen

    @functools.cached_property
    def chosen(self) -> tuple[Variant, ...]:
        """What ``variants`` and ``only`` stand for, those that others compress first."""
        return chosen_variants(
            self.variants,
            solver=self.solver,
            rules=self.rules,
            only=self.only,
            target=self.target,
            candidates=self.candidates,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoints there are.

    Attributes:
        keep: latest checkpoints kept beside the best.
        every_steps: steps between two checkpoints within an epoch; 0 for none there.
    """

    keep: int = checked(2, at_least(1))
    every_steps: int = checked(0, at_least(0))

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run leaves behind and shows.

    Attributes:
        tensorboard: whether to write event files, beside ``metrics.jsonl``.
        loggers: what else gets the metrics: any of ``wandb`` and ``trackio``.
        project: that the runs belong to, in wandb and trackio.
        progress: whether to show progress.
        profile_start_step: first step of the profiler's window.
        profile_steps: length of the window; 0 for none. The trace goes to ``profile/``.
    """

    tensorboard: bool = True
    loggers: tuple[str, ...] = checked((), each(named(LOGGERS)))
    project: str = checked(
        "falcon_jax", must_be("a name", lambda project, _: bool(project.strip()))
    )
    progress: bool = True
    profile_start_step: int = checked(10, at_least(0))
    profile_steps: int = checked(0, at_least(0))

    def __post_init__(self):
        check_fields(self)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of all loggers, TensorBoard's included."""
        return tuple(dict.fromkeys(("tensorboard",) * self.tensorboard + self.loggers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """A whole experiment.

    Attributes:
        seed: of everything random.
        model: which network.
        data: which images.
        train: how the standard model is trained.
        finetune: how the compressed ones are.
        compression: what is made of the standard model.
        checkpoint: which checkpoints there are.
        parallel: what compiles a step for all devices, ``jit`` or ``pmap``.
        batchnorm: what BatchNorm normalises by in training: ``synchronised``, the whole batch; or
            ``per_replica`` (ghost), the rows of each device, whose running statistics are averaged.
        log: what is shown and kept.
        export: formats that every model is written in, beside the stored one, out of
            ``falcon_jax.export.FORMATS``.
    """

    seed: int = checked(0, at_least(0))
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    finetune: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    compression: CompressionConfig = dataclasses.field(default_factory=CompressionConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    parallel: str = checked("jit", one_of(("jit", "pmap")))
    batchnorm: str = checked("synchronised", one_of(("synchronised", "per_replica")))
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    export: tuple[str, ...] = checked((), each(named(FORMATS)))

    def __post_init__(self):
        check_fields(self)
        if self.train.distillation.weight:
            raise ValueError(
                "train.distillation.weight must be 0: the standard model has no teacher; give "
                "finetune.distillation"
            )
        if self.finetune.distillation.weight and self.compression.start == "scratch":
            raise ValueError(
                "finetune.distillation.weight must be 0 with compression.start 'scratch': no "
                "standard model is trained to learn from"
            )


def default_config() -> ConfigDict:
    """Return a config with every field there is, to be changed by a config file."""
    config = ConfigDict(dataclasses.asdict(ExperimentConfig()))
    config.lock()
    return config


def check_config(config: Any) -> ExperimentConfig:
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
    return _built(ExperimentConfig, config.to_dict(), "config")


def check_override(dotted: str) -> None:
    """Raise unless a config has such a field.

    Args:
        dotted: name of the field, such as ``config.train.epochs``.

    Raises:
        ValueError: naming the fields there are, and the nearest.
    """
    known: Any = ExperimentConfig()
    for field in dotted.split(".")[1:]:
        if isinstance(known, Mapping):
            return
        fields = _names(known) if dataclasses.is_dataclass(known) else ()
        if field not in fields:
            raise ValueError(unknown_field(dotted, field, fields))
        known = getattr(known, field)


T = TypeVar("T")
_INTEGERS = 2**31  # steps and seeds are 32-bit on devices


def _built(cls: type[T], given: Mapping[str, Any], name: str) -> T:
    """Return a group of the tree.

    Args:
        cls: its dataclass; every field has a default, which says of what type it is.
        given: the fields as they are written.
        name: of the group, with dots.
    """
    defaults = cls()
    known = _names(defaults)
    for field in given:
        if field not in known:
            raise ValueError(unknown_field(f"{name}.{field}", field, known))
    for field in known:
        if field not in given:
            raise ValueError(f"{name}.{field} is missing; make configs from default_config()")
    values = {
        field: _value(given[field], getattr(defaults, field), f"{name}.{field}") for field in known
    }
    with below(f"{name}."):
        return cls(**values)


def _names(group: Any) -> list[str]:
    return sorted(field.name for field in dataclasses.fields(group))


def _value(value: Any, default: Any, name: str) -> Any:
    """Return a field's value as the tree has it."""
    group = dataclasses.is_dataclass(default)
    if group or isinstance(default, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is a group of fields, but is {value!r}")
        return _built(type(default), value, name) if group else value
    if not _same_type(value, default):
        raise ValueError(f"{name} must be a {type(default).__name__}, but is {value!r}")
    for number in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{name} must be finite, but is {value!r}")
        if isinstance(number, int) and abs(number) >= _INTEGERS:
            raise ValueError(f"{name} must have less than 32 bits, but is {value!r}")
    if isinstance(default, tuple):
        return tuple(map(float, value)) if _of_numbers(default) else tuple(value)
    return type(default)(value)


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    if isinstance(default, tuple):
        return isinstance(value, (tuple, list)) and (
            not _of_numbers(default) or all(_same_type(number, 0.0) for number in value)
        )
    return isinstance(value, type(default))


def _of_numbers(default: tuple[Any, ...]) -> bool:
    return bool(default) and all(isinstance(number, float) for number in default)
