"""Make a reference batch from a folder of images, as the first argument of evaluator.py.

    python evaluations/make_reference.py DATA_DIR OUT.npz --image_size 64

The .npz file holds the statistics mu, sigma, mu_s and sigma_s of all images. For precision and recall, the .npz file
also holds up to 10,000 images, chosen at random (arr_0), and their labels (arr_1), if file names contain labels. Images
are cropped as in training.
"""

import argparse
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from evaluations.evaluator import add_network_flags, load_inception  # noqa: E402
from evaluations.features import FEWEST, Features, gather_on_rank_0, share  # noqa: E402
from evaluations.output import say, write_output  # noqa: E402
from guided_diffusion import dist_util  # noqa: E402
from guided_diffusion.errors import InputError, check_at_least  # noqa: E402
from guided_diffusion.image_decoding import MODES, center_crop_arr, read_image  # noqa: E402
from guided_diffusion.image_listing import image_classes, list_images, number_classes  # noqa: E402
from guided_diffusion.logger import progress_bar  # noqa: E402


class ImageFiles:
    """A batch of image files, with the interface that Features expects. Reading an image also stores the image
    if it is selected for the reference batch.

    :param channels: 1 or 3. With one channel, images are repeated to three equal channels for the network.
    :param chosen: the indices of the images to store.
    :ivar kept: the chosen images that this rank has read, as arrays [image_size, image_size, channels].
    """

    def __init__(self, folder, paths, image_size, channels, chosen):
        self.path, self.paths, self.image_size, self.channels = folder.rstrip("/"), paths, image_size, channels
        self.chosen, self.kept = set(chosen), []

    def __len__(self):
        return len(self.paths)

    def images(self, start, stop, batch_size):
        for first in range(start, stop, batch_size):
            batch = [self.read(i) for i in range(first, min(first + batch_size, stop))]
            yield np.stack(batch).repeat(3 // self.channels, axis=3)

    def read(self, i):
        """Return the image with index i, uint8 [image_size, image_size, channels]."""
        image = center_crop_arr(read_image(self.paths[i], MODES[self.channels]), self.image_size)
        image = image.reshape(self.image_size, self.image_size, self.channels)
        if i in self.chosen:
            self.kept.append(image)
        return image

    def place(self, first, last):
        return f"{self.paths[first]} to {self.paths[last]}"


def main():
    args = create_argparser().parse_args()
    dist_util.setup_dist()
    check_at_least(1, image_size=args.image_size, batch_size=args.batch_size)
    check_at_least(FEWEST, num_images=args.num_images)
    check_at_least(0, seed=args.seed)
    paths = list_images(args.data_dir)
    if len(paths) < FEWEST:
        raise InputError(f"{args.data_dir}: {len(paths)} images; a reference needs at least {FEWEST}")
    chosen = np.sort(np.random.default_rng(args.seed).permutation(len(paths))[: args.num_images])
    images = ImageFiles(args.data_dir, paths, args.image_size, args.channels, chosen.tolist())
    arrays = {}
    if args.no_statistics:
        mine = share(len(chosen), args.batch_size)
        for i in progress_bar(iterable=chosen[mine.start : mine.stop], desc="reading images", unit="image"):
            images.read(i)
    else:
        network, _ = load_inception(args.inception_path, args.dtype, args.device)
        features = Features(network, images, args.batch_size, ["fid", "sfid"])
    gathered = gather_on_rank_0(images.kept)
    if not gathered:
        return
    arrays["arr_0"] = np.stack([image for kept in gathered for image in kept])
    if all("_" in os.path.basename(path) for path in paths):
        labels = number_classes(paths, *image_classes(args.data_dir, paths))
        arrays["arr_1"] = np.array(labels, dtype=np.int64)[chosen]
    if not args.no_statistics:
        for kind, suffix in (("pool", ""), ("spatial", "_s")):
            arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = features.moments[kind].statistics()
    with write_output(args.out) as f:
        np.savez(f, **arrays)
    say(f"{args.out}: {len(chosen)} images" + ("" if args.no_statistics else f"; statistics of {len(paths)} images"))


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", help="a folder of images, searched recursively")
    parser.add_argument("out", help="the .npz file to write")
    parser.add_argument("--image_size", type=int, required=True, help="side of the cropped images in pixels")
    parser.add_argument("--num_images", type=int, default=10_000, help="number of images to store (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed for choosing the images to store (default: 0)")
    parser.add_argument("--no_statistics", action="store_true", help="store only images; needs no Inception graph")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1 for grey images (default: 3)")
    add_network_flags(parser)
    return parser


if __name__ == "__main__":
    main()
