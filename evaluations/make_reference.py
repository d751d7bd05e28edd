"""Make a reference batch from a folder of images: what evaluator.py compares samples with.

    python evaluations/make_reference.py DATA_DIR OUT.npz --image_size 64

The .npz holds the statistics of all images (mu, sigma, mu_s, sigma_s), and up to 10,000 of them, chosen at random, for
precision and recall (arr_0; arr_1 their labels, where file names have labels). Images are cropped as in training.
"""

import argparse
import os
import sys
import warnings

import numpy as np
import torch as th

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from evaluations.errors import EvaluationError  # noqa: E402
from evaluations.evaluator import add_network_flags, choose_device, load_inception, run_evaluation  # noqa: E402
from evaluations.features import check_finite, progress, say  # noqa: E402
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
    if args.image_size < 1 or args.batch_size < 1 or args.num_images < 4 or args.seed < 0:
        raise EvaluationError("--image_size and --batch_size must be at least 1, --num_images at least 4, --seed 0")
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
                found = network(th.from_numpy(images).to(network.device))
                check_finite(*found, f"{paths[indices[0]]} to {paths[indices[-1]]}")
                for kind, features in zip(moments, found):
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
    """The paths of all images in a folder and those below it, also by links, sorted."""
    if not os.path.isdir(folder):
        raise EvaluationError(f"{folder}: {'not a folder' if os.path.exists(folder) else 'no such folder'}")
    found, above = [], {folder: ()}  # by folder, those it lies in: a link to one of them would never end
    for parent, folders, names in os.walk(folder, followlinks=True):
        lies_in = (*above.pop(parent), os.path.realpath(parent))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(parent, name)) not in lies_in]
        above.update((os.path.join(parent, name), lies_in) for name in folders)
        found += [os.path.join(parent, name) for name in names if name.lower().endswith(EXTENSIONS)]
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

    The pixels are those that training sees.

    :return: uint8 [size, size, channels].
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about metadata that nobody reads
            with Image.open(path) as image:
                image.load()
                turn = _turn_upright(image)
                image = _to_mode(image, "RGB" if channels == 3 else "L")
    except MemoryError:
        raise
    except Exception as e:  # what decoders make of a damaged file is hard to foresee
        reason = " ".join(str(e).split()) or type(e).__name__
        raise EvaluationError(f"{path}: cannot read this image ({reason}): repair or remove it") from None
    if turn is not None:
        image = image.transpose(turn)
    while min(image.size) >= 2 * size:
        image = image.resize([x // 2 for x in image.size], Image.BOX)
    scale = size / min(image.size)
    arr = np.asarray(image.resize([round(x * scale) for x in image.size], Image.BICUBIC))
    y, x = ((side - size) // 2 for side in arr.shape[:2])
    return arr[y : y + size, x : x + size].reshape(size, size, channels)


def _turn_upright(image):
    """How to transpose a loaded image so that it is upright, by its EXIF orientation; None where that is not known."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        return turns.get(image.getexif().get(0x0112))
    except Exception:  # damaged, as advice may be
        return None


def _to_mode(image, mode):
    """Convert a loaded image. 16 bits of grey lose the lower 8, as those of colours do: Pillow would clip them."""
    from PIL import Image

    image.info.pop("transparency", None)  # it changes no pixel here, but can make Pillow fail
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}, whose range is open: save it with 8 bits")
    return image if image.mode == mode else image.convert(mode)


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
