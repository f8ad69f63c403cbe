"""Small TFDS builders made here: PNG bytes in, so that neither TensorFlow nor the net is needed."""

import io
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download.checksums import UrlInfo

SIZE = 6
CLASSES = 4
SPLITS = {"train": 20, "test": 8}


def tiny_images(split):
    seed = list(SPLITS).index(split) if split in SPLITS else 9
    return np.random.default_rng(seed).integers(
        0, 256, (SPLITS.get(split, 4), SIZE, SIZE, 3), dtype=np.uint8
    )


def ragged_images(split):
    return [image[: SIZE - i % 2] for i, image in enumerate(tiny_images(split))]


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    stream.seek(0)
    return stream


class TinyBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.2.0")
    splits = tuple(SPLITS)
    shape = (SIZE, SIZE, 3)
    label = tfds.features.ClassLabel(num_classes=CLASSES)

    def _info(self):
        return self.info_of(tfds.features.Image(shape=self.shape))

    def info_of(self, image):
        features = {"image": image, "label": self.label}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in self.splits}

    def _generate_examples(self, split):
        for i, image in enumerate(self.images(split)):
            yield i, {"image": png(image), "label": i % CLASSES}

    def images(self, split):
        return tiny_images(split)


class TinySet(TinyBuilder):
    pass


class TinyValidated(TinyBuilder):
    splits = ("train", "validation", "test")


class TinyTrainOnly(TinyBuilder):
    splits = ("train",)


class TinyUnlabelled(TinyBuilder):
    label = np.int64


class TinyDeep(TinyBuilder):
    """16 bits a pixel: the images of TinySet times 256, and something below."""

    def _info(self):
        return self.info_of(tfds.features.Tensor(shape=self.shape, dtype=np.uint16))

    def _generate_examples(self, split):
        for i, image in enumerate(self.images(split)):
            yield i, {"image": image * np.uint16(256) + np.uint16(99), "label": i % CLASSES}


class TinyFloat(TinyBuilder):
    """The images of TinySet, from 0 to 1."""

    def _info(self):
        return self.info_of(tfds.features.Tensor(shape=self.shape, dtype=np.float32))

    def _generate_examples(self, split):
        for i, image in enumerate(self.images(split)):
            yield i, {"image": image / np.float32(255), "label": i % CLASSES}


class TinyFloatRagged(TinyFloat):
    shape = (None, SIZE, 3)


class TinyRagged(TinyBuilder):
    shape = (None, None, 3)

    def images(self, split):
        return ragged_images(split)


class Imagenet2012(TinyRagged):
    """As imagenet2012 has it: the labels of the test split are unknown."""

    splits = ("train", "validation", "test")

    def _generate_examples(self, split):
        for i, example in super()._generate_examples(split):
            yield i, example | ({"label": -1} if split == "test" else {})


class TinyDownloaded(TinyBuilder):
    """Says that it needs an archive from a port where nobody listens."""

    url_infos: ClassVar = {
        "http://127.0.0.1:9/tiny.tar.gz": UrlInfo(size=1, checksum="0" * 64, filename="tiny.tar.gz")
    }
