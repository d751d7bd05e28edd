"""Kill a small sampling job repeatedly, and compare its .npz file with that of an undisturbed job.

    python benchmarks/sample_kills.py --kills 30

The test samples from a tiny network with random weights on two ranks: once undisturbed, and once with SIGKILL to all
processes at random moments. --assembly of the kills happen while the .npz file is assembled. Kills must not change or
remove finished shards. At the end, the .npz files of the two jobs must be bytewise equal, and no temporary file may
remain. The test takes about two minutes on two cores, and exits with status 1 at the first difference.
"""

import argparse
import glob
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter

import torch as th

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
NETWORK = dict(
    image_size=16, num_channels=32, channel_mult="1", num_res_blocks=1, num_heads=2, attention_resolutions="8",
    learn_sigma=True, class_cond=True, num_classes=10,
)  # fmt: skip


def main():
    args = create_argparser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model_path = os.path.join(folder, "model.pt")
        save_network(model_path)
        alone, killed = (os.path.join(folder, name) for name in ("alone", "killed"))
        subprocess.run(command(args, model_path, alone), check=True, capture_output=True, env=ENVIRONMENT)
        moments, seen, rng = Counter(), {}, random.Random(args.seed)
        amid = args.kills - args.assembly
        for number in range(args.kills):
            # First kills spread evenly over the job, then kills up to 50 ms after the temporary .npz file appears
            goal = args.num_samples // args.batch_size * (number + rng.random()) / amid if number < amid else None
            moment = run_and_kill(command(args, model_path, killed), killed, goal, rng)
            now = shards(killed)
            if not seen.items() <= now.items():
                sys.exit(f"kill {number + 1}: finished shards were changed or removed")
            print(f"kill {number + 1}: {moment}; {len(now)} shards, {len(now) - len(seen)} of them new", flush=True)
            moments[moment] += 1
            seen = now
        subprocess.run(command(args, model_path, killed), check=True, capture_output=True, env=ENVIRONMENT)
        compare(alone, killed)
    counts = ", ".join(f"{count} {moment}" for moment, count in sorted(moments.items()))
    print(f"{args.kills} kills ({counts}): the .npz files are bytewise equal, and no shard was made twice")


def save_network(path):
    from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

    th.manual_seed(0)
    model, _ = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **NETWORK})
    with th.no_grad():
        for p in model.parameters():  # some parameters are initialised to zero
            p.add_(th.randn_like(p) * 0.02)
    th.save(model.state_dict(), path)


def command(args, model_path, folder):
    """Return the command that starts or resumes sampling in `folder`."""
    flags = dict(
        model_path=model_path, log_dir=folder, seed=3, num_samples=args.num_samples, batch_size=args.batch_size,
        timestep_respacing=4, **NETWORK,
    )  # fmt: skip
    mpiexec = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    launcher = [mpiexec if os.path.exists(mpiexec) else "mpiexec", "-n", str(args.ranks)]
    words = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return [*launcher, sys.executable, os.path.join(ROOT, "scripts", "image_sample.py"), *words]


def shards(folder):
    """Return {name: (inode, modification time)} of the finished shards, to detect rewritten files."""
    found = [e for e in os.scandir(os.path.join(folder, "shards")) if e.name.endswith(".npz")]
    return {e.name: (e.stat().st_ino, e.stat().st_mtime_ns) for e in found}


def run_and_kill(argv, folder, goal, rng):
    """Start a job, and kill all its processes when `goal` shards exist, or during assembly if `goal` is None."""
    process = subprocess.Popen(
        argv, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    finished, growing = (os.path.join(folder, p) for p in ("shards/*-*.npz", "samples_*.npz.*.tmp"))
    left = set(glob.glob(growing))  # left by an earlier kill; the job removes such files
    while len(glob.glob(finished)) < goal if goal is not None else not set(glob.glob(growing)) - left:
        if process.poll() is not None:
            sys.exit("the job ended before the kill: increase --num_samples")
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.05))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if set(glob.glob(growing)) - left:
        return "within the assembly"
    if glob.glob(os.path.join(folder, "samples_*.npz")):
        return "after the assembly"
    return "within the write of a shard" if glob.glob(os.path.join(folder, "shards/*.tmp")) else "between shards"


def compare(alone, killed):
    """Exit with an error unless both folders hold the same sample files and no shards."""
    names = [sorted(n for n in os.listdir(f) if n.startswith("samples_") or n == "shards") for f in (alone, killed)]
    if names[0] != names[1]:
        sys.exit(f"{killed} holds {names[1]} instead of {names[0]}")
    for name in names[0]:
        first, second = (open(os.path.join(folder, name), "rb").read() for folder in (alone, killed))
        if first != second:
            sys.exit(f"{name} differs between the killed job and the undisturbed job")


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--assembly", type=int, default=8, help="number of kills during assembly (default: 8)")
    parser.add_argument("--num_samples", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="seed for the moments of the kills")
    return parser


if __name__ == "__main__":
    main()
