"""Compare every array of data/library.npz, computed with the original code, with this code's result.

Each test claims all arrays whose names begin with the test's prefix, and must compute exactly these arrays.
test_every_array_is_checked_once checks that each array is claimed by exactly one test.
"""

import random
from collections import Counter

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from helpers import DATA, fill_by_name, per_sample, quick_half_convolutions, randn, relative_error
from PIL import Image

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion import logger, script_util
from guided_diffusion.image_datasets import center_crop_arr, random_crop_arr
from guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from guided_diffusion.nn import timestep_embedding
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.respace import space_timesteps
from guided_diffusion.train_util import TrainLoop

with np.load(DATA / "library.npz") as archive:
    GOLDEN = dict(archive)

# {prefix of an array's name: (largest relative L2 error, largest error of an element)}. An element's error is relative
# to the element's absolute value plus 1% of the array's RMS. With None, only the L2 error is checked, because
# cancellation makes single elements of a network's output inaccurate. Training has a larger tolerance, because Adam
# divides gradients by their own magnitude and so amplifies the rounding errors of small gradients.
TOLERANCES = {
    "unet16/": (5e-3, None),
    "unet/": (2e-5, None),
    "classifier/": (2e-5, None),
    "sr/": (2e-5, None),
    "e2e/": (5e-5, None),
    "train/probe": (4e-4, None),
    "train/": (1e-4, None),
    "space/": (0, None),
    "crop/": (0, None),
    "betas/": (1e-12, 1e-9),
    "diffusion/": (1e-12, 1e-9),
    "resample/": (1e-6, None),
    "": (2e-6, 2e-4),
}
CLAIMS = []


def claims(*prefixes):
    """Decorator that runs a test once for each prefix. The test must compute all golden arrays with the prefix."""
    CLAIMS.extend(prefixes)
    return pytest.mark.parametrize("prefix", prefixes)


def claimed_by(prefix):
    return {name for name in GOLDEN if name.startswith(prefix)}


def check(prefix, computed):
    """Compare the arrays that a test computed, {name without prefix: array}, with the golden arrays of its prefix."""
    assert {prefix + name for name in computed} == claimed_by(prefix)
    for name, got in computed.items():
        assert_golden(prefix + name, got)


def assert_golden(name, got):
    want = GOLDEN[name]
    got = np.asarray(got.detach().float() if isinstance(got, th.Tensor) else got)
    assert got.shape == want.shape, name
    whole, element = next(tolerance for prefix, tolerance in TOLERANCES.items() if name.startswith(prefix))
    error = relative_error(got, want)
    assert error <= whole, f"{name}: relative L2 error {error:.2e} exceeds {whole:.0e}"
    if element is not None:
        want, got = want.astype(np.float64), got.astype(np.float64)
        worst = np.max(np.abs(got - want) / (np.abs(want) + 1e-2 * np.sqrt(np.mean(want**2)) + 1e-30), initial=0)
        assert worst <= element, f"{name}: largest error of an element {worst:.2e} exceeds {element:.0e}"


def thin(images):
    """Every fourth row and column of the images: the golden file stores only these pixels."""
    return images[:, :, ::4, ::4]


# Networks

SMALL_UNET = dict(
    image_size=64, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="32", num_heads=2
)
UNETS = {
    "plain": dict(use_scale_shift_norm=False),
    "film": dict(learn_sigma=True),
    "updown": dict(resblock_updown=True, learn_sigma=True, class_cond=True),
    "neworder": dict(resblock_updown=True, num_head_channels=32, use_new_attention_order=True),
    "legacyorder": dict(resblock_updown=True, num_head_channels=32),
    "headsup": dict(num_heads_upsample=4),
}
POOLINGS = ("attention", "adaptive", "spatial", "spatial_v2")
TWO_TIMES = th.tensor([3.0, 741.5])


def make_model(**flags):
    flags = {**script_util.model_and_diffusion_defaults(), **flags}
    model, diffusion = script_util.create_model_and_diffusion(**flags)
    return fill_by_name(model), diffusion


