"""Sample at several scales of guidance and evaluate each against a reference batch: sweep.csv and sweep.png.

It sweeps the classifier's scale (--scales), or with --guide_scales that of a second model. The samples of each scale
are those of classifier_sample.py, in a folder of --log_dir. Run the same command again if the job is killed, or with
more scales: it makes the missing samples. `--features classifier` replaces Inception by a classifier of clean images
(classifier_train.py --noised False), whose flags have the prefix `feature_`.
"""

import os
import sys
from argparse import Namespace
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from evaluations.batches import Batch  # noqa: E402
from evaluations.classifier_features import ClassifierFeatures  # noqa: E402
from evaluations.evaluator import DTYPES, load_inception  # noqa: E402
from evaluations.features import FEWEST, Features, check_batches, compare, reference_features  # noqa: E402
from evaluations.sweep import SWEPT, draw, format_table, write_table  # noqa: E402
from guided_diffusion import dist_util, files, logger  # noqa: E402
from guided_diffusion.errors import InputError, check_at_least, choose  # noqa: E402
from guided_diffusion.models import GuidedModel  # noqa: E402
from guided_diffusion.sample_job import sample_job  # noqa: E402
from guided_diffusion.sampler_flags import classifier_guidance_flags, guide_flags  # noqa: E402
from guided_diffusion.sampling_networks import (  # noqa: E402
    CLASSIFIER,
    DIFFUSION,
    OPTIONAL_CLASSIFIER,
    class_flags,
    job_of,
    load_classifier,
    sampling_flags,
    sampling_parser,
    set_up_sampling,
    without_prefix,
)
from guided_diffusion.script_util import parse_numbers  # noqa: E402

FEATURES = replace(CLASSIFIER, kind="features", path_flag="feature_path", prefix="feature_", optional=True)
SWEEP_FLAGS = dict(
    scales="0,1,2,4,8", guide_scales="", ref_batch="", features="inception", inception_path="", eval_batch_size=32,
    eval_dtype="fp32",
)  # fmt: skip


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION, OPTIONAL_CLASSIFIER, FEATURES)
    swept, scales = parse_scales(args)
    model = GuidedModel(args)
    labels = model.labels(args)
    evaluation = Evaluation(args)  # before sampling, so that mistakes in its flags are reported at once

    rows = []
    for scale in scales:
        logger.log(f"{swept} {scale:g}")
        setattr(args, swept, scale)
        job = {k: v for k, v in vars(args).items() if k not in SWEEP_FLAGS and not k.startswith(FEATURES.prefix)}
        samples = sample_job(
            model.sampler(args, labels),
            job_of(Namespace(**job), DIFFUSION, CLASSIFIER, guide_model_path=args.guide_model_path),
            args.num_samples,
            args.batch_size,
            labels,
            rows_by_class=bool(args.classes),
            folder=files.join(logger.get_dir(), f"{'guide-' if swept == 'guide_scale' else ''}scale-{scale:g}"),
        )
        rows.append({swept: scale, **evaluation.figures(samples)})
        dist_util.from_rank_0(lambda: write(rows, evaluation.name))
    logger.log(format_table(rows, evaluation.name))


class Evaluation:
    """A reference batch, and the network whose features are compared.

    :ivar name: the name of the network, if it is not Inception.
    """

    def __init__(self, args):
        choose("--features", args.features, dict.fromkeys(("inception", "classifier")))
        check_at_least(1, eval_batch_size=args.eval_batch_size)
        if (args.features == "classifier") != bool(args.feature_path):
            raise InputError("--features classifier and --feature_path, a classifier of clean images, belong together")
        choose("--eval_dtype", args.eval_dtype, DTYPES)
        check_at_least(FEWEST, num_samples=args.num_samples)
        if not args.ref_batch:
            raise InputError("--ref_batch is missing: give an .npz of images to compare samples with")
        self.batch_size, self.name = args.eval_batch_size, "/".join(args.feature_path.split("/")[-2:])
        self.channels = args.in_channels if args.feature_path else 3
        if args.in_channels not in {1, self.channels}:
            raise InputError(f"--in_channels {args.in_channels}: Inception takes colours; use --features classifier")
        self.reference = Batch(args.ref_batch, self.channels)
        if len(self.reference) < FEWEST:
            raise InputError(f"{args.ref_batch}: {len(self.reference)} images; the metrics need at least {FEWEST}")
        if args.feature_path:
            self.network = self._load_classifier(args)
        else:
            self.network, _ = load_inception(args.inception_path, args.eval_dtype, dist_util.dev())
        self.known = reference_features(self.network, self.reference, self.batch_size, SWEPT)

    def _load_classifier(self, args):
        flags = without_prefix(args, FEATURES)
        for name in ("image_size", "in_channels"):
            mine, theirs = getattr(flags, name), getattr(args, name)
            if mine != theirs:
                raise InputError(f"--feature_{name} {mine} does not fit the samples' --{name} {theirs}")
        height, width = self.reference.shape[1:3]
        if {height, width} != {args.image_size}:
            raise InputError(f"{args.ref_batch}: images of {height}x{width}, but the classifier of --feature_path "
                             f"takes {args.image_size}x{args.image_size}")  # fmt: skip
        self.reference.statistics = None  # statistics of Inception features cannot be used
        return ClassifierFeatures(load_classifier(flags, flags.path))

    def figures(self, path):
        """Return {short name: figure} for an .npz of samples. Every rank must call it."""
        samples = Batch(path, self.channels)
        check_batches(self.reference, samples, len(samples))
        found = Features(self.network, samples, self.batch_size, SWEPT)
        return dist_util.from_rank_0(lambda: compare(SWEPT, self.reference, self.known, found, self.network.device))


def write(rows, features):
    """Write the table and the plot of all finished guidance scales. Only rank 0 calls this function."""
    write_table(files.join(logger.get_dir(), "sweep.csv"), rows, features)
    try:
        draw(files.join(logger.get_dir(), "sweep.png"), rows, features)
    except ImportError:
        logger.warn("no picture of the sweep: pip install matplotlib")


def parse_scales(args):
    """Return the name of the flag to sweep, and its values in ascending order."""
    swept, flag = ("guide_scale", "guide_scales") if args.guide_scales else ("classifier_scale", "scales")
    text = getattr(args, flag)
    scales = sorted(set(parse_numbers(flag, text, float)))
    if not scales or scales[0] < 0:
        raise InputError(f"--{flag} {text}: give numbers from 0 up, such as 0,1,2,4")
    if swept == "guide_scale":
        if not (args.guide_model_path or args.guide_preset):
            raise InputError(f"--guide_scales {text}: there is no guide: give --guide_model_path")
        args.guide_scale = 1.0
    elif not args.classifier_path:
        raise InputError("--classifier_path is missing: give the path of a checkpoint (.pt)")
    if not args.classifier_path:
        args.classifier_scale = 0.0
    return swept, scales


def create_argparser():
    flags = {**SWEEP_FLAGS, "feature_path": "", **sampling_flags(), **class_flags(), **classifier_guidance_flags()}
    flags.update(guide_flags())
    for name in ("save_images", "progress_grid"):
        del flags[name]
    return sampling_parser(__doc__, flags, DIFFUSION, CLASSIFIER, FEATURES)


if __name__ == "__main__":
    main()
