"""Runs that repeat, and runs that are killed and go on: with a seed, on other ranks, after signals and SIGKILL."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch as th
from launch import BIN, ROOT, clean_environment, flags, run, run_forked, script

from guided_diffusion import dist_util
from guided_diffusion.image_datasets import ImageStream

# 64 channels: with 32, group norm's groups are single channels, and biases before it have no gradient but rounding's.
NETWORK = dict(image_size=8, num_channels=64, channel_mult="1", num_res_blocks=1, attention_resolutions="8")
GLOBAL_BATCH = 12


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    run([os.path.join(ROOT, "datasets", "digits.py"), str(folder), "--size", "8"]).check()
    for path in folder.iterdir():
        if int(path.stem.split("_")[1]) >= 50:
            path.unlink()
    return str(folder)


def train_command(digits, folder, **extra):
    options = dict(
        data_dir=digits, log_dir=folder, lr=1e-4, ema_rate="0.5", log_interval=1, save_interval=4, total_steps=10
    )
    options.update(NETWORK, learn_sigma=True, class_cond=True, num_classes=10, num_workers=0)
    return [script("image_train"), *flags(**{**options, **extra})]


# The order of images


class Numbers:
    """A dataset whose items say which they are, and what randomness they got."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def get(self, index, rng):
        return index, rng.random()


