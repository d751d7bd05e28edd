"""The released models: the flags of their networks, recommended sampling settings, and training recipes.

The number of attention heads and the attention order do not change the shapes of the weights. A released checkpoint
therefore loads into a network with wrong flags, and the samples are noise. Presets avoid this mistake.
"""

from dataclasses import dataclass, field, replace

from .errors import choose
from .script_util import (
    classifier_and_diffusion_defaults,
    create_classifier_and_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)

ADDRESS = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"  # of the released files
FACTORIES = {
    "diffusion": (create_model_and_diffusion, model_and_diffusion_defaults),
    "upsampler": (sr_create_model_and_diffusion, sr_model_and_diffusion_defaults),
    "classifier": (create_classifier_and_diffusion, classifier_and_diffusion_defaults),
}


@dataclass(frozen=True)
class Preset:
    """The settings of a released checkpoint.

    :param kind: "diffusion", "upsampler" or "classifier".
    :param file_name: the name of the released file.
    :param flags: the flags of the network and its process that differ from the defaults.
    :param sampling: recommended sampling flags. A classifier's are for guided sampling, and supplement those of the
        diffusion model.
    :param ddim_sampling: recommended flags for DDIM with few steps. Empty if the paper has no recommendation.
    :param fast_sampling: recommended flags for the fast samplers, such as unipc.
    :param training: the flags of the training recipe, and the batch size over all ranks as "global_batch".
    """

    kind: str
    file_name: str
    flags: dict
    sampling: dict = field(default_factory=dict)
    ddim_sampling: dict = field(default_factory=dict)
    fast_sampling: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)

    @property
    def address(self):
        """The URL of the released file."""
        return f"{ADDRESS}/{self.file_name}"

    def all_flags(self):
        """Return all flags of the network and its process: `flags`, then the training recipe, then the defaults."""
        defaults = FACTORIES[self.kind][1]()
        return {**defaults, **{k: v for k, v in self.training.items() if k in defaults}, **self.flags}

    def advice(self, sampler):
        """The recommended flags for the sampler with the name `sampler`."""
        special = {"ddpm": {}, "ddim": self.ddim_sampling}
        return {**self.sampling, **special.get(sampler, self.fast_sampling)}

    def create(self, **changes):
        """Build the network and its process, with random weights.

        :param changes: flags with other values than the preset's, such as timestep_respacing or use_fp16.
        """
        return FACTORIES[self.kind][0](**{**self.all_flags(), **changes})


def get_preset(name):
    """Return the preset of a released checkpoint.

    :param name: the name of the released file without .pt.
    """
    return choose("preset", name, PRESETS)


def presets_for(name, flag="--preset"):
    """Return the presets that --preset NAME selects: {kind: Preset}.

    :param name: the name of a released checkpoint, or a key of MODELS.
    :param flag: the flag that `name` was given with, for error messages.
    """
    known = {**MODELS, **{name: (name,) for name in PRESETS}}
    found = {PRESETS[checkpoint].kind: PRESETS[checkpoint] for checkpoint in choose(flag, name, known)}
    if name in GUIDANCE:
        found["classifier"] = replace(found["classifier"], sampling=GUIDANCE[name], ddim_sampling={}, fast_sampling={})
    return found


# The flags that all released diffusion models and upsamplers share (ADM, section 3 and appendix I).
_ADM = dict(
    diffusion_steps=1000,
    learn_sigma=True,
    resblock_updown=True,
    use_scale_shift_norm=True,
    attention_resolutions="32,16,8",
    noise_schedule="linear",
    num_res_blocks=2,
    use_fp16=True,
)
_TRAINING = dict(lr=1e-4, weight_decay=0.0, ema_rate="0.9999", global_batch=256)
# With 15 evaluations at scale 2, UniPC and DPM-Solver++ reach FID 7.7 with the 256x256 model (UniPC, table 2).
_STEPS_15 = dict(timestep_respacing="15")
_IMAGENET_256 = dict(_ADM, image_size=256, num_channels=256, num_head_channels=64, class_cond=True)
_LSUN = dict(_IMAGENET_256, class_cond=False, dropout=0.1)
# The paper's best LSUN figures are those of all 1000 steps. Of 250 steps, these are better than uniformly spaced ones.
_LSUN_STEPS = "90,60,60,20,20"


