"""Reproducible training: runs that are killed or stopped by a signal and resumed, also on other numbers of ranks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch as th
from helpers import as_rank
from launch import BIN, ROOT, check_refused, clean_environment, flags, run_forked, run_ranks, script

from guided_diffusion.image_datasets import ImageStream

# With 32 channels, group norm would normalise single channels, and the gradients of the biases before group norm
# would be mere rounding errors.
NETWORK = dict(image_size=8, num_channels=64, channel_mult="1", num_res_blocks=1, attention_resolutions="8")
GLOBAL_BATCH = 12


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    argv = [os.path.join(ROOT, "datasets", "digits.py"), str(folder), "--size", "8"]
    run_forked({"digits": argv})["digits"].check()
    for path in folder.iterdir():
        if int(path.stem.split("_")[1]) >= 50:
            path.unlink()
    return str(folder)


def command(digits, folder, **extra):
    """The command-line arguments of a training run."""
    options = dict(
        data_dir=digits, log_dir=folder, lr=1e-4, ema_rate="0.5", log_interval=1, save_interval=4, total_steps=10
    )
    options.update(NETWORK, learn_sigma=True, class_cond=True, num_classes=10, num_workers=0)
    return [script("image_train"), *flags(**{**options, **extra})]


def train(digits, folder, ranks=1, **extra):
    """Train on `ranks` ranks and return the Outcome."""
    return run_ranks(ranks, command(digits, folder, **extra), quick_end=True)[0]


def mpiexec(digits, folder, **extra):
    """Start training on two ranks and return the mpiexec process."""
    return start([os.path.join(BIN, "mpiexec"), "-n", "2", sys.executable, *command(digits, folder, **extra)])


def start(argv):
    out = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(argv, env=clean_environment(), start_new_session=True, **out)


def processes_of(folder):
    """The training processes of a run folder, including data workers: {process id: process id of the parent}."""
    found = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as f:
                argv = f.read().split("\0")
            with open(f"/proc/{pid}/stat") as f:
                parent = int(f.read().rsplit(")", 1)[1].split()[1])
        except OSError:  # the process has ended in the meantime
            continue
        if argv[0] == sys.executable and folder in argv:
            found[int(pid)] = parent
    return found


def names(folder, kind="model"):
    return sorted(name for name in os.listdir(folder) if name.startswith(kind) and name.endswith(".pt"))


def load(folder, name):
    return th.load(os.path.join(folder, name))


def logged_steps(folder):
    header, *rows = [line.split(",") for line in open(os.path.join(folder, "progress.csv"))]
    return [row[header.index("step")] for row in rows]


def check_same_end(folder, reference, step=10):
    """Check that two runs have bitwise equal weights, moving averages and Adam moments, and the same logged steps."""
    for name in (f"model{step:06d}.pt", f"ema_0.5_{step:06d}.pt", f"opt{step:06d}.pt"):
        got, want = load(folder, name), load(reference, name)
        th.testing.assert_close(got.get("state", got), want.get("state", want), rtol=0, atol=0)
    assert logged_steps(folder) == logged_steps(reference)


# The order of images


class Numbers:
    """A dataset in which each item is its index and a random number."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def get(self, index, rng):
        return index, rng.random()


