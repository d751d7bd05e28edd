"""Train an upsampler: a TrainLoop that makes the small images from the large ones."""

import torch.nn.functional as F

from . import dist_util
from .errors import InputError
from .image_datasets import fixed_images
from .train_util import TrainLoop


class UpsamplerTrainLoop(TrainLoop):
    """Trains a diffusion model of large images given small images, which it makes from the large ones on the device.

    :param small_size: the side of the small images.
    :param kwargs: the arguments of TrainLoop. The data are the large images.
    """

    def __init__(self, *, small_size, **kwargs):
        self.small_size = small_size
        super().__init__(**kwargs)

    def prepare(self, batch, cond):
        batch = batch.to(dist_util.dev())
        return batch, {**cond, "low_res": shrink(batch, self.small_size)}


def shrink(images, size):
    """Resize images [N, C, H, W] to [N, C, size, size]. Each new pixel is the mean of the old pixels that it covers."""
    return F.interpolate(images, (size, size), mode="area")


def check_sizes(large_size, small_size):
    """Raise InputError unless the small size is positive and at most the large one."""
    if not 0 < small_size <= large_size:
        raise InputError(f"--small_size {small_size} must be from 1 to --large_size {large_size}")


def fixed_conditions(dataset, small_size, count, skip_bad_images=False):
    """Return model arguments for previews: `count` small images from a data set as low_res, and perhaps their labels.

    :param dataset: an ImageDataset.
    """
    images, labels = fixed_images(dataset, count, skip_bad_images)
    return {"low_res": shrink(images, small_size), **labels}
