import logging
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from falcon_jax.data.fake import make_image_folder
from falcon_jax.data.loading import DataConfig, load_dataset
from falcon_jax.data.streamed import StreamedSplit


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_image_folder(
        tmp_path_factory.mktemp("made") / "set", num_classes=3, num_train=30, num_val=9, side=24
    )


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "set")


def load(folder, **options):
    return load_dataset(DataConfig(source="folder", data_dir=str(folder), image_size=16, **options))


def names(split):
    return [split.records.name(position) for position in split.positions.tolist()]


def test_labels_are_the_places_of_the_sorted_class_names(folder):
    (folder / "train" / "class_0" / ".hidden").write_text("")
    (folder / "train" / ".hidden").mkdir()
    data = load(folder, validation_fraction=0.0)
    assert (data.name, data.num_classes) == ("set", 3)
    assert data.validation is None
    assert data.train.image_shape == (16, 16, 3)
    assert names(data.train) == sorted(str(p) for p in (folder / "train").glob("*/*.jpg"))
    assert data.train.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert data.test.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert data.train.labels.dtype == np.int32


def test_statistics_are_imagenets(folder):
    data = load(folder)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_images_may_lie_deeper_and_have_any_name(folder):
    images = folder / "train" / "class_1" / "images"
    images.mkdir()
    for i, path in enumerate((folder / "train" / "class_1").glob("*.jpg")):
        path.rename(images / f"Bild ü {i}")
    data = load(folder, validation_fraction=0.0)
    assert data.train.labels.tolist().count(1) == 10
    assert len(data.train.records.read(10)) > 100


def test_held_out_split_is_stratified_and_shares_nothing(folder):
    data = load(folder, validation_fraction=0.3)
    assert isinstance(data.validation, StreamedSplit)
    assert np.bincount(data.validation.labels).tolist() == [3, 3, 3]
    assert np.bincount(data.train.labels).tolist() == [7, 7, 7]
    assert set(names(data.train)).isdisjoint(names(data.validation))
    for name, label in zip(names(data.validation), data.validation.labels, strict=True):
        assert f"class_{label}" in name


def test_train_fraction_is_stratified(folder):
    data = load(folder, train_fraction=0.5, validation_fraction=0.0)
    assert np.bincount(data.train.labels).tolist() == [5, 5, 5]


def test_val_is_the_validation_split_where_there_is_a_test_split(folder):
    shutil.copytree(folder / "val", folder / "test")
    next((folder / "test" / "class_2").iterdir()).unlink()
    data = load(folder)
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 9, 8)
    assert "val" in names(data.validation)[0]
    (folder / "val").rename(folder / "elsewhere")
    data = load(folder)
    assert data.validation is not None
    assert (len(data.train) + len(data.validation), len(data.test)) == (30, 8)


def break_files(folder):
    paths = sorted((folder / "train").glob("*/*.jpg"))
    paths[0].write_bytes(b"")
    for path in paths[1:5]:
        path.write_text("no image")
    Image.new("RGB", (4, 4)).save(paths[5], "png")  # a PNG named .jpg is fine
    return paths


def test_broken_files_are_counted_and_some_are_named(folder):
    paths = break_files(folder)
    with pytest.raises(ValueError, match=r"5 of 30 images of .*train cannot be read: ") as caught:
        load(folder)
    message = str(caught.value)
    assert f"{paths[0]} (it is empty)" in message
    assert f"{paths[1]} (it is none of JPEG, PNG" in message
    assert "and 2 more; mend or remove them, or set skip_broken=True" in message
    assert str(paths[3]) not in message
    assert str(paths[5]) not in message


def test_pipes_and_dangling_links_are_broken_files(folder):
    os.mkfifo(folder / "train" / "class_0" / "a pipe")
    (folder / "train" / "class_0" / "b link").symlink_to(folder / "nowhere")
    told = r"2 of 32 .*a pipe \(it is no file\), .*b link \(No such file or directory: "
    with pytest.raises(ValueError, match=told):
        load(folder)


def test_a_folder_that_cannot_be_read_is_not_passed_over(folder, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(PermissionError, match="train"):
        load(folder)


def test_broken_files_are_left_out_on_request_and_counted(folder, caplog):
    paths = break_files(folder)
    with caplog.at_level(logging.WARNING):
        data = load(folder, skip_broken=True, validation_fraction=0.0)
    assert len(data.train) == 25
    assert set(data.train.skipped) == {str(path) for path in paths[:5]}
    assert set(names(data.train)).isdisjoint(data.train.skipped)
    assert "5 of 30 images" in caplog.text


def link(path, target):
    path.symlink_to(target)


CLASS = "train/class_1"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: link(c / "loop", ".."), r"loop .it leads to .*train, a folder above it\)$"),
        (lambda c: link(c / "loop", "../.."), r"loop .it leads to .*set, a folder above it\)$"),
        (lambda c: link(c / "loop", "."), r"class_1/loop .it is .*class_1\)$"),
        (
            lambda c: link(c / "again.jpg", "000001.jpg"),
            r"again.jpg .it is .*class_1/000001\.jpg\)$",
        ),
        (lambda c: link(c / "0.jpg", "000001.jpg"), r"/0.jpg .it is .*class_1/000001\.jpg\)$"),
        (lambda c: (c / "z.jpg").hardlink_to(c / "000001.jpg"), r"z.jpg .it is .*/000001\.jpg\)$"),
        (
            lambda c: [(c / "x").mkdir(), link(c / "y", "x"), link(c / "x" / "z", "../y")],
            r"class_1/y .it is .*x\), .*x/z .it is .*x\)$",
        ),
    ],
)
def test_a_file_counts_once_however_many_links_lead_there(folder, caplog, change, told):
    before = names(load(folder, validation_fraction=0.0).train)
    change(folder / CLASS)
    with caplog.at_level(logging.WARNING):
        data = load(folder, validation_fraction=0.0)
    assert names(data.train) == before
    [record] = caplog.records
    assert re.search(told, record.getMessage())


