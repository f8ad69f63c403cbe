import logging

import numpy as np
import pytest
from PIL import Image

from falcon_jax.data.batching import eval_batches, train_batches
from falcon_jax.data.dataset import Split
from falcon_jax.data.fake import make_image_folder
from falcon_jax.data.loading import DataConfig, load_dataset
from falcon_jax.data.streamed import StreamedSplit, StreamSettings

SETTINGS = StreamSettings(image_size=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_image_folder(
        tmp_path_factory.mktemp("made") / "set", num_classes=2, num_train=22, num_val=10, side=24
    )


def load(folder, **options):
    options = {"image_size": 16, "validation_fraction": 0.0, **options}
    return load_dataset(DataConfig(source="folder", data_dir=str(folder), **options))


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert set(one) == set(other)
        for key, value in one.items():
            assert value.dtype == other[key].dtype
            np.testing.assert_array_equal(value, other[key])


def test_training_batches_are_of_the_shapes_and_types_of_those_in_memory(made):
    train = load(made).train
    batches = list(train_batches(train, 5, seed=0, epoch=0))
    images = np.zeros((22, 16, 16, 3), np.uint8)
    in_memory = Split(images=images, labels=train.labels)
    for one, other in zip(batches, train_batches(in_memory, 5, seed=0, epoch=0), strict=True):
        assert [(k, v.shape, v.dtype) for k, v in one.items()] == [
            (k, v.shape, v.dtype) for k, v in other.items()
        ]
        np.testing.assert_array_equal(one["index"], other["index"])
        np.testing.assert_array_equal(one["label"], train.labels[one["index"]])


def test_crops_are_a_pure_function_of_seed_epoch_and_position(made):
    train = load(made).train

    def shown(batch_size, **options):
        return {
            int(i): image.tobytes()
            for batch in train_batches(train, batch_size, **options)
            for i, image in zip(batch["index"], batch["image"], strict=True)
        }

    first = shown(11, seed=1, epoch=2)
    assert len(set(first.values())) == len(first) == 22
    assert first == shown(2, seed=1, epoch=2)
    for other in ({"seed": 1, "epoch": 3}, {"seed": 2, "epoch": 2}):
        changed = shown(11, **other)
        assert all(changed[i] != first[i] for i in first)


@pytest.mark.parametrize("start", range(5))
def test_restarted_epoch_goes_on_where_it_was(made, start):
    train = load(made).train
    whole = list(train_batches(train, 5, seed=0, epoch=0))
    rest = list(train_batches(train, 5, seed=0, epoch=0, start_step=start))
    if start == 4:
        assert rest == []
    else:
        assert_same(rest, whole[start:])


def test_evaluation_shows_every_image_once_in_order(made):
    test = load(made).test
    batches = list(eval_batches(test, 4))
    assert [b["mask"].tolist() for b in batches] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    labels = np.concatenate([b["label"] for b in batches])
    assert labels.tolist() == [*test.labels.tolist(), 0, 0]
    assert not batches[-1]["image"][2:].any()
    with Image.open(test.records.name(9)) as image:
        short = min(image.size)
        factor = 18 / short
        new = (int(18 * image.width / short), int(18 * image.height / short))
        assert min(new) == round(factor * short) == test.settings.resized_side
        left, top = round((new[0] - 16) / 2), round((new[1] - 16) / 2)
        expected = image.resize(new, Image.Resampling.BILINEAR)
        expected = np.asarray(expected)[top : top + 16, left : left + 16]
    np.testing.assert_array_equal(batches[-1]["image"][1], expected)


@pytest.mark.parametrize("in_memory", [False, True])
def test_processes_share_every_batch(made, in_memory):
    train = load(made).train
    if in_memory:
        images = np.arange(22, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
        train = Split(images=images, labels=train.labels)

    def put_together(parts):
        return [
            {key: np.concatenate([part[key] for part in step]) for key in step[0]}
            for step in zip(*parts, strict=True)
        ]

    shards = [(i, 3) for i in range(3)]
    parts = [train_batches(train, 6, seed=0, epoch=0, start_step=1, shard=s) for s in shards]
    assert_same(put_together(parts), train_batches(train, 6, seed=0, epoch=0, start_step=1))
    parts = [list(eval_batches(train, 9, shard=shard)) for shard in shards]
    assert [b["mask"].tolist() for b in parts[1]] == [[1] * 3, [1] * 3, [1, 0, 0]]
    assert_same(put_together(parts), eval_batches(train, 9))


@pytest.mark.parametrize(
    ("size", "shard", "message"),
    [
        (5, (0, 2), "batch_size 5 cannot be shared evenly by 2 processes; use a multiple of 2"),
        (4, (2, 2), r"shard must be \(process, count\) with 0 <= process < count, not \(2, 2\)"),
        (4, (-1, 2), "shard must be"),
        (4, (0, 0), "shard must be"),
    ],
)
def test_shards_that_cannot_be_are_refused_before_the_first_batch(made, size, shard, message):
    train = load(made).train
    with pytest.raises(ValueError, match=message):
        train_batches(train, size, seed=0, epoch=0, shard=shard)
    with pytest.raises(ValueError, match=message):
        eval_batches(train, size, shard=shard)


class Broken:
    """Records of which some turn out to be unreadable when their pixels are wanted."""

    def __init__(self, records, broken, error=b"GIF89a"):
        self.records, self.broken, self.error = records, set(broken), error

    def read(self, position):
        if position not in self.broken:
            return self.records.read(position)
        if isinstance(self.error, bytes):
            return self.error
        raise self.error

    def name(self, position):
        return self.records.name(position)


def broken_split(split, broken, *, skip, **options):
    return StreamedSplit(
        records=Broken(split.records, broken, **options),
        positions=split.positions,
        labels=split.labels,
        settings=StreamSettings(image_size=16, skip_broken=skip),
    )


@pytest.mark.parametrize("error", [b"\xff\xd8\xff\xe0", OSError("the disk\nis away")])
def test_unreadable_pixels_name_the_file(made, error):
    data = load(made)
    split = broken_split(data.test, [3], skip=False, error=error)
    named = f"{data.test.records.name(3)} cannot be read: .*skip_broken=True$"
    for batches in (eval_batches(split, 5), train_batches(split, 5, seed=0, epoch=0)):
        with pytest.raises(ValueError, match=named) as caught:
            list(batches)
        assert "\n" not in str(caught.value)


def test_unreadable_pixels_are_masked_in_evaluation_and_counted(made, caplog):
    test = load(made).test
    split = broken_split(test, [2, 7], skip=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batches = list(eval_batches(split, 4))
    mask = np.concatenate([b["mask"] for b in batches])
    assert np.flatnonzero(mask == 0).tolist() == [2, 7, 10, 11]
    assert not batches[0]["image"][2].any()
    assert set(split.skipped) == {test.records.name(2), test.records.name(7)}
    assert len(caplog.records) == 2
    assert "left out, 2 so far" in caplog.text


def test_in_training_the_next_image_of_the_order_stands_in(made):
    train = load(made).train
    order = [i for b in train_batches(train, 2, seed=0, epoch=4) for i in b["index"].tolist()]
    whole = {i: b for b in train_batches(train, 1, seed=0, epoch=4) for i in b["index"].tolist()}
    split = broken_split(train, [order[3], order[4], order[21]], skip=True)
    batches = list(train_batches(split, 2, seed=0, epoch=4))
    expected = list(order)
    expected[3] = expected[4] = order[5]
    expected[21] = order[0]
    assert [i for b in batches for i in b["index"].tolist()] == expected
    for batch in batches:
        for i, image, label in zip(batch["index"], batch["image"], batch["label"], strict=True):
            np.testing.assert_array_equal(image, whole[int(i)]["image"][0])
            assert label == train.labels[i]
    later = list(train_batches(split, 2, seed=0, epoch=4, start_step=2))
    assert_same(later, batches[2:])
    assert len(split.skipped) == 3


def test_a_split_of_which_nothing_can_be_read_is_refused(made):
    split = broken_split(load(made).test, range(10), skip=True)
    with pytest.raises(ValueError, match="none of the 10 images of a split can be read"):
        next(train_batches(split, 5, seed=0, epoch=0))
    split = broken_split(load(made).test, range(10), skip=True)
    with pytest.raises(ValueError, match="none of the 10 images of a split can be read"):
        list(eval_batches(split, 4))


@pytest.mark.parametrize(
    ("positions", "labels", "message"),
    [
        ([0, 1], [0], "2 images but 1 labels"),
        ([], [], "a split must hold images"),
        ([0, 1], [0, -1], "labels must be 0 or more, but the smallest is -1"),
    ],
)
def test_unfit_splits_are_refused(positions, labels, message):
    with pytest.raises(ValueError, match=message):
        StreamedSplit(
            records=Broken(None, []),
            positions=np.array(positions, np.int64),
            labels=np.array(labels, np.int32),
            settings=SETTINGS,
        )


def test_the_shorter_side_goes_with_the_image_size():
    assert StreamSettings(image_size=224).resized_side == 256
    assert StreamSettings(image_size=224, shorter_side=232).resized_side == 232
    assert StreamSettings(image_size=32).resized_side == 37
