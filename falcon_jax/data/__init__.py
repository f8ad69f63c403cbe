"""Data: sources, held-out splits, batches, and augmentation on the device."""

from falcon_jax.data.augmentation import Augmentation as Augmentation
from falcon_jax.data.augmentation import augment as augment
from falcon_jax.data.augmentation import normalize as normalize
from falcon_jax.data.augmentation import random_crop as random_crop
from falcon_jax.data.augmentation import random_flip as random_flip
from falcon_jax.data.batching import eval_batches as eval_batches
from falcon_jax.data.batching import steps_per_epoch as steps_per_epoch
from falcon_jax.data.batching import train_batches as train_batches
from falcon_jax.data.dataset import AnySplit as AnySplit
from falcon_jax.data.dataset import Dataset as Dataset
from falcon_jax.data.dataset import Split as Split
from falcon_jax.data.dataset import hold_out as hold_out
from falcon_jax.data.fake import make_image_folder as make_image_folder
from falcon_jax.data.loading import SOURCES as SOURCES
from falcon_jax.data.loading import DataConfig as DataConfig
from falcon_jax.data.loading import load_dataset as load_dataset
from falcon_jax.data.streamed import StreamedSplit as StreamedSplit
from falcon_jax.data.streamed import StreamSettings as StreamSettings
from falcon_jax.data.tfds import prepare as prepare
