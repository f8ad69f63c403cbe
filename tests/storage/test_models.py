"""Stored models whose description is of another form, or of a model that is not there."""

import json
import resource

import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.convert.checkpoint import compressed
from falcon_jax.frameworks.nnx import arrays
from falcon_jax.storage.directories import write_manifest
from falcon_jax.storage.models import (
    Description,
    ImagePreprocessing,
    load_stored,
    read_description,
    save_stored,
    uncompressed,
)

IMAGES = {"image_size": 32, "shorter_side": 0, "mean": [0.0] * 3, "std": [1.0] * 3}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    images = ImagePreprocessing(image_size=32, mean=(0.0,) * 3, std=(1.0,) * 3)
    description = Description(arch="vgg8_cifar", classes=10, width=0.125, preprocessing=images)
    model = description.build(rngs=nnx.Rngs(0))
    stored = compressed(uncompressed(model, description), fj.Falcon())
    path = tmp_path_factory.mktemp("stored") / "model"
    save_stored(path, stored)
    return path, stored


@pytest.fixture
def told(stored):
    """Load the model with another description, and return what is said."""
    path, _ = stored
    file = path / "metadata.json"
    before = file.read_text()

    def told(text):
        file.write_text(text)
        write_manifest(path)
        with pytest.raises(ValueError) as caught:
            load_stored(path)
        message = str(caught.value)
        assert str(path) in message and len(message) < 2000 and "\x1b" not in message
        return message

    yield told
    file.write_text(before)
    write_manifest(path)


def test_there_and_back(stored):
    path, before = stored
    loaded = load_stored(path)
    assert loaded.description == before.description and loaded.plan == before.plan
    found = arrays(loaded.model)
    for name, array in arrays(before.model).items():
        np.testing.assert_array_equal(found[name], array)


def test_descriptions_of_another_form(told, stored):
    good = json.loads((stored[0] / "metadata.json").read_text())
    for words, changes in (
        ("width must be", {"width": 1e6}),
        ("width must be", {"width": float("nan")}),
        ("width must be", {"width": "1"}),
        ("leaves no channel", {"width": 1e-9}),
        ("classes must be", {"classes": 10**12}),
        ("classes must be", {"classes": True}),
        ("arch must be", {"arch": ["vgg8_cifar"]}),
        ("no model is called", {"arch": "vgg"}),
        ("the unit has no name", {"unit": {}}),
        ("unit must be", {"unit": 3}),
        ("source must be", {"source": [3]}),
        ("is missing or wrong", {"preprocessing": {}}),
        ("is missing or wrong", {"extra": 1}),
        ("image_size must be", {"preprocessing": {**IMAGES, "image_size": 10**9}}),
        ("mean must be", {"preprocessing": {**IMAGES, "mean": [0] * 10**5}}),
        ("std must be", {"preprocessing": {**IMAGES, "std": [0] * 3}}),
        ("mean must be", {"preprocessing": {**IMAGES, "mean": [1e400] * 3}}),
        ("has version", {"version": {"a": ["\x1b[31m"] * 10**5}}),
    ):
        assert words in told(json.dumps({**good, **changes}))
    for text in ("[1]", "{", "", "3", "[" * 10**5, "\x1b"):
        assert "metadata.json" in told(text)


def test_shapes_are_compared_before_anything_is_built(told, stored):
    """A width that would take gigabytes is within what could be, but not what is there."""
    good = json.loads((stored[0] / "metadata.json").read_text())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "ConvSpec" in told(json.dumps({**good, "width": 40}))
    assert "head/kernel has shape (128, 10) instead of" in told(
        json.dumps({**good, "classes": 4_000_000})  # 2 GB
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_arrays_that_the_files_cannot_hold(stored, tmp_path):
    path, _ = stored
    file = path / "plan" / "metadata"
    before = file.read_text()
    data = json.loads(before)
    try:
        for words, changes in (
            ("claims arrays of", {"shape": [2**30, 4]}),
            ("no size of an array", {"shape": [-1]}),
            ("no size of an array", {"shape": [1e3]}),
            ("does not say what its arrays are", {"shape": 3}),
            ("does not say what its arrays are", {"dtype": "object"}),
            ("does not say what its arrays are", {"dtype": 3}),
        ):
            name = "head/kernel"
            arrays = {**data["arrays"], name: {**data["arrays"][name], **changes}}
            file.write_text(json.dumps({**data, "arrays": arrays}))
            write_manifest(path)
            with pytest.raises(ValueError, match=words):
                load_stored(path)
        for other in ([], {"version": 1}, {"version": 1, "plan": []}, {"version": 1, "plan": {}}):
            file.write_text(json.dumps(other))
            write_manifest(path)
            with pytest.raises(ValueError, match=str(path)):
                read_description(path)
    finally:
        file.write_text(before)
        write_manifest(path)
