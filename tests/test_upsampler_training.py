"""Training upsamplers: the low-resolution images are downsampled from training images; super_res_train.py runs."""

import numpy as np
import pytest
import torch as th
from launch import check_refused, flags, run_forked, run_ranks, script
from PIL import Image

from guided_diffusion.script_util import sr_create_model_and_diffusion, sr_model_and_diffusion_defaults
from guided_diffusion.upsampler_util import fixed_conditions, shrink

TINY_UPSAMPLER = dict(num_channels=32, num_res_blocks=1, num_heads=2, attention_resolutions="8", learn_sigma=True)


def test_shrink_averages_areas():
    """The sizes need not divide: from 3 to 2 pixels, each output pixel covers one and a half input pixels."""
    x = th.tensor([[0.0, 1, 5], [2, 3, 7], [4, 5, 9]])[None, None]
    assert shrink(x, 2)[0, 0].tolist() == [[1.5, 4.0], [3.5, 6.0]]
    assert th.equal(shrink(x, 1), x.mean(dim=(2, 3), keepdim=True)) and th.equal(shrink(x, 3), x)


def test_preview_images_are_spread_over_the_dataset():
    class Numbered:
        random_flip = True

        def __len__(self):
            return 40

        def get(self, i, rng):
            assert not self.random_flip and not self.random_crop
            return np.full((3, 8, 8), i, np.float32), {"y": np.array(i)}

    data = Numbered()
    conditions = fixed_conditions(data, 4, count=4)
    assert conditions["low_res"].shape == (4, 3, 4, 4)
    assert conditions["low_res"][:, 0, 0, 0].tolist() == [0, 10, 20, 30] == conditions["y"].tolist()
    assert data.random_flip  # the preview does not change the training data options


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i % 3}_{i}.png")
    return folder


def test_super_res_train_trains_resumes_and_writes_previews(images, tmp_path):
    options = dict(TINY_UPSAMPLER, data_dir=images, log_dir=tmp_path / "run", large_size=24, small_size=16,
                   class_cond=True, num_classes=3, batch_size=2, num_workers=0, log_interval=1, seed=0,
                   save_interval=2, sample_interval=2)  # fmt: skip
    for steps in (2, 4):
        argv = [script("super_res_train"), *flags(**options, total_steps=steps, resume_checkpoint="auto")]
        run_ranks(2, argv, quick_end=True)[0].check()
    saved = sorted(path.name for path in (tmp_path / "run").glob("*.pt"))
    assert saved == sorted(f"{k}{s:06d}.pt" for k in ("ema_0.9999_", "model", "opt", "state") for s in (2, 4))
    previews = sorted(path.name for path in (tmp_path / "run/preview").iterdir())
    assert previews == ["000002_weights.png", "000004_weights.png"]
    built = {**sr_model_and_diffusion_defaults(), **TINY_UPSAMPLER, "large_size": 24, "small_size": 16}
    model, _ = sr_create_model_and_diffusion(**{**built, "class_cond": True, "num_classes": 3})
    model.load_state_dict(th.load(tmp_path / "run/model000004.pt"), strict=True)


def test_small_size_above_large_size_is_refused(images, tmp_path):
    options = dict(TINY_UPSAMPLER, data_dir=images, log_dir=tmp_path, large_size=16, small_size=32)
    done = run_forked({"train": [script("super_res_train"), *flags(**options)]})["train"]
    check_refused(done, ["error: --small_size 32 must be from 1 to --large_size 16"])
