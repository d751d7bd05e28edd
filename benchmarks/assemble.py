"""Pass many images through a sampling job, and measure how much memory grows on each rank.

    mpiexec -n 2 python benchmarks/assemble.py --num_samples 20000 --size 128

The benchmark writes noise images (20,000 images of 128x128 are 983 MB) as shards, and assembles the shards into one
.npz file and a picture, as scripts/image_sample.py does with samples of a network. For each rank, the benchmark reports
the growth of peak resident memory relative to a job with one batch per rank. Then the benchmark checks every image in
the .npz file. The exit status is 1 if an image differs, or if a rank's memory grew by more than --most MB.
"""

import argparse
import resource
import sys
import tempfile
import time
import zipfile

import numpy as np
import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.sample_job import sample_job


def main():
    args = create_argparser().parse_args()
    dist_util.setup_dist()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = dist_util.broadcast_object(folder)
        grown, seconds = measure(args, folder)
        dist_util.wait_for_all()
        everywhere = dist_util.gather_objects(grown)
        if dist_util.get_rank() == 0:
            for rank, (total, assembly) in enumerate(everywhere):
                print(f"rank {rank} grew by {total:.0f} MB, by {assembly:.0f} MB during assembly", flush=True)
            path = f"{folder}/samples_{args.num_samples}x{args.size}x{args.size}x3.npz"
            check(path, args)
            print(f"{args.num_samples} images of {args.size}x{args.size}: {seconds:.1f} s, and all are in the file")
        dist_util.wait_for_all()
    sys.exit(int(max(everywhere)[0] > args.most))


class Noise:
    """Replaces BatchSampler. The pixels of sample i depend only on i."""

    num_steps = 1

    def __init__(self, size):
        self.shape = (3, size, size)

    def steps(self, indices):
        yield {"sample": th.stack([th.from_numpy(pixels(i, self.shape)) for i in indices]).float() / 127.5 - 1 + 1e-3}


def pixels(index, shape):
    """Return random pixels seeded with `index`: uint8 of the given shape."""
    return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)


def measure(args, folder):
    """Run the job. Return (MB of growth in the whole job, MB of growth after the last batch), and seconds."""
    logger.configure(f"{folder}/log", format_strs=[])
    ranks = dist_util.get_world_size()
    labels = th.arange(args.num_samples) % 1000
    first = args.batch_size * ranks
    sample_job(Noise(args.size), {}, first, args.batch_size, labels[:first], folder=f"{folder}/warm")
    before, start, marks = peak(), time.time(), []
    job = dict(labels=labels, folder=folder)
    sample_job(Marked(args.size, args.num_samples, marks), {}, args.num_samples, args.batch_size, **job)
    return (peak() - before, peak() - marks[-1]), time.time() - start


class Marked(Noise):
    """Records the process's peak memory after each batch."""

    def __init__(self, size, num_samples, marks):
        super().__init__(size)
        self.marks = marks

    def steps(self, indices):
        yield from super().steps(indices)
        self.marks.append(peak())


def peak():
    """Return this process's peak resident memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def check(path, args):
    """Exit with an error unless the .npz file holds all images in order, and their labels."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as f:
        np.lib.format.read_magic(f)
        shape, _, _ = np.lib.format.read_array_header_1_0(f)
        assert shape == (args.num_samples, args.size, args.size, 3), shape
        size = args.size * args.size * 3
        for i in range(args.num_samples):
            found = np.frombuffer(f.read(size), np.uint8).reshape(shape[1:])
            if not np.array_equal(found, pixels(i, (3, args.size, args.size)).transpose(1, 2, 0)):
                sys.exit(f"image {i} in the .npz file differs from the image that was generated")
    with np.load(path) as arrays:
        assert np.array_equal(arrays["arr_1"], np.arange(args.num_samples) % 1000)


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=20000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--most", type=float, default=300, help="MB of growth allowed per rank (default: 300)")
    parser.add_argument("--folder", default=None, help="folder to write to (default: the system's temporary folder)")
    return parser


if __name__ == "__main__":
    main()
