"""Preview images during training: their content, and that they do not change the training run."""

import os

import numpy as np
import pytest
import torch as th
from helpers import GaussianData, copies, endless, exact_model, new_loop, new_model, process
from PIL import Image

from guided_diffusion import logger
from guided_diffusion.previews import Preview
from guided_diffusion.script_util import create_gaussian_diffusion

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


def test_every_preview_starts_from_the_same_noise(quiet):
    """With an exact denoiser, preview samples have the mean of the data and are identical in every preview."""
    data = GaussianData(mean=[0.6, -0.5, 0.0], std=[0.05, 0.05, 0.05])
    diffusion = process(steps=200)
    preview = Preview(diffusion, (3, 8, 8), steps=50)
    model = exact_model(data, preview.diffusion, betas=diffusion.betas)
    images = [np.asarray(Image.open(preview.write(model, step, "weights"))) for step in (5, 10)]
    assert sorted(os.listdir(os.path.join(quiet, "preview"))) == ["000005_weights.png", "000010_weights.png"]
    assert (images[0] == images[1]).all()
    # 4x4 samples of 8x8 pixels, separated by 1-pixel lines and enlarged 8 times.
    assert images[0].shape == ((4 * 9 - 1) * 8, (4 * 9 - 1) * 8, 3)
    assert np.abs(images[0][:64, :64].mean(axis=(0, 1)) - (np.array([0.6, -0.5, 0.0]) + 1) * 127.5).max() < 4


def test_previews_use_few_timesteps_and_pass_the_original_ones_to_the_model():
    seen = []

    def model(x, t, **kwargs):
        seen.append((int(t[0]), kwargs["y"].tolist()))
        return th.zeros_like(x)

    preview = Preview(create_gaussian_diffusion(steps=1000), (3, 8, 8), num_classes=10, count=4, steps=5)
    preview.write(model, 1, "weights")
    assert [t for t, _ in seen] == [999, 749, 500, 250, 0]
    labels = seen[0][1]
    assert len(labels) == 4 and all(0 <= y < 10 for y in labels)
    assert all(y == labels for _, y in seen)
    seen.clear()  # A respaced process keeps its timesteps: the model was trained on no others.
    respaced = create_gaussian_diffusion(steps=1000, timestep_respacing="8")
    Preview(respaced, (3, 8, 8), 10, count=4, steps=5).write(model, 2, "weights")
    assert len(seen) == 8


@pytest.mark.parametrize("precision", [{}, {"use_bf16": True}], ids=str)
def test_previews_do_not_affect_training(precision, quiet):
    ends = []
    for interval in (0, 1):
        th.manual_seed(0)
        np.random.seed(0)
        model, diffusion = new_model(dropout=0.3)
        preview = Preview(diffusion, (3, 8, 8), count=2, steps=3)
        loop = new_loop(model, diffusion, data=endless(), total_steps=4, preview=preview, sample_interval=interval,
                        ema_rate="0", **precision)  # fmt: skip
        loop.run_loop()
        assert loop.model.training
        ends.append(copies([*loop.model.parameters(), *loop.mp_trainer.master_params, *loop.ema_params[0]]))
    names = ["000001_weights.png", "000002_weights.png", "000003_ema_0.0.png", "000004_ema_0.0.png"]
    assert sorted(os.listdir(os.path.join(quiet, "preview"))) == names
    assert all(th.equal(a, b) for a, b in zip(*ends))


def test_the_moving_average_is_shown_after_enough_steps(tmp_path):
    """Previews show the raw weights for 3 / (1 - rate) steps (6 for a rate of 0.5) and then the moving average."""
    logger.configure(str(tmp_path), format_strs=["log"])
    model, diffusion = new_model()
    shown, own = [], {}  # own: {step: the model's weights after the step}

    class Note:
        def write(self, shown_model, step, weights):
            assert shown_model is model and not model.training
            expected = own[step - 1] if weights == "weights" else loop.ema_params[0]
            assert all(th.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))
            shown.append(weights)
            return f"picture{step}.png"

    loop = new_loop(model, diffusion, data=endless(), total_steps=8, preview=Note(), sample_interval=1, ema_rate="0.5")
    loop.after_step = lambda: own.update({loop.step: copies(model.parameters())})
    loop.run_loop()
    assert shown == ["weights"] * 5 + ["ema_0.5"] * 3
    log = (tmp_path / "log.txt").read_text()
    assert "wrote picture5.png: samples of the weights themselves" in log
    assert "wrote picture6.png: samples of the moving average of rate 0.5" in log


SHOWN = [("0.9", 29, "weights"), ("0.9", 30, "ema_0.9"), ("0.998,0.5", 1499, "weights"),
         ("0.998,0.5", 1500, "ema_0.998"), ("1", 10**6, "weights"), ("", 10**6, "weights")]  # fmt: skip


@pytest.mark.parametrize("rates, steps, name", SHOWN)
def test_steps_before_a_restart_count_for_the_first_moving_average(rates, steps, name):
    loop = new_loop(*new_model(), ema_rate=rates, preview=Preview(process(), (3, 8, 8)), sample_interval=1)
    names = []
    loop.preview.write = lambda model, step, weights: names.append(weights)
    loop.resume_step, loop.step = steps - 5, 5
    loop.write_preview()
    assert names == [name]
