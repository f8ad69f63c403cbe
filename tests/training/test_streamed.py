"""Training on images that are read from a folder while it goes on."""

import jax
import numpy as np
import pytest

from falcon_jax.data.fake import make_image_folder
from falcon_jax.data.loading import DataConfig, load_dataset
from falcon_jax.training import loop
from falcon_jax.training.config import check_config, default_config
from falcon_jax.training.evaluation import evaluate, make_eval_step
from falcon_jax.training.experiment import begin, run_experiment
from falcon_jax.training.loop import train
from falcon_jax.training.network import Network
from tests.training.tiny import Tiny, tiny_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_image_folder(
        tmp_path_factory.mktemp("made") / "set", num_classes=4, num_train=200, num_val=41, side=20
    )


def load(folder, **options):
    return load_dataset(DataConfig(source="folder", data_dir=str(folder), image_size=16, **options))


def started(run):
    return train(run, *Network.split(Tiny(dropout=0.1))).arrays


def test_learns_and_goes_on_from_an_interruption_to_the_same_parameters(
    folder, tmp_path, monkeypatch
):
    options = {"dataset": load(folder), "learning_rate": 0.2, "batch_size": 24, "epochs": 4}
    whole = tiny_job(tmp_path / "whole", **options)
    trained = started(whole)
    network, *_ = Network.split(Tiny(dropout=0.1))
    eval_step = make_eval_step(network, whole.preprocessing)
    result = evaluate(eval_step, *trained, whole.dataset.test, batch_size=16, mesh=whole.mesh)
    assert result.count == 41
    assert result.top1 > 0.6

    batches = loop.train_batches

    def interrupted(*arguments, epoch, **options):
        for index, batch in enumerate(batches(*arguments, epoch=epoch, **options)):
            if (epoch, index) == (2, 3):
                raise KeyboardInterrupt
            yield batch

    run = tiny_job(tmp_path / "interrupted", **options)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            started(run)
    for one, other in zip(jax.tree.leaves(started(run)), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(one, other)


def folder_config(folder, **fields):
    config = default_config()
    config.data.update({"source": "folder", "data_dir": str(folder), "image_size": 16})
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def test_augmentation_on_the_device_is_refused_for_streamed_images(folder, tmp_path):
    config = folder_config(folder, data__augmentation__flip=True)
    told = r"^config\.data\.augmentation\.flip: the images of set are streamed, .* flip False$"
    with pytest.raises(ValueError, match=told):
        run_experiment(check_config(config), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_calibration_inputs_and_shapes_come_from_streamed_images(folder, tmp_path):
    config = folder_config(folder)
    config.train.batch_size = 8
    checked = check_config(config)
    with begin(checked, tmp_path / "new") as workspace:
        assert workspace.sample(2).shape == (2, 16, 16, 3)
        first, second = workspace.inputs(checked.train, 2)
    assert first.shape == second.shape == (8, 16, 16, 3)
    assert first.dtype == np.float32
    assert -2.2 < float(first.min()) < float(first.max()) < 2.7