def streams(monkeypatch, ranks, batch=GLOBAL_BATCH, **options):
    """The data streams of all ranks of a job, for a dataset of 50 images."""
    made = []
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        made.append(ImageStream(Numbers(50), batch // ranks, num_workers=0, **{"seed": 3, **options}))
    return made


def items(rank_streams, steps):
    """The items of the next `steps` global batches, gathered from all ranks in the order of their positions."""
    batches = [[next(stream) for stream in rank_streams] for _ in range(steps)]
    return [(int(b[0][j]), float(b[1][j])) for step in batches for j in range(len(step[0][0])) for b in step]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_image_order_is_the_same_for_any_ranks_with_each_image_once_an_epoch(ranks, monkeypatch):
    shown = items(streams(monkeypatch, 1), 13)
    assert items(streams(monkeypatch, ranks), 13) == shown
    indices, draws = zip(*shown)
    # 50 images are not a multiple of the global batch size, so some batches span two epochs.
    epochs = [indices[:50], indices[50:100], indices[100:150]]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and len(set(draws)) == len(draws)


def test_without_shuffling_images_are_dealt_to_ranks_in_order(monkeypatch):
    first = [next(stream)[0].tolist() for stream in streams(monkeypatch, 3, shuffle=False)]
    assert first == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


@pytest.mark.parametrize("ranks, batch", [(1, GLOBAL_BATCH), (3, GLOBAL_BATCH), (1, 5)])
def test_a_data_stream_resumes_at_its_saved_position(ranks, batch, monkeypatch):
    """The number of ranks and the global batch size may change. Old state files count steps instead of images."""
    stream = streams(monkeypatch, 2)
    expected = items(streams(monkeypatch, 1), 11)[6 * GLOBAL_BATCH :]
    items(stream, 6)
    for state in (stream[0].state_dict(), {"seed": 3, "step": 6, "global_batch": GLOBAL_BATCH}):
        resumed = streams(monkeypatch, ranks, batch, seed=99)
        for s in resumed:
            s.load_state_dict(state)
        assert items(resumed, len(expected) // batch) == expected


# Resuming runs

OPTIONS = dict(seed=7, batch_size=6, save_interval=1, dropout=0.2, resume_checkpoint="auto")


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """The folder of an uninterrupted run with OPTIONS on two ranks."""
    folder = str(tmp_path_factory.mktemp("undisturbed"))
    train(digits, folder, 2, **OPTIONS).check()
    return folder


def test_killed_and_resumed_runs_equal_an_uninterrupted_run(digits, undisturbed, tmp_path):
    rng = random.Random(7)
    for pattern, count in ("progress.csv", 1), ("model*.pt", 3), ("opt*.pt", 7):
        kill_at = (tmp_path / pattern, count, rng.random() / 5)
        _, killed = run_ranks(2, command(digits, str(tmp_path), **OPTIONS), kill_at=kill_at)
        assert killed
        for name in names(tmp_path, ""):
            load(tmp_path, name)  # loading fails for an incomplete file
    train(digits, str(tmp_path), 2, **OPTIONS).check()
    check_same_end(tmp_path, undisturbed)


def test_a_run_without_a_seed_draws_a_seed_and_keeps_it_when_resumed(digits, tmp_path):
    options = dict(batch_size=4, save_interval=1, dropout=0.2, resume_checkpoint="auto")
    kept, parted = tmp_path / "kept", tmp_path / "parted"
    train(digits, str(parted), total_steps=1, **options).check()
    shutil.copytree(parted, kept)
    for folder, steps in (kept, 4), (parted, 2), (parted, 4):
        train(digits, str(folder), total_steps=steps, **options).check()
    check_same_end(parted, kept, step=4)
    seeds = [json.loads((folder / "config.json").read_text())["flags"]["seed"] for folder in (kept, parted)]
    assert seeds[0] == seeds[1] >= 0


def test_torchrun_restarts_killed_ranks(digits, undisturbed, tmp_path):
    folder = str(tmp_path)
    torchrun = [os.path.join(BIN, "torchrun"), "--standalone", "--nproc_per_node", "2", "--max_restarts", "1"]
    torchrun += ["--monitor_interval", "0.1", "--no_python", sys.executable]
    process = start([*torchrun, *command(digits, folder, **OPTIONS)])
    limit = threading.Timer(90, os.killpg, (process.pid, signal.SIGKILL))
    limit.start()
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("| step ") and output.count("training...") == 1:
            ranks = [pid for pid, parent in processes_of(folder).items() if parent == process.pid]
            os.kill(max(ranks), signal.SIGKILL)
    status = process.wait()
    limit.cancel()
    assert status == 0 and output.count("training...") == 2, output
    check_same_end(folder, undisturbed)


@pytest.mark.parametrize("number, to_all", [(signal.SIGUSR1, False), (signal.SIGTERM, True)])
def test_a_signal_makes_the_run_save_a_checkpoint_and_end(number, to_all, digits, tmp_path):
    """A cluster may send a signal to one rank, or to all processes including data workers."""
    folder = str(tmp_path)
    process = mpiexec(digits, folder, batch_size=4, total_steps=100000, save_interval=100000, num_workers=1)
    for line in process.stdout:
        if line.startswith("| step "):
            break
    processes = processes_of(folder)
    assert len(processes) == 4
    for pid in processes if to_all else [max(pid for pid, parent in processes.items() if parent not in processes)]:
        os.kill(pid, number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0, output
    assert len(names(folder)) == 1 and "as a signal asked" in output


@pytest.fixture(scope="module")
def four_steps(digits, tmp_path_factory):
    """A run folder with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("four") / "run"
    options = dict(dropout=0.3, rescale_learned_sigmas=True, use_bf16=True)
    train(digits, str(folder), total_steps=4, save_interval=2, batch_size=4, **options).check()
    return folder


def test_a_resumed_run_ignores_incomplete_checkpoints_and_keeps_its_flags(digits, four_steps, tmp_path):
    folder = shutil.copytree(four_steps, tmp_path / "run")
    (folder / "opt000008.pt").write_bytes(b"")  # incomplete checkpoint: the model file is written last
    (folder / "model000009.pt.123.tmp").write_bytes(b"")
    (folder / "notes.tmp").write_text("a user's own")
    done = train(digits, folder, total_steps=5, batch_size=4, use_bf16=False, resume_checkpoint="auto").check()
    assert "after step 4" in done.output
    assert names(folder) == ["model000002.pt", "model000004.pt", "model000005.pt"]
    assert not (folder / "model000009.pt.123.tmp").exists() and (folder / "notes.tmp").exists()
    recorded = json.loads((folder / "config.json").read_text())["flags"]
    assert (recorded["dropout"], recorded["rescale_learned_sigmas"], recorded["use_bf16"]) == (0.3, True, False)
    assert logged_steps(folder) == ["0", "1", "2", "3", "4"]


AUTO = dict(resume_checkpoint="auto")
REFUSED = {  # {case: (flags, words of the error message)}
    "a new run": (dict(noise_schedule="cosine"), ["holds model000004.pt", "--resume_checkpoint auto"]),
    "an earlier step": (dict(resume_checkpoint="{run}/model000002.pt"), ["holds model000004.pt"]),
    "an average": (dict(resume_checkpoint="{run}/ema_0.5_000004.pt"), ["ema_0.5_000004.pt", "{run}/model000004.pt"]),
    "no folder": (dict(log_dir="", **AUTO), ["--resume_checkpoint auto looks in --log_dir"]),
    "no data": (dict(data_dir="nope", **AUTO), ["--data_dir nope"]),
    "a bad rate": (dict(lr=-1, **AUTO), ["--lr -1"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_run_does_not_change_the_run_folder(name, digits, four_steps):
    """If two runs shared a folder, --resume_checkpoint auto could resume the wrong run."""
    before = {path.name: path.read_bytes() for path in four_steps.iterdir() if path.name != "log.txt"}
    options, words = REFUSED[name]
    options = {key: value.format(run=four_steps) if isinstance(value, str) else value for key, value in options.items()}
    done = train(digits, four_steps, **{**dict(batch_size=4, total_steps=6), **options})
    check_refused(done, [word.format(run=four_steps) for word in words])
    assert {path.name: path.read_bytes() for path in four_steps.iterdir() if path.name != "log.txt"} == before


def test_a_run_killed_before_its_first_checkpoint_restarts_its_logs(digits, tmp_path):
    (tmp_path / "progress.csv").write_text("step,loss\n0,1.0\n1,0.9\n2,0.")
    train(digits, str(tmp_path), batch_size=4, total_steps=2, resume_checkpoint="auto").check()
    assert logged_steps(tmp_path) == ["0", "1"]


def test_the_weights_do_not_depend_on_ranks_and_microbatches(digits, tmp_path):
    """A run that moves from 2 ranks to 3 and then to 1 ends with the weights of a run on a single rank."""
    reference, folder = str(tmp_path / "reference"), str(tmp_path / "moved")
    options = dict(seed=5, save_interval=2, batch_size=GLOBAL_BATCH, resume_checkpoint="auto")
    train(digits, reference, **options, total_steps=6).check()
    options["batch_size"] = GLOBAL_BATCH // 2
    for ranks, microbatch, end in [(2, -1, 2), (3, 2, 4), (1, 5, 6)]:
        done = train(digits, folder, ranks, **options, microbatch=microbatch, total_steps=end).check()
        if ranks != 2:
            assert f"{GLOBAL_BATCH // ranks} images a step on each of {ranks} ranks keep the global" in done.output
    th.testing.assert_close(load(folder, "model000006.pt"), load(reference, "model000006.pt"), rtol=0, atol=1e-5)

    options["resume_checkpoint"] = os.path.join(folder, "model000006.pt")
    refused = train(digits, folder, 5, **options, total_steps=8)
    check_refused(refused, ["5 ranks cannot share evenly", "--batch_size"], last=False)
    options["batch_size"] = 10  # a new global batch size is allowed
    changed = train(digits, folder, **options, total_steps=8).check()
    assert "the global batch is 10 images now; it was 12" in changed.output
