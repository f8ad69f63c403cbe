"""Models on disk that say by themselves what they are: arch, classes, preprocessing."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from falcon_jax.compression.plan import Plan, Rule, make_plan
from falcon_jax.data.streamed import StreamSettings
from falcon_jax.models.registry import get_model, get_unit, same_key_rngs
from falcon_jax.models.units import standard_unit
from falcon_jax.paths import user_path
from falcon_jax.settings import is_number, is_whole
from falcon_jax.storage.compressed import METADATA, Saved, open_compressed, save_compressed
from falcon_jax.storage.directories import MANIFEST, standing
from falcon_jax.wording import reason, shown

_VERSION = 1
# What is beyond these is no model that anybody has, but a damaged or hostile file.
_LARGEST_IMAGE = 2**14
_MOST_CHANNELS = 2**10
_MOST_CLASSES = 2**22
_LARGEST_WIDTH = 64
_LARGEST_VALUE = 10**6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """What was done to the images that a model was trained on.

    Attributes:
        image_size: height and width in pixels that the model sees.
        shorter_side: what the shorter side was resized to before the middle was cut out; 0 if
            the images had the right size.
        mean: of each channel, in units of [0, 1].
        std: of each channel, likewise.
        interpolation: how images are resized, ``bilinear`` or ``bicubic``, with antialiasing.

    Raises:
        ValueError: if a number is out of range, or there is no such interpolation.
    """

    image_size: int
    shorter_side: int = 0
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def __post_init__(self):
        StreamSettings(
            image_size=self.image_size,
            shorter_side=self.shorter_side,
            interpolation=self.interpolation,
        )
        numbers = (*self.mean, *self.std)
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                "mean and std have a number for every channel; there are "
                f"{len(self.mean)} and {len(self.std)}."
            )
        if not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            raise ValueError("mean and std must be finite, and std positive.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What a model is, beside its arrays and its plan.

    Attributes:
        arch: a key of ``falcon_jax.models.MODELS``.
        classes: number of outputs.
        width: multiplier of the channels.
        unit: name and options of the units that it is built of; None for the standard one.
        preprocessing: of its images.
        source: where its arrays come from, plain data.
    """

    arch: str
    classes: int
    width: float = 1.0
    unit: Mapping[str, Any] | None = None
    preprocessing: ImagePreprocessing
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def sample(self) -> jax.ShapeDtypeStruct:
        """Shape of a batch of one image."""
        side = self.preprocessing.image_size
        return jax.ShapeDtypeStruct((1, side, side, len(self.preprocessing.mean)), jnp.float32)

    def build(self, *, rngs: nnx.Rngs) -> nnx.Module:
        """Return the model before compression, with random weights.

        Raises:
            ValueError: if there is no such arch or unit, or it cannot be built so.
        """
        try:
            return self._built(rngs)
        except (TypeError, OverflowError, ZeroDivisionError) as error:
            raise ValueError(
                f"there is no {self.arch} such as described: {reason(error)}"
            ) from error

    def _built(self, rngs: nnx.Rngs) -> nnx.Module:
        options: dict[str, Any] = {}
        if self.unit is not None:
            unit = dict(self.unit)
            if not isinstance(unit.get("unit"), str):
                raise ValueError("the unit has no name.")
            # A network of units keeps its first convolution, as the paper's do.
            options = {"unit": get_unit(unit.pop("unit"), **unit), "stem_unit": standard_unit}
        if self.width != 1:
            options["width"] = self.width
        return get_model(
            self.arch,
            num_classes=self.classes,
            in_features=len(self.preprocessing.mean),
            rngs=rngs,
            **options,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain data."""
        return {"version": _VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Description":
        """Return the description that `to_json` wrote.

        Raises:
            ValueError: if it is of a later version, or a value is none that it can have.
            KeyError: if something is missing.
            TypeError: if there is something else.
        """
        fields = dict(data)
        if (version := fields.pop("version")) != _VERSION:
            raise ValueError(
                f"the description of the model has version {shown(version, 40)}; this falcon_jax "
                f"reads {_VERSION}."
            )
        given = {"shorter_side": 0, "interpolation": "bilinear", **fields.pop("preprocessing")}
        _check_images(**given)
        given |= {name: tuple(map(float, given[name])) for name in ("mean", "std")}
        fields = {"width": 1.0, "unit": None, "source": {}, **fields}
        _check_network(**fields)
        fields["width"] = float(fields["width"])
        return cls(preprocessing=ImagePreprocessing(**given), **fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """A model from disk.

    Attributes:
        model: in evaluation mode, compressed as its plan says.
        plan: what was compressed; it may replace nothing.
        description: what the model is.
    """

    model: nnx.Module
    plan: Plan
    description: Description


def uncompressed(model: nnx.Module, description: Description) -> Stored:
    """Return a model as it is, with a plan that replaces nothing."""
    plan = make_plan(model, [Rule(method=None)], description.sample)
    return Stored(model=model, plan=plan, description=description)


def save_stored(path: str | os.PathLike[str], stored: Stored, *, overwrite: bool = False) -> None:
    """Save a model with its plan and its description.

    Args:
        path: directory to make. It is there as a whole or, after an error, not at all.
        stored: the model.
        overwrite: whether to replace a directory that is there.

    Raises:
        ValueError: if the model is not what the plan makes.
        OSError: if the directory is there, or cannot be written.
    """
    save_compressed(
        path,
        stored.model,
        stored.plan,
        overwrite=overwrite,
        metadata=stored.description.to_json(),
    )


def is_stored(path: str | os.PathLike[str]) -> bool:
    """Say whether a directory holds a stored model, damaged or not."""
    return (standing(user_path(path)) / MANIFEST).is_file()


def read_description(path: str | os.PathLike[str]) -> Description:
    """Return what a stored model is.

    Args:
        path: the directory.

    Raises:
        FileNotFoundError: if there is no such directory.
        ValueError: if it holds no such model, or one that is damaged.
    """
    return _description(open_compressed(path))


def _description(saved: Saved) -> Description:
    file = saved.directory / METADATA
    try:
        return Description.from_json(saved.metadata)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{file} holds no description of a model of falcon_jax ({reason(error, 100)} "
            "is missing or wrong). Models that convert, compress and train.py stored have one."
        ) from None
    except ValueError as error:
        raise ValueError(f"{file}: {reason(error)}") from None


def load_stored(path: str | os.PathLike[str]) -> Stored:
    """Load what `save_stored` saved; nothing else is needed.

    Args:
        path: the directory.

    Raises:
        FileNotFoundError: if there is no such directory.
        ValueError: if it holds no such model, or one that is damaged.
    """
    saved = open_compressed(path)
    description = _description(saved)
    try:
        # What it says may be enormous: no array is made before it fits those that are there.
        model = saved.load(
            lambda: description.build(rngs=nnx.Rngs(0)),
            traced=lambda: description.build(rngs=same_key_rngs()),
        )
    except ValueError as error:
        if str(saved.directory) in str(error):
            raise
        raise ValueError(f"{saved.directory}: {error}") from error
    assert isinstance(model, nnx.Module)
    model.eval()
    return Stored(model=model, plan=saved.plan, description=description)


def _check_images(
    image_size: Any, shorter_side: Any, interpolation: Any, mean: Any, std: Any
) -> None:
    _require("image_size", image_size, is_whole(image_size), 1, _LARGEST_IMAGE)
    _require("shorter_side", shorter_side, is_whole(shorter_side), 0, _LARGEST_IMAGE)
    _require("interpolation", interpolation, isinstance(interpolation, str))
    for name, values in (("mean", mean), ("std", std)):
        _require(name, values, isinstance(values, list) and 1 <= len(values) <= _MOST_CHANNELS)
        for value in values:
            _require(name, value, is_number(value), -_LARGEST_VALUE, _LARGEST_VALUE)
    _require("std", std, len(std) == len(mean) and min(std) > 0)


def _check_network(arch: Any, classes: Any, width: Any, unit: Any, source: Any) -> None:
    _require("arch", arch, isinstance(arch, str))
    _require("classes", classes, is_whole(classes), 1, _MOST_CLASSES)
    _require("width", width, is_number(width) and width > 0, 0, _LARGEST_WIDTH)
    _require("unit", unit, unit is None or isinstance(unit, Mapping))
    _require("source", source, isinstance(source, Mapping))


def _require(name: str, value: Any, good: bool, *bounds: int) -> None:
    """Raise a ValueError unless a value is good and lies between the bounds, if there are any."""
    if not good or (bounds and not bounds[0] <= value <= bounds[1]):
        between = "from {} to {}".format(*bounds) if bounds else "of its kind"
        raise ValueError(f"{name} must be a value {between}, but is {shown(repr(value), 60)}.")
