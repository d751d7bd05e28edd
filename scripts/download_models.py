"""Download released checkpoints to sample from with --preset.

    python scripts/download_models.py imagenet256 64_256_upsampler.pt --models_dir models

Run the same command again after an interruption: it resumes.
"""

import argparse
import os

import torch as th

from guided_diffusion.checkpoint_util import Checkpoint
from guided_diffusion.downloads import download_file
from guided_diffusion.errors import InputError, run
from guided_diffusion.presets import MODELS, PRESETS, presets_for


def main():
    args = create_argparser().parse_args()
    if args.list:
        print_list()
    elif not args.names:
        raise InputError("no NAME is given: --list shows the names")
    wanted = [preset for name in args.names for preset in presets_for(name.removesuffix(".pt"), "NAME").values()]
    for preset in wanted:
        download(preset, os.path.join(args.models_dir, preset.file_name))


def download(preset, path):
    """Download the file of a Preset unless `path` exists. Raise InputError for weights that do not fit its network."""
    if os.path.exists(path):
        print(f"{path} exists already")
        return
    print(f"downloading {preset.address}", flush=True)
    download_file(preset.address, path, lambda part: Checkpoint(part).weights(build(preset)))
    print(f"wrote {path}")


def build(preset):
    """Return the network of a Preset on the meta device, which allocates no memory."""
    with th.device("meta"):
        return preset.create()[0]


def print_list():
    """Print the names of all presets, with their files."""
    for name, preset in PRESETS.items():
        flags = preset.all_flags()
        gigabytes = sum(4 * p.numel() for p in build(preset).parameters()) / 1e9
        size = flags.get("image_size") or f"{flags['small_size']} to {flags['large_size']}"
        labels = ", class-conditional" if flags.get("class_cond") else ""
        print(f"{name:<25} {gigabytes:4.1f} GB  {preset.kind}, {size} pixels{labels}")
    for name, parts in MODELS.items():
        print(f"{name:<25}          {', '.join(parts)}")


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="presets, or names of their files")
    parser.add_argument("--models_dir", default="models", help="the folder to write to (default: models)")
    parser.add_argument("--list", action="store_true", help="print the names, sizes and contents of the files")
    return parser


if __name__ == "__main__":
    run(main)
