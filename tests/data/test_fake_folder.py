import numpy as np
import pytest
from PIL import Image

from falcon_jax import __main__ as cli
from falcon_jax.data.fake import make_image_folder
from falcon_jax.data.loading import DataConfig, load_dataset


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.glob("*/*/*"))}


def test_same_seed_same_files(tmp_path):
    options = {"num_classes": 2, "num_train": 4, "num_val": 2, "side": 12}
    folders = [
        make_image_folder(tmp_path / name, seed=seed, **options)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    one, same, other = map(contents, folders)
    assert len(one) == 6
    assert one == same != other


def test_sizes_vary_and_classes_take_turns(tmp_path):
    folder = make_image_folder(tmp_path / "x", num_classes=3, num_train=9, num_val=3, side=40)
    sizes = set()
    for path in folder.glob("*/*/*"):
        with Image.open(path) as image:
            assert image.format == "JPEG"
            sizes.add(image.size)
    assert len(sizes) > 8
    assert all(28 <= side <= 52 for size in sizes for side in size)
    assert len(list(folder.glob("train/class_1/*.jpg"))) == 3
    assert len(list(folder.glob("val/class_2/*.jpg"))) == 1


def test_mean_colours_tell_the_classes(tmp_path):
    folder = make_image_folder(tmp_path / "x", num_classes=4, num_train=40, num_val=20, side=32)
    data = load_dataset(
        DataConfig(source="folder", data_dir=str(folder), image_size=24, validation_fraction=0.0)
    )

    def colours(split):
        return split.evaluation_rows(range(len(split))).images.mean(axis=(1, 2))

    train, test = colours(data.train), colours(data.test)
    means = np.stack([train[data.train.labels == label].mean(axis=0) for label in range(4)])
    guesses = np.linalg.norm(test[:, None] - means[None], axis=2).argmin(axis=1)
    assert (guesses == data.test.labels).mean() > 0.8


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space left"):
        make_image_folder(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("")
    for path in (tmp_path / "x", tmp_path / "x" / "mine"):
        with pytest.raises(FileExistsError, match="is there already"):
            make_image_folder(path)
    make_image_folder(tmp_path / "y", num_classes=1, num_train=1, num_val=1, side=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be 1 or more, but is 0"),
        ({"num_train": 9}, "num_train must be 10 or more, but is 9"),
        ({"side": 7}, "side must be 8 or more"),
        ({"quality": 96}, "quality 1 to 95, not 0 and 96"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_bad_numbers_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_image_folder(tmp_path / "x", **options)


def test_on_the_command_line(tmp_path, capsys):
    out = str(tmp_path / "x")
    options = ["--classes", "2", "--train", "2", "--val", "2", "--side", "8", "--seed", "3"]
    assert cli.main(["make-folder", "--out", out, *options]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert len(contents(tmp_path / "x")) == 4
    assert cli.main(["make-folder", "--out", out]) == 2
    assert "is there already" in capsys.readouterr().err
