"""`evaluate` on the command line: exact counts on a folder of images, against NumPy and PIL."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import falcon_jax as fj
from falcon_jax import __main__ as cli
from falcon_jax.data.fake import make_image_folder
from falcon_jax.models import get_model
from falcon_jax.storage import models as stored
from falcon_jax.storage.models import Description, ImagePreprocessing

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_image_folder(folder, num_classes=7, num_train=21, num_val=30, side=24, seed=0)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "model", classes=7)


def save(path, classes, **options):
    model = get_model("vgg8_cifar", num_classes=classes, rngs=nnx.Rngs(0), **options)
    description = Description(
        arch="vgg8_cifar",
        classes=classes,
        preprocessing=ImagePreprocessing(image_size=16, shorter_side=20, mean=MEAN, std=STD),
    )
    stored.save_stored(path, stored.uncompressed(model, description))
    return path


def expected_ranks(folder, checkpoint):
    """The rank of the true class of every image, each image read and classified by itself."""
    model = stored.load_stored(checkpoint).model
    classes = sorted(path.name for path in (folder / "val").iterdir())
    ranks = []
    for path in sorted((folder / "val").rglob("*.jpg")):
        image = Image.open(path).convert("RGB")
        short = min(image.size)
        w, h = (20 * s // short if s != short else 20 for s in image.size)
        image = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR), np.float32) / 255
        top, left = round((h - 16) / 2), round((w - 16) / 2)
        x = (image[top : top + 16, left : left + 16] - np.array(MEAN)) / np.array(STD)
        logits = np.asarray(model(jnp.asarray(x[None], jnp.float32)))[0]
        order = np.argsort(-logits).tolist()
        ranks.append(order.index(classes.index(path.parent.name)))
    return np.array(ranks)


@pytest.mark.parametrize("batch_size", ["13", pytest.param("8", marks=pytest.mark.slow)])
def test_every_image_counts_once_whatever_the_batch(folder, checkpoint, capsys, batch_size):
    options = [f"--data={folder}", f"--batch-size={batch_size}"]
    assert cli.main(["evaluate", str(checkpoint), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    ranks = expected_ranks(folder, checkpoint)
    assert len(ranks) == 30
    for line, name, best in zip(lines, ("top-1", "top-5"), (1, 5), strict=False):
        right = (ranks < best).sum()
        assert line.split() == [name, f"{right / 30:.2%}", str(right), "of", "30"]
    assert "images/s" in lines[-1]


@pytest.mark.slow
def test_compression_with_data_gives_better_statistics(folder, checkpoint, tmp_path, capsys):
    out = tmp_path / "small"
    options = ["--method=falcon", "--rank=1", f"--data={folder}", "--batch-size=16", "--batches=1"]
    assert cli.main(["compress", str(checkpoint), f"--out={out}", *options]) == 0
    before, after = stored.load_stored(checkpoint).model, stored.load_stored(out).model
    assert isinstance(after.stages[0][1].conv, fj.FalconConv)
    assert not np.array_equal(before.stages[0][0].norm.mean[...], after.stages[0][0].norm.mean[...])
    assert (
        cli.main(["evaluate", str(out), f"--data={folder}", "--split=train"]) == 0
    )  # 7 are held out
    assert "of 14" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("/nowhere/images", "/nowhere/images"),
        ("digts", "Did you mean 'digits'?"),
        ("digits", "10 classes, but the model has 7 outputs"),
    ],
)
def test_data_that_does_not_fit_is_one_line(checkpoint, capsys, data, message):
    assert cli.main(["evaluate", str(checkpoint), f"--data={data}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_images_with_other_channels_are_refused(tmp_path, capsys):
    path = save(tmp_path / "ten", classes=10)
    assert cli.main(["evaluate", str(path), "--data=digits"]) == 2
    assert "1 channels, but the model takes 3" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "profile"])
def test_a_damaged_checkpoint_is_told(folder, checkpoint, tmp_path, capsys, command):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "metadata.json").write_text("{}")
    data = [f"--data={folder}"] if command == "evaluate" else []
    assert cli.main([command, str(copy), *data]) == 2
    assert "metadata.json is not what was saved" in capsys.readouterr().err