def make_classifier(**flags):
    small = dict(image_size=64, classifier_width=64, classifier_depth=1)
    return fill_by_name(script_util.create_classifier(**{**script_util.classifier_defaults(), **small, **flags}))


def labels_for(flags):
    return dict(y=th.tensor([7, 999])) if flags.get("class_cond") else {}


def by_name(model, attribute=lambda p: p):
    return [attribute(p) for _, p in sorted(model.named_parameters())]


@claims(*(f"unet/{name}/" for name in UNETS))
def test_unet(prefix):
    flags = UNETS[prefix.split("/")[1]]
    model, _ = make_model(**SMALL_UNET, **flags)
    x = randn(1, 2, 3, 64, 64).requires_grad_(True)
    output = model(x, TWO_TIMES, **labels_for(flags))
    (x_grad,) = th.autograd.grad((output * randn(2, *output.shape)).sum(), x, retain_graph=True)
    output.pow(2).mean().backward()
    norms = by_name(model, lambda p: 0.0 if p.grad is None else float(p.grad.norm()))
    check(prefix, {"out": thin(output), "xgrad": thin(x_grad), "gradnorm": norms})


@claims(*(f"unet16/{name}/" for name in UNETS))
def test_unet_in_half_precision(prefix, monkeypatch):
    flags = UNETS[prefix.split("/")[1]]
    model, _ = make_model(**SMALL_UNET, **flags, use_fp16=True)
    model.convert_to_fp16()
    with th.no_grad(), quick_half_convolutions(monkeypatch):
        output = model(randn(1, 2, 3, 64, 64), TWO_TIMES, **labels_for(flags))
    check(prefix, {"out": thin(output)})


@claims("sr/")
def test_upsampler(prefix):
    flags = dict(
        large_size=64, small_size=16, num_channels=32, num_res_blocks=1, learn_sigma=True, class_cond=True,
        attention_resolutions="16", resblock_updown=True,
    )  # fmt: skip
    flags = {**script_util.sr_model_and_diffusion_defaults(), **flags}
    model = fill_by_name(script_util.sr_create_model_and_diffusion(**flags)[0])
    x, low_res = randn(3, 2, 3, 64, 64), randn(4, 2, 3, 16, 16)
    with th.no_grad():
        output = model(x, th.tensor([0.0, 500.0]), low_res=low_res, y=th.tensor([1, 2]))
    check(prefix, {"out": thin(output)})


@claims(*(f"classifier/{pool}/" for pool in POOLINGS))
def test_classifier(prefix):
    classifier = make_classifier(classifier_pool=prefix.split("/")[1])
    x = randn(5, 2, 3, 64, 64).requires_grad_(True)
    logits = classifier(x, th.tensor([10, 900]))
    log_prob = F.log_softmax(logits, dim=-1)[[0, 1], [3, 500]].sum()
    (x_grad,) = th.autograd.grad(log_prob, x)
    check(prefix, {"logits": logits, "xgrad": thin(x_grad)})


@claims("temb")
def test_timestep_embedding(prefix):
    check(prefix, {"": timestep_embedding(th.tensor([0.0, 1.0, 37.5, 999.0]), 32)})


# Tables

SPACINGS = {"all": "", "250": "250", "ddim25": "ddim25", "10,10,15,20": "10,10,15,20", "25": "25"}
TABLES = (
    "betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1",
    "posterior_mean_coef2", "sqrt_recipm1_alphas_cumprod", "timestep_map",
)  # fmt: skip


@claims("betas/linear/", "betas/cosine/")
def test_schedule(prefix):
    schedule = prefix.split("/")[1]
    check(prefix, {str(steps): gd.get_named_beta_schedule(schedule, steps) for steps in (1000, 40)})


@claims("space/")
def test_spacing(prefix):
    check(prefix, {name: sorted(space_timesteps(1000, spec or [1000])) for name, spec in SPACINGS.items()})


@claims(*(f"diffusion/{schedule}/{name}/" for schedule in ("linear", "cosine") for name in SPACINGS))
def test_tables(prefix):
    _, schedule, name, _ = prefix.split("/")
    diffusion = script_util.create_gaussian_diffusion(
        steps=1000, noise_schedule=schedule, timestep_respacing=SPACINGS[name]
    )
    check(prefix, {table: getattr(diffusion, table) for table in TABLES})


