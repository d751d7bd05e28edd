"""Kill a small training run repeatedly, and compare its final state with that of an undisturbed run.

    python benchmarks/kills.py --kills 30

The test trains a tiny network on digits twice with the same seed and flags: once undisturbed, and once with SIGKILL to
all processes at random moments. Every step is saved, so many kills happen during a save. After each kill, all
checkpoint files must be readable. At the end, the weights, moving average, optimiser state, and logged steps and losses
of the two runs must be bitwise equal. The test takes about five minutes on two cores, and exits with status 1 at the
first difference.
"""

import argparse
import csv
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
RATE = "0.5"
OVER = "after its end"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def main():
    args = create_argparser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        digits = os.path.join(folder, "digits")
        subprocess.run([sys.executable, os.path.join(ROOT, "datasets", "digits.py"), digits, "--size", "8"], check=True)
        alone, killed = (os.path.join(folder, name) for name in ("alone", "killed"))
        moments = Counter()
        subprocess.run(command(args, digits, alone), check=True, capture_output=True, env=ENVIRONMENT)
        rng = random.Random(args.seed)
        for number in range(args.kills):
            moment = run_and_kill(command(args, digits, killed), killed, rng.uniform(0, args.longest))
            if moment == OVER:
                sys.exit(f"the run ended before kill {number + 1}: increase --steps")
            moments[moment] += 1
            print(f"kill {number + 1}: {moment}; newest checkpoint: step {check_files(killed)}", flush=True)
        subprocess.run(command(args, digits, killed), check=True, capture_output=True, env=ENVIRONMENT)
        compare(alone, killed, args.steps)
    print(f"{args.kills} kills ({', '.join(f'{n} {m}' for m, n in moments.items())}): the results are bitwise equal")


def command(args, digits, folder):
    """Return the command that starts or resumes training in `folder`."""
    flags = dict(
        data_dir=digits, log_dir=folder, resume_checkpoint="auto", seed=3, total_steps=args.steps, save_interval=1,
        log_interval=1, batch_size=6, lr=1e-4, ema_rate=RATE, image_size=8, num_channels=64, channel_mult="1",
        num_res_blocks=1, attention_resolutions="8", dropout=0.2, class_cond=True, num_classes=10, learn_sigma=True,
        schedule_sampler="loss-second-moment",
    )  # fmt: skip
    mpiexec = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    launcher = [mpiexec if os.path.exists(mpiexec) else "mpiexec", "-n", str(args.ranks)]
    words = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return [*launcher, sys.executable, os.path.join(ROOT, "scripts", "image_train.py"), *words]


def run_and_kill(argv, folder, seconds):
    """Start a run, and kill all its processes `seconds` after training starts. Return what the kill interrupted."""
    process = subprocess.Popen(
        argv, env=ENVIRONMENT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    for line in process.stdout:
        if "training..." in line:
            break
    time.sleep(seconds)
    ended = process.poll() is not None
    os.killpg(process.pid, signal.SIGKILL) if not ended else None
    process.wait()
    process.stdout.close()
    if ended:
        return OVER
    names = os.listdir(folder)
    steps = {name[-9:-3] for name in names if name.endswith(".pt")}
    in_save = any(name.endswith(".tmp") for name in names) or any(f"model{step}.pt" not in names for step in steps)
    return "within a save" if in_save else "between saves"


def check_files(folder):
    """Read every checkpoint file. Return the step of the newest model."""
    newest = 0
    for name in os.listdir(folder):
        if name.endswith(".pt"):
            th.load(os.path.join(folder, name), weights_only=True)
        if name.startswith("model") and name.endswith(".pt"):
            newest = max(newest, int(name[5:-3]))
    return newest


def compare(a, b, step):
    """Exit with an error unless the last checkpoints and the logged steps of two runs are equal."""
    for name in (f"model{step:06d}.pt", f"ema_{RATE}_{step:06d}.pt", f"opt{step:06d}.pt"):
        if not same(*(th.load(os.path.join(folder, name), weights_only=True) for folder in (a, b))):
            sys.exit(f"{name} differs between the killed run and the undisturbed run")
    logged = []
    for folder in (a, b):
        with open(os.path.join(folder, "progress.csv"), newline="") as f:
            logged.append([(row["step"], row["loss"]) for row in csv.DictReader(f)])
    if logged[0] != logged[1]:
        sys.exit("the logged steps and losses of the killed run differ from those of the undisturbed run")


def same(a, b):
    """Return True if two nested containers of tensors and plain values are equal."""
    if isinstance(a, th.Tensor):
        return isinstance(b, th.Tensor) and th.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--longest", type=float, default=1.5, help="maximum seconds of training before a kill")
    parser.add_argument("--seed", type=int, default=0, help="seed for the moments of the kills")
    return parser


if __name__ == "__main__":
    main()
