import numpy as np
import pytest

from falcon_jax.data.batching import eval_batches, steps_per_epoch, train_batches
from falcon_jax.data.dataset import Split


def make_split(n):
    images = np.random.default_rng(n).integers(0, 256, (n, 3, 2, 1), dtype=np.uint8)
    return Split(images=images, labels=np.arange(n, dtype=np.int32) % 7)


@pytest.mark.parametrize(("n", "batch", "steps"), [(10, 3, 3), (9, 3, 3), (3, 3, 1), (5, 1, 5)])
def test_steps_per_epoch(n, batch, steps):
    assert steps_per_epoch(n, batch) == steps
    assert len(list(train_batches(make_split(n), batch, seed=0, epoch=0))) == steps


def test_train_batches_are_the_images_at_their_indices():
    split = make_split(23)
    for batch in train_batches(split, 5, seed=3, epoch=1):
        np.testing.assert_array_equal(batch["image"], split.images[batch["index"]])
        np.testing.assert_array_equal(batch["label"], split.labels[batch["index"]])
        assert [batch[k].dtype for k in ("image", "label", "index")] == [
            np.uint8,
            np.int32,
            np.int32,
        ]


def indices(n, batch, **options):
    return [b["index"].tolist() for b in train_batches(make_split(n), batch, **options)]


def test_an_epoch_shows_each_image_at_most_once():
    shown = [i for batch in indices(23, 5, seed=0, epoch=0) for i in batch]
    assert len(shown) == len(set(shown)) == 20
    assert set(shown) < set(range(23))


def test_order_depends_on_seed_and_epoch_only():
    first = indices(40, 8, seed=1, epoch=2)
    assert first == indices(40, 8, seed=1, epoch=2)
    assert first != indices(40, 8, seed=1, epoch=3)
    assert first != indices(40, 8, seed=2, epoch=2)
    assert first != indices(40, 8, seed=2, epoch=1)


@pytest.mark.parametrize("start", range(6))
def test_restarted_epoch_goes_on_where_it_was(start):
    whole = indices(40, 8, seed=1, epoch=2)
    assert indices(40, 8, seed=1, epoch=2, start_step=start) == whole[start:]


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_eval_batches_count_every_image_exactly_once(n, batch):
    split = make_split(n)
    batches = list(eval_batches(split, batch))
    assert {b["image"].shape for b in batches} == {(batch, 3, 2, 1)}
    assert {b["mask"].dtype for b in batches} == {np.dtype(np.float32)}
    mask = np.concatenate([b["mask"] for b in batches])
    real = mask == 1
    assert mask.sum() == real.sum() == n
    images = np.concatenate([b["image"] for b in batches])
    labels = np.concatenate([b["label"] for b in batches])
    np.testing.assert_array_equal(images[real], split.images)
    np.testing.assert_array_equal(labels[real], split.labels)
    assert labels.dtype == np.int32
    assert not images[~real].any()


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (11, {}, "batch_size 11 is larger than the training split of 10 images"),
        (0, {}, "batch_size must be 1 or more, but is 0"),
        (4, {"start_step": 3}, r"start_step must lie in \[0, 2\], but is 3"),
        (4, {"start_step": -1}, r"start_step must lie in \[0, 2\], but is -1"),
        (4, {"epoch": -1}, "0 or more"),
    ],
)
def test_train_refusals_come_before_the_first_batch(batch, options, message):
    with pytest.raises(ValueError, match=message):
        train_batches(make_split(10), batch, **{"seed": 0, "epoch": 0, **options})


def test_eval_refuses_empty_batches():
    with pytest.raises(ValueError, match="batch_size must be 1 or more, but is -2"):
        eval_batches(make_split(3), -2)
