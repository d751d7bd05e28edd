"""Make a reference batch from a folder of images: what evaluator.py compares samples with.

    python evaluations/make_reference.py DATA_DIR OUT.npz --image_size 64

The .npz holds the statistics of all images (mu, sigma, mu_s, sigma_s), and up to 10,000 of them, chosen at random, for
precision and recall (arr_0; arr_1 their labels, where file names have labels). Images are cropped as in training.
"""

import argparse
import os
import sys
import zlib

import numpy as np
import torch as th

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from evaluations.errors import EvaluationError  # noqa: E402
from evaluations.evaluator import add_network_flags, choose_device, load_inception, run_evaluation  # noqa: E402
from evaluations.features import progress, say  # noqa: E402
from evaluations.files import write_arrays  # noqa: E402
from evaluations.metrics import Moments  # noqa: E402
from evaluations.ranks import Ranks  # noqa: E402

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp")


def main():
    args = create_argparser().parse_args()
    ranks = Ranks()
    run_evaluation(lambda: make_reference(args, ranks), ranks)


def make_reference(args, ranks):
    """Write the reference batch."""
    if args.image_size < 1 or args.batch_size < 1 or args.num_images < 4:
        raise EvaluationError("--image_size and --batch_size must be at least 1, --num_images at least 4")
    paths = list_images(args.data_dir)
    if len(paths) < 4:
        raise EvaluationError(f"{args.data_dir}: {len(paths)} images; a reference needs at least 4")
    chosen = np.sort(np.random.default_rng(args.seed).permutation(len(paths))[: args.num_images])
    moments, seen = {}, chosen
    if not args.no_statistics:
        if args.channels != 3:
            raise EvaluationError(f"--channels {args.channels}: Inception takes colours; give --no_statistics, too")
        network, _ = load_inception(args.inception_path, args.dtype, choose_device(args.device, ranks), ranks)
        moments, seen = {"pool": Moments(network.pool_dim), "spatial": Moments(network.spatial_dim)}, range(len(paths))

    kept, wanted = [], set(chosen.tolist())
    mine = ranks.share(len(seen), args.batch_size)
    with progress(ranks, total=len(mine), desc=os.path.basename(args.data_dir.rstrip("/"))) as bar:
        for start in range(mine.start, mine.stop, args.batch_size):
            indices = seen[start : min(start + args.batch_size, mine.stop)]
            images = np.stack([read_image(paths[i], args.image_size, args.channels) for i in indices])
            if moments:
                for kind, features in zip(moments, network(th.from_numpy(images).to(network.device))):
                    moments[kind].update(features.cpu().numpy())
            kept += [image for i, image in zip(indices, images) if i in wanted]
            bar.update(len(indices))
    gathered = ranks.gather((moments, kept))
    if gathered is None:
        return
    for others, images in gathered[1:]:
        for kind in moments:
            moments[kind].merge(others[kind])
        kept += images
    arrays = {"arr_0": np.stack(kept)}
    labels = labels_of(paths)
    if labels is not None:
        arrays["arr_1"] = labels[chosen]
    for kind, suffix in (("pool", ""), ("spatial", "_s")):
        if moments:
            arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = moments[kind].statistics()
    write_arrays(args.out, arrays)
    say(ranks, f"{args.out}: {len(kept)} images" + (f", and statistics of all {len(paths)}" if moments else ""))


def list_images(folder):
    """The paths of all images in a folder and those below it, sorted."""
    if not os.path.isdir(folder):
        raise EvaluationError(f"{folder}: no such folder")
    found = [
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(EXTENSIONS)
    ]
    return sorted(found)


def labels_of(paths):
    """Labels by file names up to the first underscore, numbered in sorted order: int64 [N]; None without any."""
    names = [os.path.basename(path).partition("_") for path in paths]
    if not all(underscore for _, underscore, _ in names):
        return None
    table = {name: i for i, name in enumerate(sorted({name for name, *_ in names}))}
    return np.array([table[name] for name, *_ in names], dtype=np.int64)


def read_image(path, size, channels=3):
    """An image, shrunk by halves with a box filter and then bicubic until its shorter side is `size`; its middle.

    :return: uint8 [size, size, channels].
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, zlib.error) as e:
        raise EvaluationError(f"{path}: cannot read this image ({e}): repair or remove it") from None
    while min(image.size) >= 2 * size:
        image = image.resize([x // 2 for x in image.size], Image.BOX)
    scale = size / min(image.size)
    arr = np.asarray(image.resize([round(x * scale) for x in image.size], Image.BICUBIC))
    y, x = ((side - size) // 2 for side in arr.shape[:2])
    return arr[y : y + size, x : x + size].reshape(size, size, channels)


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", help="a folder of images, searched recursively")
    parser.add_argument("out", help="the .npz to write")
    parser.add_argument("--image_size", type=int, required=True, help="the side to crop to")
    parser.add_argument("--num_images", type=int, default=10_000, help="images to keep (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of their choice")
    parser.add_argument("--no_statistics", action="store_true", help="only keep images, which needs no Inception graph")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1 for grey images (default: 3)")
    add_network_flags(parser)
    return parser


if __name__ == "__main__":
    main()