# The diffusion process, with smooth functions instead of networks

PROCESSES = {
    "eps_learned": dict(learn_sigma=True),
    "eps_large": dict(),
    "eps_small": dict(sigma_small=True),
    "x0_learned": dict(predict_xstart=True, learn_sigma=True),
    "rescaled": dict(learn_sigma=True, rescale_timesteps=True, rescale_learned_sigmas=True),
    "kl": dict(learn_sigma=True, use_kl=True),
}


def smooth_model(learn_sigma):
    """Return a model that is a smooth function of x, the timestep and the label."""

    def model(x, t, y=None):
        time = per_sample(t.float(), x) / 1000
        output = th.tanh(x * (1 + time)) * 0.7 + 0.1 * th.sin(5 * x + time)
        if y is not None:
            output = output + 0.01 * per_sample(y.float(), x)
        return th.cat([output, th.cos(3 * x) * 0.9], dim=1) if learn_sigma else output

    return model


def smooth_gradient(x, t, y=None):
    return 0.3 * th.cos(x) * (1 + per_sample(t.float(), x) / 1000)


@claims(*(f"process/{name}/" for name in PROCESSES))
def test_process(prefix):
    flags = PROCESSES[prefix.split("/")[1]]
    diffusion = script_util.create_gaussian_diffusion(
        steps=1000, noise_schedule="linear", timestep_respacing="25", **flags
    )
    model = smooth_model(flags.get("learn_sigma", False))
    x_start, noise = randn(6, 4, 3, 8, 8).clamp(-1, 1), randn(7, 4, 3, 8, 8)
    t = th.tensor([0, 1, 11, 19])
    kwargs = dict(y=t)
    got = {"q_sample": diffusion.q_sample(x_start, t, noise=noise)}

    losses = diffusion.training_losses(model, x_start, t, model_kwargs=kwargs, noise=noise)
    got.update({f"loss/{name}": value for name, value in losses.items()})
    step = diffusion.p_mean_variance(model, noise, t, clip_denoised=False, model_kwargs=kwargs)
    got.update({f"pmv/{name}": value for name, value in step.items()})

    for guidance, cond_fn in (("plain", None), ("guided", smooth_gradient)):
        th.manual_seed(5)
        out = diffusion.p_sample(model, noise, t, cond_fn=cond_fn, model_kwargs=kwargs)
        got[f"p_sample/{guidance}"] = out["sample"]
        th.manual_seed(5)
        out = diffusion.ddim_sample(model, noise, t, cond_fn=cond_fn, model_kwargs=kwargs, eta=0.4)
        got[f"ddim_sample/{guidance}"] = out["sample"]
    got["ddim_reverse"] = diffusion.ddim_reverse_sample(model, noise, t, model_kwargs=kwargs)["sample"]

    for name in ("p_sample_loop", "ddim_sample_loop"):
        th.manual_seed(9)
        got[name] = getattr(diffusion, name)(
            model, (2, 3, 8, 8), cond_fn=smooth_gradient, model_kwargs=dict(y=th.tensor([1, 2])), device="cpu"
        )
    th.manual_seed(11)
    bound = diffusion.calc_bpd_loop(model, x_start, model_kwargs=kwargs)
    got.update({f"bpd/{name}": value for name, value in bound.items()})
    check(prefix, got)


@claims("losses/")
def test_likelihoods(prefix):
    mean1, log_variance1, mean2, log_variance2 = (randn(seed, 5, 7) for seed in (20, 21, 22, 23))
    nll = discretized_gaussian_log_likelihood(mean1.clamp(-1, 1), means=mean2, log_scales=0.3 * log_variance2 - 2)
    check(prefix, {"kl": normal_kl(mean1, log_variance1, mean2, log_variance2), "nll": nll})


