"""Making many samples over all ranks, and writing them as an .npz and a picture."""

import math

import numpy as np
import torch as th
from PIL import Image

from . import checkpoint_util, dist_util, files, logger
from .errors import InputError
from .logger import progress_bar
from .random_util import SampleNoise, random_labels
from .script_util import parse_numbers


def sampling_flags():
    """The flags that all sampling scripts share, with their defaults."""
    return dict(
        clip_denoised=True,
        num_samples=10000,
        batch_size=16,
        use_ddim=False,
        model_path="",
        classes="",
        log_dir="",
        seed=0,
    )


def prepare_network(model, path, half=None):
    """Load weights into a network and make it ready to sample with on this rank's device.

    :param half: "fp16" or "bf16" for a torso of reduced precision.
    """
    checkpoint_util.load_weights(model, path)
    model.to(dist_util.dev()).eval().requires_grad_(False)
    if half:
        getattr(model, f"convert_to_{half}")()
    return model


def half_name(use_fp16, use_bf16):
    """The name of the precision that a pair of flags chooses, or None for float32."""
    return "fp16" if use_fp16 else "bf16" if use_bf16 else None


def choose_labels(classes, num_samples, num_classes, seed):
    """The label of every sample: int64 [num_samples]; None where num_classes is None, for a model without labels.

    :param classes: "" draws uniformly; "balanced" makes as many of each class as can be; "207,360" takes turns among
        those.
    """
    if num_classes is None:
        if classes:
            raise InputError(f"--classes {classes}: the model is not class-conditional")
        return None
    if not classes:
        return random_labels(seed, range(num_samples), num_classes)
    chosen = tuple(range(num_classes)) if classes == "balanced" else parse_numbers("classes", classes, int)
    if not chosen:
        raise InputError(f"--classes {classes!r}: give class numbers with commas between them")
    outside = [c for c in chosen if not 0 <= c < num_classes]
    if outside:
        raise InputError(f"--classes {classes}: class {outside[0]} is outside the model's 0..{num_classes - 1}")
    return th.tensor([chosen[i % len(chosen)] for i in range(num_samples)])


def generate(diffusion, model, shape, *, num_samples, batch_size, seed, labels=None, cond_fn=None, use_ddim=False,
             clip_denoised=True):  # fmt: skip
    """Make samples on all ranks, with a progress bar on rank 0.

    Sample i's noise depends on (seed, i) alone. Batches are dealt to the ranks in turn; the last may be shorter.

    :param model: called as model(x, t, y=labels), or without y where there are none.
    :param shape: (C, H, W) of a sample.
    :param labels: int64 [num_samples], or None.
    :return: on rank 0, uint8 [num_samples, H, W, C]; None on others.
    """
    for name, value in [("num_samples", num_samples), ("batch_size", batch_size)]:
        if value < 1:
            raise InputError(f"--{name} {value}: at least 1 is needed")
    rank, world_size = dist_util.get_rank(), dist_util.get_world_size()
    starts = range(0, num_samples, batch_size)
    rounds = math.ceil(len(starts) / world_size)
    loop = diffusion.ddim_sample_loop_progressive if use_ddim else diffusion.p_sample_loop_progressive
    images = np.empty((num_samples, *shape[1:], shape[0]), dtype=np.uint8) if rank == 0 else None
    with progress_bar(total=rounds * diffusion.num_timesteps, desc="sampling", unit="step") as bar:
        for r in range(rounds):
            start = (r * world_size + rank) * batch_size
            indices = range(start, min(start + batch_size, num_samples))
            batch = th.zeros(0, *shape[1:], shape[0], dtype=th.uint8, device=dist_util.dev())
            if len(indices):
                noise = SampleNoise(seed, indices, dist_util.dev())
                steps = loop(
                    model,
                    (len(indices), *shape),
                    noise=noise.randn(*shape),
                    clip_denoised=clip_denoised,
                    cond_fn=cond_fn,
                    model_kwargs={} if labels is None else {"y": labels[start : indices.stop].to(dist_util.dev())},
                    randn_like=noise.randn_like,
                )
                for out in steps:
                    bar.update()
                batch = to_uint8(out["sample"], start)
            for i, part in enumerate(dist_util.all_gather_uneven(batch)):
                first = (r * world_size + i) * batch_size
                if rank == 0 and len(part):
                    images[first : first + len(part)] = part.cpu().numpy()
    return images


def to_uint8(sample, start=0):
    """Images [N, C, H, W] in [-1, 1] as uint8 [N, H, W, C].

    :param start: the index of the first, for errors.
    """
    bad = ~sample.isfinite().flatten(1).all(dim=1)
    if bad.any():
        raise InputError(
            f"sample {start + int(bad.nonzero()[0])} is not finite: the model's weights or precision are at fault (try "
            f"--use_fp16 False)"
        )
    return ((sample + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()


def save_samples(images, labels=None):
    """Write samples_NxHxWxC.npz (arr_0 images, arr_1 labels if any) and a picture of them to the run's folder.

    Rank 0 writes; every rank may call it.
    """
    if dist_util.get_rank() == 0:
        stem = files.join(logger.get_dir(), f"samples_{'x'.join(map(str, images.shape))}")
        arrays = [images] if labels is None else [images, labels.numpy()]
        with files.write_atomically(f"{stem}.npz") as f:
            np.savez(f, *arrays)
        save_grid(f"{stem}.png", images, None if labels is None else labels.numpy())
        logger.log(f"wrote {stem}.npz and .png")
    dist_util.barrier()


def save_grid(path, images, labels=None, columns=16, rows=16):
    """Write images [N, H, W, C] as one PNG: a row for each class where there are labels of few classes, else a square.

    Images under 64 pixels are enlarged by a whole factor, so that one can see them.
    """
    classes = [] if labels is None else sorted(set(labels.tolist()))
    if 1 < len(classes) <= rows:
        by_class = [images[labels == c][:columns] for c in classes]
        columns = max(map(len, by_class))
    else:
        columns = min(columns, math.ceil(math.sqrt(len(images))))
        by_class = [images[i : i + columns] for i in range(0, min(len(images), columns * rows), columns)]
    height, width, channels = images.shape[1:]
    gap = 1
    canvas = np.full((len(by_class) * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for r, row in enumerate(by_class):
        for c, image in enumerate(row):
            y, x = r * (height + gap), c * (width + gap)
            canvas[y : y + height, x : x + width] = image
    picture = Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)
    factor = max(1, 64 // min(height, width))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)
    with files.write_atomically(path) as f:
        picture.save(f, format="PNG")
