"""What a run tells those who watch it: pace, pictures, what it keeps on the disk."""

import csv
import os
import time

import numpy as np
import pytest
import torch as th
from helpers import GaussianData, batch_of, copies, exact_model, new_loop, new_model, process
from PIL import Image

from guided_diffusion import logger
from guided_diffusion.monitor import Pace, Preview, peak_memory_mb
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.train_util import TrainLoop

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


def endless(seconds=0.0):
    while True:
        time.sleep(seconds)
        yield batch_of(6), {}


class NoWork(TrainLoop):
    """Steps that take a known time and leave the weights alone."""

    def run_step(self, batch, cond):
        time.sleep(0.03)
        self.log_step()


# Pace


def rows(folder):
    with open(os.path.join(folder, "progress.csv"), newline="") as f:
        return list(csv.DictReader(f))


def test_every_row_says_how_fast_the_run_goes(tmp_path):
    logger.configure(str(tmp_path), format_strs=["csv"])
    NoWork.run_loop(new_loop(*new_model(), kind=NoWork, data=endless(0.03), total_steps=22, log_interval=5))
    found = rows(tmp_path)
    assert [row["step"] for row in found] == ["0", "5", "10", "15", "20"]
    for row in found[1:]:
        rate = float(row["steps_per_s"])
        assert 5 < rate < 1 / 0.06
        assert float(row["images_per_s"]) == pytest.approx(6 * rate)
        assert 0.3 < float(row["data_wait"]) < 0.7  # half of the time
        assert 50 < float(row["memory_mb"]) < 1e5
    assert [row["eta"] for row in found[-1:]] == ["0:00:00"]  # one step left


def test_eta_counts_the_steps_that_are_left():
    pace = Pace()
    pace.start -= 10
    pace.steps = 5
    metrics = pace.metrics(images_per_step=8, steps_left=1800)
    assert metrics["steps_per_s"] == pytest.approx(0.5, rel=0.01) and metrics["eta"].startswith(("1:00:0", "0:59:5"))
    assert pace.steps == 0 and pace.waited == 0
    assert "eta" not in pace.metrics(images_per_step=8)  # a run without an end


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_mb()
    held = th.ones(80 * 2**20 // 4)
    assert peak_memory_mb() >= before and held.sum() > 0
    assert peak_memory_mb() < before + 200


def test_a_run_without_an_end_says_so(capsys, tmp_path):
    logger.configure(str(tmp_path), format_strs=["stdout"])
    loop = new_loop(*new_model(), kind=NoWork, data=iter([(batch_of(6), {})]))
    with pytest.raises(StopIteration):
        loop.run_loop()
    assert "this run has no end" in capsys.readouterr().out


# Pictures


def test_previews_show_what_the_average_makes_of_the_same_noise(quiet):
    """With an exact denoiser, samples have the data's mean; and they do not change from one preview to the next."""
    data = GaussianData(mean=[0.6, -0.5, 0.0], std=[0.05, 0.05, 0.05])
    diffusion = process(steps=200)
    preview = Preview(diffusion, (3, 8, 8), steps=50)
    model = exact_model(data, preview.diffusion, betas=diffusion.betas)
    for step in (5, 10):
        preview.write(model, step)
    images = [np.asarray(Image.open(os.path.join(quiet, "preview", f"0000{n}.png"))) for n in ("05", "10")]
    assert (images[0] == images[1]).all()
    # 4 x 4 samples of 8 pixels, with lines between them, enlarged eightfold.
    assert images[0].shape == ((4 * 9 - 1) * 8, (4 * 9 - 1) * 8, 3)
    assert np.abs(images[0][:64, :64].mean(axis=(0, 1)) - (np.array([0.6, -0.5, 0.0]) + 1) * 127.5).max() < 4


def test_preview_visits_few_timesteps_and_tells_the_model_the_right_ones():
    seen = []

    def model(x, t, **kwargs):
        seen.append((int(t[0]), kwargs["y"].tolist()))
        return th.zeros_like(x)

    preview = Preview(create_gaussian_diffusion(steps=1000), (3, 8, 8), num_classes=10, count=4, steps=5)
    preview.write(model, 1)
    assert [t for t, _ in seen] == [999, 749, 500, 250, 0]
    labels = seen[0][1]
    assert len(labels) == 4 and all(0 <= y < 10 for y in labels)
    assert all(y == labels for _, y in seen)
    seen.clear()  # a process that visits a subset already keeps it: the model was trained on no other timesteps
    Preview(create_gaussian_diffusion(steps=1000, timestep_respacing="8"), (3, 8, 8), 10, count=4, steps=5).write(
        model, 2
    )
    assert len(seen) == 8


@pytest.mark.parametrize("precision", [{}, {"use_bf16": True}], ids=str)
def test_previews_do_not_touch_training(precision, quiet):
    ends = []
    for interval in (0, 1):
        th.manual_seed(0)
        np.random.seed(0)
        model, diffusion = new_model(dropout=0.3)
        preview = Preview(diffusion, (3, 8, 8), count=2, steps=3)
        loop = new_loop(model, diffusion, data=endless(), total_steps=3, preview=preview, sample_interval=interval,
                        **precision)  # fmt: skip
        loop.run_loop()
        assert loop.model.training
        ends.append(copies([*loop.model.parameters(), *loop.mp_trainer.master_params, *loop.ema_params[0]]))
    assert sorted(os.listdir(os.path.join(quiet, "preview"))) == ["000001.png", "000002.png", "000003.png"]
    assert all(th.equal(a, b) for a, b in zip(*ends))


def test_previews_take_the_average_s_weights(quiet):
    model, diffusion = new_model()
    shown = []

    class Note:
        def write(self, model, step):
            shown.append(copies(model.parameters()))

    loop = new_loop(model, diffusion, data=endless(), total_steps=1, preview=Note(), sample_interval=1)
    before = copies(model.parameters())
    loop.run_loop()
    for a, b, c, d in zip(shown[0], loop.ema_params[0], model.parameters(), before):
        assert th.equal(a, b)
        assert not th.equal(a, c) or th.equal(c, d)


# What stays on the disk


def checkpoints(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".pt"))


def test_only_the_newest_checkpoints_are_kept(quiet):
    later = os.path.join(quiet, "model000900.pt")  # of another run in the same folder
    os.makedirs(quiet, exist_ok=True)
    th.save({}, later)
    loop = new_loop(*new_model(), kind=NoWork, data=endless(), total_steps=9, save_interval=2, keep_checkpoints=2,
                    ema_rate="0.9,0.99")  # fmt: skip
    th.save({}, os.path.join(quiet, "opt000001.pt"))  # half of a set that a crash left
    loop.run_loop()
    kinds = ("ema_0.99_", "ema_0.9_", "model", "opt", "state")
    assert checkpoints(quiet) == sorted([f"{k}{s:06d}.pt" for k in kinds for s in (8, 9)] + ["model000900.pt"])


def test_all_checkpoints_are_kept_by_default(quiet):
    new_loop(*new_model(), kind=NoWork, data=endless(), total_steps=3, save_interval=1).run_loop()
    assert [name for name in checkpoints(quiet) if name.startswith("model")] == [f"model00000{s}.pt" for s in (1, 2, 3)]
