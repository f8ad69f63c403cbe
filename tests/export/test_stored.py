"""Models as the Hub has them, in a local folder; nothing is asked of the network."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.convert.checkpoint import compressed
from falcon_jax.storage.models import Description, ImagePreprocessing, uncompressed
from tests.export.runtime import as_function, evaluating, images


@pytest.fixture(scope="module")
def stored():
    preprocessing = ImagePreprocessing(image_size=16, mean=(0.5,) * 3, std=(0.2,) * 3)
    description = Description(arch="vgg8_cifar", classes=7, width=0.25, preprocessing=preprocessing)
    model = evaluating(description.build(rngs=nnx.Rngs(0)))
    return compressed(uncompressed(model, description), fj.Falcon())


def test_there_and_back(tmp_path, stored):
    fj.export.save_pretrained(stored, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    assert "library_name: falcon_jax" in (tmp_path / "model" / "README.md").read_text()
    loaded = fj.export.from_pretrained(tmp_path / "model")
    x = images(2, 16, 16, 3)
    np.testing.assert_array_equal(as_function(loaded.model)(x), as_function(stored.model)(x))
    assert loaded.plan == stored.plan and loaded.description == stored.description


def test_codes(tmp_path, stored):
    small, report = fj.quantize_weights(stored.model)
    quantized = dataclasses.replace(stored, model=small)
    for name, options in (("whole", {}), ("codes", {"quantization": report})):
        fj.export.save_pretrained(quantized, tmp_path / name, **options)
    loaded = fj.export.from_pretrained(tmp_path / "codes")
    x = images(2, 16, 16, 3)
    np.testing.assert_array_equal(as_function(loaded.model)(x), as_function(small)(x))
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("whole", "codes")]
    assert sizes[1] < sizes[0] / 2


def test_uploads_what_a_folder_would_hold(tmp_path, stored, monkeypatch):
    """Up to the two calls that reach the network, which are watched instead."""
    hub = pytest.importorskip("huggingface_hub")
    seen = {}

    def create_repo(self, repo_id, **options):
        seen["private"] = options["private"]
        return type("Address", (), {"repo_id": repo_id})()

    def upload_folder(self, *, repo_id, folder_path, **options):
        seen["files"] = {path.name for path in folder_path.iterdir()}
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    address = fj.export.push_to_hub(stored, "somebody/small", private=True)
    assert address == "https://huggingface.co/somebody/small"
    assert seen == {"private": True, "files": {"README.md", "config.json", "model.safetensors"}}


def test_bad_input(tmp_path, stored, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        fj.export.from_pretrained(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        fj.export.from_pretrained(tmp_path / "empty")
    folder = tmp_path / "model"
    fj.export.save_pretrained(stored, folder)
    config = json.loads((folder / "config.json").read_text())
    for change, said in (
        ({"falcon_jax": 99}, "has version 99"),
        ({"description": {}}, "is damaged"),
        ({"description": {**config["description"], "classes": 9}}, "does not fit the model"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=said):
            fj.export.from_pretrained(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "falcon-jax\[hub\]"'):
        fj.export.save_pretrained(stored, folder)