def streams(monkeypatch, ranks, length=50, **options):
    """The streams of all ranks of a job."""
    made = []
    for rank in range(ranks):
        monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
        monkeypatch.setattr(dist_util, "get_world_size", lambda: ranks)
        made.append(ImageStream(Numbers(length), GLOBAL_BATCH // ranks, num_workers=0, **{"seed": 3, **options}))
    return made


def global_batch(rank_streams):
    """The next step's items over all ranks, in the order of their positions."""
    batches = [next(stream) for stream in rank_streams]
    return [(int(b[0][j]), float(b[1][j])) for j in range(len(batches[0][0])) for b in batches]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_steps_see_the_same_images_however_they_are_split(ranks, monkeypatch):
    one, several = streams(monkeypatch, 1), streams(monkeypatch, ranks)
    for _ in range(9):
        assert global_batch(one) == global_batch(several)


def test_each_epoch_sees_every_image_once(monkeypatch):
    # 50 is not a multiple of the global batch: batches cross the ends of epochs.
    stream = streams(monkeypatch, 1, length=50)
    shown = [i for _ in range(13) for i, _ in global_batch(stream)]
    epochs = [shown[:50], shown[50:100], shown[100:150]]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_image_gets_new_randomness_each_time(monkeypatch):
    stream = streams(monkeypatch, 1, length=12)
    draws = [draw for _ in range(5) for _, draw in global_batch(stream)]
    assert len(set(draws)) == len(draws)


def test_fixed_order_deals_images_in_turn(monkeypatch):
    first = [next(stream)[0].tolist() for stream in streams(monkeypatch, 3, shuffle=False)]
    assert first == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


@pytest.mark.parametrize("before, after", [(1, 1), (2, 3)])
def test_a_stream_goes_on_where_another_was(before, after, monkeypatch):
    stream, fresh = streams(monkeypatch, before), streams(monkeypatch, after, seed=99)
    for _ in range(6):
        global_batch(stream)
    for s in fresh:
        s.load_state_dict(stream[0].state_dict())
    for _ in range(5):
        assert global_batch(stream) == global_batch(fresh)


# Runs with a seed


def weights(folder, step):
    return th.load(os.path.join(folder, f"model{step:06d}.pt"))


def test_a_seeded_run_does_not_depend_on_its_split(digits, tmp_path):
    def final(name, ranks, microbatch):
        folder = str(tmp_path / name)
        options = dict(seed=5, batch_size=GLOBAL_BATCH // ranks, microbatch=microbatch, total_steps=4)
        run(train_command(digits, folder, **options), ranks=ranks).check()
        return weights(folder, 4)

    want = final("one", 1, -1)
    for name, ranks, microbatch in [("small", 1, 3), ("two", 2, -1), ("both", 3, 2)]:
        got = final(name, ranks, microbatch)
        assert max(float((got[k] - want[k]).abs().max()) for k in want) < 1e-5, name


# Runs that are stopped


def mpiexec(command):
    return [os.path.join(BIN, "mpiexec"), "-n", "2", sys.executable, *command]


def start(command):
    out = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=clean_environment(), start_new_session=True, **out)


def processes_of(folder):
    """The process numbers of what trains in a folder, and their parents' {pid: parent}; ps may be missing."""
    found = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as f:
                argv = f.read().split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if argv[0] == sys.executable and folder in argv:
            with open(f"/proc/{pid}/stat") as f:
                found[int(pid)] = int(f.read().rsplit(")", 1)[1].split()[1])
    return found


def ranks_of(folder):
    """The process numbers of the ranks; their workers are their children, with the same command line."""
    found = processes_of(folder)
    return sorted(pid for pid, parent in found.items() if parent not in found)


def same(a, b):
    if isinstance(a, th.Tensor):
        return th.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_same_end(folder, reference, step=10):
    for name in (f"model{step:06d}.pt", f"ema_0.5_{step:06d}.pt", f"opt{step:06d}.pt"):
        assert same(th.load(os.path.join(folder, name)), th.load(os.path.join(reference, name))), name
    steps = [[line.split(",") for line in open(os.path.join(f, "progress.csv"))] for f in (folder, reference)]
    column = [rows[0].index("step") for rows in steps]
    assert [r[column[0]] for r in steps[0]] == [r[column[1]] for r in steps[1]]


@pytest.mark.parametrize("seed, sampler", [(-1, "loss-second-moment"), (7, "uniform")])
def test_killed_runs_end_as_if_they_had_not_been(seed, sampler, digits, tmp_path):
    options = dict(seed=seed, schedule_sampler=sampler, batch_size=6, save_interval=1, dropout=0.2)
    reference, folder = str(tmp_path / "reference"), str(tmp_path / "killed")
    if seed < 0:  # without a seed, both must start from the same first checkpoint
        run(train_command(digits, reference, **options, total_steps=1), ranks=2).check()
        shutil.copytree(reference, folder)
        options["resume_checkpoint"] = "auto"
    run(train_command(digits, reference, **options), ranks=2).check()

    rng, options["resume_checkpoint"] = random.Random(seed), "auto"
    for _ in range(3):
        process = start(mpiexec(train_command(digits, folder, **options)))
        for line in process.stdout:  # among steps and saves, which is where all of the time goes from here on
            if "training..." in line:
                break
        time.sleep(rng.uniform(0, 1.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            if name.endswith(".pt"):
                th.load(os.path.join(folder, name))  # whatever has its final name is whole
    run(train_command(digits, folder, **options), ranks=2).check()
    check_same_end(folder, reference)


def test_torchrun_starts_killed_ranks_again(digits, tmp_path):
    """torchrun keeps the store by which its first ranks met: the next ones must not wait for those."""
    reference, folder = str(tmp_path / "reference"), str(tmp_path / "killed")
    options = dict(seed=7, batch_size=6, save_interval=1, resume_checkpoint="auto")
    run(train_command(digits, reference, **options), ranks=2).check()

    command = [os.path.join(BIN, "torchrun"), "--standalone", "--nproc_per_node", "2"]
    command += ["--max_restarts", "2", "--monitor_interval", "0.1"]
    process = start([*command, "--no_python", sys.executable, *train_command(digits, folder, **options)])
    limit = threading.Timer(90, os.killpg, (process.pid, signal.SIGKILL))
    limit.start()
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("| step ") and (starts := output.count("training...")) < 3:
            ranks = [pid for pid, parent in processes_of(folder).items() if parent == process.pid]
            os.kill(sorted(ranks)[starts - 1], signal.SIGKILL)
    status = process.wait()
    limit.cancel()
    assert status == 0 and output.count("training...") == 3, output
    check_same_end(folder, reference)


@pytest.mark.parametrize("number, to_all", [(signal.SIGTERM, False), (signal.SIGUSR1, False), (signal.SIGTERM, True)])
def test_a_signal_saves_and_ends_well(number, to_all, digits, tmp_path):
    """A cluster may tell one rank, or everything that runs: the workers that read images, too."""
    folder = str(tmp_path)
    options = dict(batch_size=4, total_steps=100000, save_interval=100000, num_workers=1)
    process = start(mpiexec(train_command(digits, folder, **options)))
    for line in process.stdout:
        if line.startswith("| step "):
            break
    told = list(processes_of(folder)) if to_all else ranks_of(folder)[-1:]
    assert len(told) == (4 if to_all else 1)
    for pid in told:
        os.kill(pid, number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0, output
    saved = [name for name in os.listdir(folder) if name.startswith("model")]
    assert len(saved) == 1 and "as a signal asked" in output


def test_half_written_checkpoints_are_passed_over(digits, tmp_path):
    folder = str(tmp_path)
    run(train_command(digits, folder, batch_size=4, total_steps=2)).check()
    (tmp_path / "opt000008.pt").write_bytes(b"")
    (tmp_path / "model000009.pt.123.tmp").write_bytes(b"")
    (tmp_path / "notes.tmp").write_text("a user's own")
    done = run(train_command(digits, folder, batch_size=4, total_steps=3, resume_checkpoint="auto")).check()
    assert "ignoring the half-written checkpoint of step 8" in done.output
    assert "model000003.pt" in os.listdir(folder) and "model000009.pt.123.tmp" not in os.listdir(folder)
    assert "notes.tmp" in os.listdir(folder)


def test_runs_do_not_mix_in_a_folder(digits, tmp_path):
    """Started anew, or from an early checkpoint, a run would leave "auto" a mixture to choose from."""
    folder, options = str(tmp_path / "run"), dict(batch_size=4, num_workers=0, save_interval=2)
    run(train_command(digits, folder, **options, total_steps=4)).check()
    early = os.path.join(folder, "model000002.pt")
    for extra in (dict(noise_schedule="cosine"), dict(resume_checkpoint=early)):
        done = run(train_command(digits, folder, **options, total_steps=3, **extra))
        assert done.returncode == 1 and "Traceback" not in done.output
        assert "holds model000004.pt" in done.output and "--resume_checkpoint auto" in done.output
    other = str(tmp_path / "other")
    run(train_command(digits, other, **options, total_steps=3, resume_checkpoint=early)).check()
    options.pop("num_workers")
    done = run(train_command(digits, "", **options, total_steps=3, resume_checkpoint="auto"))
    assert done.returncode == 1 and "error: --resume_checkpoint auto looks in --log_dir" in done.output


def test_a_run_that_was_killed_before_its_first_save_starts_its_records_anew(digits, tmp_path):
    folder = str(tmp_path)
    (tmp_path / "progress.csv").write_text("step,loss\n0,1.0\n1,0.9\n2,0.")
    run(train_command(digits, folder, batch_size=4, total_steps=2, resume_checkpoint="auto")).check()
    lines = [line.split(",") for line in (tmp_path / "progress.csv").read_text().splitlines()]
    assert [line[lines[0].index("step")] for line in lines[1:]] == ["0", "1"]


def test_a_command_with_a_mistake_leaves_the_records_as_they_are(digits, tmp_path):
    records = tmp_path / "run" / "progress.csv"
    records.parent.mkdir()
    records.write_text("step,loss\n0,1.0\n1,0.9\n2,0.")
    mistakes = {"data_dir": "nope", "lr": -1}
    jobs = {name: train_command(digits, str(records.parent), **{name: value}) for name, value in mistakes.items()}
    for name, done in run_forked(jobs, tmp_path).items():
        assert done.returncode == 1 and f"--{name} {mistakes[name]}" in done.output, done.output
        assert records.read_text() == "step,loss\n0,1.0\n1,0.9\n2,0.", name


def test_a_resumed_run_keeps_flags_that_were_not_given(digits, tmp_path):
    folder = str(tmp_path)
    first = dict(dropout=0.3, rescale_learned_sigmas=True, use_bf16=True)
    run(train_command(digits, folder, batch_size=4, total_steps=1, **first)).check()
    again = train_command(digits, folder, batch_size=4, total_steps=2, resume_checkpoint="auto", use_bf16=False)
    run(again).check()
    with open(os.path.join(folder, "config.json")) as f:
        recorded = json.load(f)["flags"]
    assert (recorded["dropout"], recorded["rescale_learned_sigmas"], recorded["use_bf16"]) == (0.3, True, False)


# Runs that go on on other ranks


def test_a_run_goes_on_on_other_ranks_with_its_global_batch(digits, tmp_path):
    """The same command, on what ranks there are: the weights are those of a run that had two throughout."""
    options = dict(seed=5, batch_size=GLOBAL_BATCH // 2, save_interval=2, resume_checkpoint="auto")
    reference, folder = str(tmp_path / "reference"), str(tmp_path / "moved")
    run(train_command(digits, reference, **options, total_steps=6), ranks=2).check()
    for ranks, end in [(2, 2), (3, 4), (1, 6)]:
        done = run(train_command(digits, folder, **options, total_steps=end), ranks=ranks).check()
        if ranks != 2:
            assert f"{GLOBAL_BATCH // ranks} images a step on each of {ranks} ranks keep the global" in done.output
    got, want = weights(folder, 6), weights(reference, 6)
    assert max(float((got[k] - want[k]).abs().max()) for k in want) < 1e-5

    options["resume_checkpoint"] = os.path.join(folder, "model000006.pt")
    refused = run(train_command(digits, folder, **options, total_steps=8), ranks=5)
    assert refused.returncode != 0 and "Traceback" not in refused.output
    assert "5 ranks cannot share evenly" in refused.output and "--batch_size" in refused.output
    options["batch_size"] = 2  # another one is meant
    changed = run(train_command(digits, folder, **options, total_steps=8), ranks=5).check()
    assert "the global batch is 10 images now; it was 12" in changed.output


def test_a_stream_continues_at_its_position_with_another_global_batch(monkeypatch):
    stream, undisturbed = streams(monkeypatch, 1)[0], streams(monkeypatch, 1)
    for _ in range(6):
        global_batch([stream])
    other = ImageStream(Numbers(50), 5, num_workers=0, seed=99)
    other.load_state_dict(stream.state_dict())
    expected = [item for _ in range(11) for item in global_batch(undisturbed)][6 * GLOBAL_BATCH :]
    assert [item for _ in range(12) for item in global_batch([other])] == expected


def test_state_files_that_count_steps_load(monkeypatch):
    stream = streams(monkeypatch, 1)[0]
    stream.load_state_dict({"seed": 3, "step": 4, "global_batch": 6})
    assert stream.state_dict() == {"seed": 3, "position": 24, "global_batch": GLOBAL_BATCH}
