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
from evaluations.evaluator import DTYPES, choose_device, find_graph_once, progress, run_evaluation, say  # noqa: E402
from evaluations.inception import POOL_DIM, SPATIAL_DIM, InceptionV3, read_graph  # noqa: E402
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
    device = choose_device(args.device, ranks)
    graph = find_graph_once(args.inception_path, ranks)
    network = InceptionV3(read_graph(graph), DTYPES[args.dtype]).to(device)

    moments, kept = measure(args, ranks, network, paths, set(chosen.tolist()))
    if ranks.rank != 0:
        return
    arrays = {"arr_0": np.stack(kept)}
    labels = labels_of(paths)
    if labels is not None:
        arrays["arr_1"] = labels[chosen]
    for kind, suffix in (("pool", ""), ("spatial", "_s")):
        arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = moments[kind].statistics()
    write(args.out, arrays)
    say(ranks, f"{args.out}: statistics of {len(paths)} images, and {len(kept)} of them")


def measure(args, ranks, network, paths, chosen):
    """The moments of all images' features, and the chosen images; on every rank, of what all have seen."""
    mine, device = ranks.share(len(paths)), network.softmax_weights.device
    moments, kept = {"pool": Moments(POOL_DIM), "spatial": Moments(SPATIAL_DIM)}, []
    with progress(ranks, total=len(mine), desc=os.path.basename(args.data_dir.rstrip("/"))) as bar:
        for start in range(mine.start, mine.stop, args.batch_size):
            indices = range(start, min(start + args.batch_size, mine.stop))
            images = np.stack([read_image(paths[i], args.image_size) for i in indices])
            for kind, features in zip(moments, network(th.from_numpy(images).to(device))):
                moments[kind].update(features.cpu().numpy())
            kept += [image for i, image in zip(indices, images) if i in chosen]
            bar.update(len(indices))
    gathered = ranks.gather((moments, kept))
    for others, _ in gathered[1:]:
        for kind in moments:
            gathered[0][0][kind].merge(others[kind])
    return gathered[0][0], [image for _, images in gathered for image in images]


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


def read_image(path, size):
    """An image, shrunk by halves with a box filter and then bicubic until its shorter side is `size`; its middle."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, zlib.error) as e:
        raise EvaluationError(f"{path}: cannot read this image ({e}): repair or remove it") from None
    while min(image.size) >= 2 * size:
        image = image.resize([x // 2 for x in image.size], Image.BOX)
    scale = size / min(image.size)
    arr = np.asarray(image.resize([round(x * scale) for x in image.size], Image.BICUBIC))
    y, x = ((side - size) // 2 for side in arr.shape[:2])
    return arr[y : y + size, x : x + size]


def write(path, arrays):
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            np.savez(f, **arrays)
        os.replace(temporary, path)
    except OSError as e:
        raise EvaluationError(f"{path}: cannot be written ({e.strerror})") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", help="a folder of images, searched recursively")
    parser.add_argument("out", help="the .npz to write")
    parser.add_argument("--image_size", type=int, required=True, help="the side to crop to")
    parser.add_argument("--num_images", type=int, default=10_000, help="images to keep (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of their choice")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time (default: 32)")
    parser.add_argument("--device", default="", help="such as cpu or cuda:1; by default a GPU, if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the network (default: fp32)")
    parser.add_argument("--inception_path", default="", help="the graph; by default found, or downloaded")
    return parser


if __name__ == "__main__":
    main()
