"""Diffusion models that are ready to sample: load() for notebooks, and GuidedModel, which the scripts use.

    from guided_diffusion.models import load

    model = load("imagenet256", models_dir="models", steps=25, sampler="unipc")
    images = model.sample(classes=[207, 360], scale=2.0, seed=0)

The images equal those of scripts/classifier_sample.py with the same flags. Without a classifier, they equal those of
scripts/image_sample.py.
"""

from argparse import Namespace

import numpy as np

from . import files
from .errors import InputError, check_at_least
from .logger import progress_bar
from .pictures import to_uint8
from .presets import MODELS, PRESETS, presets_for
from .sample_job import BatchSampler
from .sampler_flags import classifier_guidance_flags, guide, guide_flags
from .sampling_networks import (
    CLASSIFIER,
    DIFFUSION,
    OPTIONAL_CLASSIFIER,
    complete_flags,
    labels_for,
    load_diffusion,
    load_guide,
    load_guiding_classifier,
    sampler_options,
    sampling_flags,
    with_guide,
)

OF_A_RUN = {"log_dir", "num_samples", "save_images", "progress_grid", "seed"}  # flags that load() refuses


class GuidedModel:
    """A diffusion model with its weights, its process and the models that guide it, on this rank's device.

    :param args: the flags of a sampling script, completed by complete_flags.
    :ivar model: the diffusion model, a function of (x [N, C, H, W], t [N], y [N]); see load_diffusion.
    :ivar diffusion: the diffusion process, with the timesteps to visit.
    :ivar guiding_model: the second diffusion model that guides the first, or None.
    :ivar classifier: the classifier that guides the diffusion model, or None.
    """

    def __init__(self, args):
        self.args = args
        self.model, self.diffusion = load_diffusion(args)
        self.guiding_model = load_guide(args)
        self.classifier = load_guiding_classifier(args) if getattr(args, "classifier_path", "") else None

    def labels(self, args):
        """Return the labels of all samples, int64 [num_samples], or None if no network takes labels."""
        if self.classifier is not None:
            return labels_for(args, args.num_classes, "classifier_path", "model_path")
        return labels_for(args, args.num_classes if args.class_cond else None, "model_path")

    def sampler(self, args, labels):
        """Return a BatchSampler for this model.

        :param args: flags as in self.args. The flags of guidance and of the sampler may have other values.
        """
        model, cond_fn = with_guide(args, self.model, self.guiding_model, self.diffusion, args.guide_scale), None
        if self.classifier is not None:
            cond_fn = guide(self.classifier, self.diffusion, args.classifier_scale, args.guidance_interval)
        return BatchSampler(self.diffusion, model, conditions=labels, cond_fn=cond_fn, **sampler_options(args))

    def sample(self, classes=None, num_samples=None, scale=None, seed=0):
        """Sample images. Image i equals sample i of the sampling scripts with the same flags.

        :param classes: a list of class numbers or names, or a string as for --classes. The samples cycle through the
            list. None draws classes at random.
        :param num_samples: the number of images. The default is the length of a list of classes, and otherwise 1.
        :param scale: the scale of the classifier's gradient. The default is the scale of the preset, or 1 without a
            preset.
        :param seed: a non-negative integer. Image i is a function of (seed, i).
        :return: a numpy array, uint8 [num_samples, H, W, C].
        :raises InputError: if an argument does not fit the model.
        """
        args = Namespace(**{**vars(self.args), "seed": seed})
        listed = classes is not None and not isinstance(classes, str)
        args.classes = ",".join(map(str, classes)) if listed else classes or ""
        args.num_samples = num_samples if num_samples is not None else len(classes) if listed else 1
        check_at_least(1, num_samples=args.num_samples, batch_size=args.batch_size)
        if scale is not None:
            if self.classifier is None:
                raise InputError(f"scale {scale}: load() was given no classifier to guide with")
            args.classifier_scale = scale
        sampler, images = self.sampler(args, self.labels(args)), []
        starts = range(0, args.num_samples, args.batch_size)
        with progress_bar(total=len(starts) * sampler.num_steps, desc="sampling", unit="step") as bar:
            for start in starts:
                for out in sampler.steps(range(start, min(start + args.batch_size, args.num_samples))):
                    bar.update()
                images.append(to_uint8(out["sample"], start).cpu().numpy())
        return np.concatenate(images)


def load(model, classifier="", steps="", **flags):
    """Load a diffusion model with its weights, to sample on a GPU if there is one, and otherwise on the CPU.

    :param model: the name of a preset whose files are in models_dir, such as "imagenet256" or, without a classifier,
        "256x256_diffusion". Or the path of a checkpoint with the config.json of its training run beside it.
    :param classifier: the path of the checkpoint of a guiding classifier, with its config.json beside it. The default
        is the preset's classifier, if the preset has one.
    :param steps: the timesteps to visit, such as 25 or "ddim25", as for --timestep_respacing. The default is the number
        of steps of the preset, or all timesteps without a preset.
    :param flags: other flags of classifier_sample.py, such as models_dir, sampler and batch_size.
    :return: a GuidedModel.
    :raises InputError: if a file is missing, weights do not fit the network, or flags are unknown or contradictory.
    """
    kinds = {name: presets_for(name).keys() for name in (*MODELS, *PRESETS)}
    names = [name for name in kinds if "diffusion" in kinds[name] and "upsampler" not in kinds[name]]
    if model not in names and not files.exists(str(model)):
        raise InputError(f"{model}: no such file, nor one of the presets {', '.join(names)}")
    known = {**sampling_flags(), **classifier_guidance_flags(), **guide_flags(), **DIFFUSION.flags, **CLASSIFIER.flags}
    known = {name: v for name, v in {**known, "class_table": ""}.items() if name not in OF_A_RUN}
    flags["preset" if model in names else "model_path"] = model
    flags.update(classifier_path=classifier, timestep_respacing=steps)
    if unknown := sorted(flags.keys() - known.keys()):
        raise InputError(f"load() takes no {unknown[0]!r}: it takes the flags of classifier_sample.py")
    flags = {name: str(v) if isinstance(known[name], str) else v for name, v in flags.items() if v not in ("", None)}
    args = Namespace(**{**known, **flags})
    complete_flags(args, {name: (v, "in load()") for name, v in flags.items()}, DIFFUSION, OPTIONAL_CLASSIFIER)
    return GuidedModel(args)