def test_links_that_lead_elsewhere_are_followed(folder, tmp_path, monkeypatch, caplog):
    expected = load(folder, validation_fraction=0.0).train
    (folder / "train").rename(tmp_path / "elsewhere")
    (folder / "train").mkdir()
    for name in ("class_0", "class_1"):
        (folder / "train" / name).symlink_to(tmp_path / "elsewhere" / name)
    (folder / "train" / "class_2").mkdir()
    for path in (tmp_path / "elsewhere" / "class_2").iterdir():
        (folder / "train" / "class_2" / path.name).symlink_to(path)
    (tmp_path / "way").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    data = load("way", validation_fraction=0.0).train
    assert data.labels.tolist() == expected.labels.tolist()
    for position in range(30):
        assert data.records.read(position) == expected.records.read(position)
    assert not caplog.records


@pytest.mark.parametrize(
    "change",
    [
        lambda train: link(train / "class_0" / "other", "../class_1"),
        lambda train: [
            link(train / "class_0" / path.name.upper(), path)
            for path in (train / "class_1").iterdir()
        ],
        lambda train: [
            (train / "class_2" / f"a{path.name}").hardlink_to(path)
            for path in (train / "class_1").iterdir()
        ],
    ],
)
def test_a_file_under_two_classes_is_refused_or_stays_where_it_is(folder, change):
    before = load(folder, validation_fraction=0.0).train
    change(folder / "train")
    told = (
        r"10 of 40 images of .*train stand under two classes: .* of another class\), .*7 more; rem"
    )
    with pytest.raises(ValueError, match=told):
        load(folder)
    data = load(folder, skip_broken=True, validation_fraction=0.0).train
    assert names(data) == names(before)
    assert data.labels.tolist() == before.labels.tolist()
    assert len(data.skipped) == 10


def test_a_broken_file_counts_once_too(folder):
    (folder / CLASS / "000001.jpg").write_text("no image")
    link(folder / CLASS / "again.jpg", "000001.jpg")
    with pytest.raises(ValueError, match=r"1 of 30 images of .* cannot be read"):
        load(folder)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(folder):
    for path in folder.glob("*/*"):
        remove(path)


def spoil(folder):
    for path in (folder / "val").glob("*/*"):
        path.write_text("?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: remove(f / "train"), "set has no folder train/"),
        (lambda f: remove(f / "val"), "set has no folder val/ or test/"),
        (lambda f: remove(f), "there is no folder .*set"),
        (lambda f: empty(f), "train has no class folders"),
        (lambda f: remove(f / "val" / "class_1"), "train has class folders that val/ .*: class_1"),
        (lambda f: (f / "val" / "x").mkdir(), "val has class folders that train/ .*: x; both need"),
        (
            lambda f: [(f / "val" / str(i)).mkdir() for i in range(5)],
            "val has class folders that train/ does not have: 0, 1, 2 and 2 more; both",
        ),
        (lambda f: empty(f / "val"), "the class folders of .*val are empty"),
        (lambda f: [remove(p) for p in (f / "train" / "class_1").iterdir()], "no image in class_1"),
        (lambda f: (f / "train" / "class_1" / "notes.txt").write_text("?"), "1 of 31 .*notes.txt"),
        (spoil, r"9 of 9 images of .*val cannot be read"),
    ],
)
def test_unfit_folders_are_refused(folder, change, message):
    change(folder)
    skip = change is spoil
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(folder, skip_broken=skip)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "bilinear"}, "resize must be 'auto' for set, whose images are streamed"),
        ({"workers": -1}, "workers must be 0 or more, but is -1"),
        ({"shorter_side": 15}, "shorter_side must be 0 .* or at least image_size 16, but is 15"),
        ({"train_fraction": 0.0}, "train_fraction must be in"),
    ],
)
def test_bad_options_are_refused(made, options, message):
    with pytest.raises(ValueError, match=message):
        load(made, **options)


def test_the_folder_must_be_given():
    with pytest.raises(ValueError, match='the source "folder" needs data_dir'):
        load("")