@claims("resample/")
def test_loss_aware_sampler(prefix):
    diffusion = script_util.create_gaussian_diffusion(steps=6, noise_schedule="cosine")
    sampler = create_named_schedule_sampler("loss-second-moment", diffusion)
    rng = np.random.default_rng(4)
    for _ in range(40):
        ts = rng.integers(0, 6, 8)
        sampler.update_with_all_losses(ts.tolist(), (rng.random(8) * (1 + ts)).tolist())
    np.random.seed(3)
    indices, factors = sampler.sample(16, "cpu")
    check(prefix, {"weights": sampler.weights(), "indices": indices, "iw": factors})


@claims("crop/")
def test_crops(prefix):
    rng = np.random.default_rng(8)
    got = {}
    for width, height in [(500, 375), (64, 64), (131, 257)]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        got[f"center/{width}x{height}"] = center_crop_arr(image, 64)[::4, ::4]
        random.seed(1)
        got[f"random/{width}x{height}"] = random_crop_arr(image, 64)[::4, ::4]
    check(prefix, got)


# Guided sampling and training

SMALL_CONDITIONAL = dict(
    image_size=64, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="32", class_cond=True,
    learn_sigma=True, resblock_updown=True,
)  # fmt: skip


@claims("e2e/p_sample_loop", "e2e/ddim_sample_loop")
def test_guided_sampling(prefix):
    model, diffusion = make_model(**SMALL_CONDITIONAL, timestep_respacing="ddim5")
    classifier = make_classifier().requires_grad_(False)

    def cond_fn(x, t, y):
        with th.enable_grad():
            x = x.detach().requires_grad_(True)
            chosen = F.log_softmax(classifier(x, t), dim=-1).gather(1, y[:, None])
            return 2.0 * th.autograd.grad(chosen.sum(), x)[0]

    th.manual_seed(42)
    loop = getattr(diffusion, prefix.split("/")[1])
    kwargs = dict(y=th.tensor([5, 250]))
    samples = loop(model, (2, 3, 64, 64), cond_fn=cond_fn, model_kwargs=kwargs, device="cpu")
    check(prefix, {"": thin(samples)})


@claims("train/")
def test_training_steps(prefix, tmp_path, monkeypatch):
    # The golden arrays were computed on a CPU, so the test must not use a GPU.
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    model, diffusion = make_model(**SMALL_CONDITIONAL)
    model.train()
    batches = [(randn(100 + i, 4, 3, 64, 64).clamp(-1, 1), dict(y=th.arange(4))) for i in range(4)]
    loop = TrainLoop(
        model=model, diffusion=diffusion, data=None, batch_size=4, microbatch=2, lr=1e-3, ema_rate="0.5,0.9",
        log_interval=100, save_interval=10**9, resume_checkpoint="", weight_decay=0.05, lr_anneal_steps=4,
    )  # fmt: skip
    np.random.seed(0)  # timesteps
    th.manual_seed(0)  # noise
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["log"]):
        for batch, cond in batches:
            loop.run_step(batch, cond)
            loop.step += 1

    def norm(p):
        return float(p.detach().double().norm())

    names = [name for name, _ in model.named_parameters()]
    got = {"params": by_name(model, norm), "probe": th.cat(by_name(model, lambda p: p.detach().flatten()[:3]))}
    for rate, average in zip((0.5, 0.9), loop.ema_params):
        got[f"ema{rate}"] = [norm(p) for _, p in sorted(zip(names, average), key=lambda pair: pair[0])]
    check(prefix, got)


# Checks of the golden tests themselves


def test_every_array_is_checked_once():
    times = Counter(name for prefix in CLAIMS for name in claimed_by(prefix))
    assert times == dict.fromkeys(GOLDEN, 1)
    assert len(GOLDEN) == 256


def test_quick_half_convolutions_match_pytorch_s_kernels(monkeypatch):
    x, weight, bias = randn(0, 2, 32, 8, 8).half(), (0.1 * randn(1, 32, 32, 3, 3)).half(), randn(2, 32).half()
    options = dict(stride=2, padding=1)
    want = F.conv2d(x, weight, bias, **options)
    with quick_half_convolutions(monkeypatch):
        got = F.conv2d(x, weight, bias, **options)
    assert got.dtype == th.float16
    assert relative_error(got, want) < 2e-4  # less than half of float16's rounding error, 2^-11 = 5e-4
