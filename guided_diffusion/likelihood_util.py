"""Compute the variational bound on the negative log-likelihood of images, in bits per dimension, on all ranks."""

import torch as th

from . import dist_util, logger
from .errors import check_at_least
from .image_datasets import each_once
from .random_util import SampleNoise

TERMS = ("vb", "xstart_mse", "mse")  # terms for each timestep, from the last to the first


@th.no_grad()
def bits_per_dim(diffusion, model, dataset, batch_size, count=None, seed=0, clip_denoised=True, num_workers=0):
    """Bound the negative log-likelihood of images. Every rank must call this function; all ranks get the same result.

    Each image counts once. The noise of image i is a function of (seed, i), and does not depend on ranks and batches.

    :param model: called as model(x, t, **labels).
    :param dataset: an ImageDataset without random crops and flips.
    :param count: the number of images to use, from the start of the dataset. The default is all images.
    :return: a dict of float64 arrays: "total_bpd" and "prior_bpd" [number of images] in the order of the images, and
        the terms of GaussianDiffusion.calc_bpd_loop, averaged over the images [num_timesteps].
    """
    check_at_least(1, batch_size=batch_size, num_samples=1 if count is None else count)
    check_at_least(0, num_workers=num_workers)
    device, total = dist_util.dev(), min(len(dataset), count or len(dataset))
    found = th.zeros(0, 3, dtype=th.float64)  # index, total and prior of each image
    sums = th.zeros(1, len(TERMS), diffusion.num_timesteps, dtype=th.float64)
    with logger.progress_bar(total=total, desc="likelihood", unit="image") as bar:
        for indices, batch, cond in each_once(dataset, batch_size, num_workers, count):
            noise = SampleNoise(seed, indices, device)
            terms = diffusion.calc_bpd_loop(
                model,
                batch.to(device),
                clip_denoised=clip_denoised,
                model_kwargs={k: v.to(device) for k, v in cond.items()},
                randn_like=noise.randn_like,
            )
            rows = [th.tensor(list(indices)), terms["total_bpd"].cpu(), terms["prior_bpd"].cpu()]
            found = th.cat([found, th.stack([row.double() for row in rows], dim=1)])
            sums[0] += th.stack([terms[name].double().sum(dim=0).cpu() for name in TERMS])
            bar.update(min(len(indices) * dist_util.get_world_size(), total - bar.n))
    found = th.cat(dist_util.all_gather_uneven(found))
    found = found[found[:, 0].argsort()].numpy()
    means = th.cat(dist_util.all_gather_uneven(sums)).sum(dim=0).numpy() / len(found)
    return {"total_bpd": found[:, 1], "prior_bpd": found[:, 2], **dict(zip(TERMS, means))}