def _diffusion(name, iterations, flags, steps="250", kind="diffusion", **training):
    training = {**_TRAINING, "total_steps": iterations, **training}
    sampling = dict(timestep_respacing=steps, use_ddim=False)
    return Preset(kind, f"{name}.pt", flags, sampling, fast_sampling=_STEPS_15, training=training)


def _upsampler(name, iterations, **flags):
    return _diffusion(name, iterations, {**_ADM, "class_cond": True, "num_channels": 192, **flags}, kind="upsampler")


def _classifier(size, scale, ddim_scale=None, fast_scale=None, iterations=300_000, training=None, **flags):
    """`scale` is for 250 DDPM steps, `ddim_scale` for 25 DDIM steps, and `fast_scale` for the fast samplers."""
    recipe = dict(lr=3e-4, weight_decay=0.05, global_batch=256, iterations=iterations, anneal_lr=True)
    recipe["noise_schedule"] = "cosine" if size == 64 else "linear"
    ddim = dict(classifier_scale=ddim_scale, timestep_respacing="ddim25", use_ddim=True) if ddim_scale else {}
    fast = dict(classifier_scale=fast_scale or ddim_scale or scale)
    flags, recipe = dict(image_size=size, **flags), {**recipe, **(training or {})}
    return Preset("classifier", f"{size}x{size}_classifier.pt", flags, dict(classifier_scale=scale), ddim, fast, recipe)


_RELEASED = (
    _diffusion("64x64_diffusion", 540_000, dict(
        _ADM, image_size=64, num_channels=192, num_res_blocks=3, num_head_channels=64, class_cond=True, dropout=0.1,
        noise_schedule="cosine", use_new_attention_order=True), lr=3e-4, global_batch=2048),
    _diffusion("128x128_diffusion", 4_360_000,
               dict(_ADM, image_size=128, num_channels=256, num_heads=4, class_cond=True)),
    _diffusion("256x256_diffusion", 1_980_000, _IMAGENET_256),
    # Released after the paper. Its number of iterations is not published; this is the class-conditional model's.
    _diffusion("256x256_diffusion_uncond", 1_980_000, dict(_IMAGENET_256, class_cond=False)),
    _diffusion("512x512_diffusion", 1_940_000, dict(_IMAGENET_256, image_size=512, use_fp16=False)),
    _diffusion("lsun_bedroom", 500_000, _LSUN, _LSUN_STEPS),
    _diffusion("lsun_cat", 200_000, _LSUN, _LSUN_STEPS),
    _diffusion("lsun_horse", 250_000, _LSUN, _LSUN_STEPS),
    _diffusion("lsun_horse_nodropout", 250_000, dict(_LSUN, dropout=0.0), _LSUN_STEPS),
    _upsampler("64_256_upsampler", 500_000, large_size=256, small_size=64, num_heads=4),
    _upsampler("128_512_upsampler", 1_050_000, large_size=512, small_size=128, num_head_channels=64,
               attention_resolutions="32,16"),
    # The paper gives no scale for 64x64 images; 1 is unscaled guidance.
    _classifier(64, 1.0, training=dict(lr=6e-4, weight_decay=0.2, global_batch=1024), classifier_depth=4),
    _classifier(128, 0.5, ddim_scale=1.25),
    _classifier(256, 1.0, ddim_scale=2.5, fast_scale=2.0, iterations=500_000),
    _classifier(512, 4.0, ddim_scale=9.0, iterations=500_000),
)  # fmt: skip
PRESETS = {preset.file_name.removesuffix(".pt"): preset for preset in _RELEASED}

# Names for a diffusion model with the classifier that guides it, and perhaps an upsampler.
MODELS = {
    "imagenet64": ("64x64_diffusion", "64x64_classifier"),
    "imagenet128": ("128x128_diffusion", "128x128_classifier"),
    "imagenet256": ("256x256_diffusion", "256x256_classifier"),
    "imagenet256_uncond": ("256x256_diffusion_uncond", "256x256_classifier"),
    "imagenet512": ("512x512_diffusion", "512x512_classifier"),
    "imagenet64_256": ("64x64_diffusion", "64x64_classifier", "64_256_upsampler"),
    "imagenet128_512": ("128x128_diffusion", "128x128_classifier", "128_512_upsampler"),
}

# Guidance scales that replace the classifier's recommended scale. The unconditional model needs a large scale: its FID
# is 26.2 without guidance, 33.0 at scale 1 and 12.0 at scale 10 (ADM, table 4).
GUIDANCE = {"imagenet256_uncond": dict(classifier_scale=10.0)}
