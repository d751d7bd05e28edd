"""Sample at several scales of guidance and evaluate each against a reference batch: sweep.csv and sweep.png.

The samples of each scale stay in a folder of --log_dir, made as classifier_sample.py makes them. Run it again after a
kill, or with more scales, and it goes on. Without the Inception graph, `--features classifier` takes the features of a
classifier of clean images (classifier_train.py --noised False), whose flags have `feature_` before their names.
"""

import os
import sys
from argparse import Namespace
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from evaluations.batches import Batch  # noqa: E402
from evaluations.errors import EvaluationError  # noqa: E402
from evaluations.evaluator import DTYPES, load_inception  # noqa: E402
from evaluations.features import FEWEST, Features, check_batches, compare, reference_features  # noqa: E402
from evaluations.ranks import Ranks  # noqa: E402
from evaluations.sweep import SWEPT, draw, format_table, write_table  # noqa: E402
from guided_diffusion import dist_util, files, logger  # noqa: E402
from guided_diffusion.classifier_util import ClassifierFeatures  # noqa: E402
from guided_diffusion.errors import InputError, check_at_least, choose  # noqa: E402
from guided_diffusion.guidance import route_labels  # noqa: E402
from guided_diffusion.sample_job import BatchSampler, sample_job  # noqa: E402
from guided_diffusion.sampling_networks import (  # noqa: E402
    CLASSIFIER,
    DIFFUSION,
    class_flags,
    guidance_flags,
    guide,
    job_of,
    labels_for,
    load_classifier,
    load_diffusion,
    load_guide,
    sampling_flags,
    set_up_sampling,
    without_prefix,
)
from guided_diffusion.script_util import (  # noqa: E402
    FlagParser,
    add_dict_to_argparser,
    classifier_defaults,
    model_and_diffusion_defaults,
    parse_numbers,
)

FEATURES = replace(CLASSIFIER, kind="features", path_flag="feature_path", prefix="feature_", optional=True)


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION, CLASSIFIER, FEATURES)
    scales = parse_scales(args.scales)
    model, diffusion = load_diffusion(args)
    classifier = load_guide(args)
    labels = labels_for(args, args.num_classes, "classifier_path", "model_path")
    evaluation = run_or_explain(lambda: Evaluation(args))  # a mistake shows before hours go into samples

    rows = []
    for scale in scales:
        logger.log(f"classifier scale {scale:g}")
        flags = Namespace(**{name: getattr(args, name) for name in sample_flags()}, classifier_scale=scale)
        sampler = BatchSampler(
            diffusion,
            route_labels(model, args.class_cond),
            (args.in_channels, args.image_size, args.image_size),
            args.seed,
            labels,
            guide(classifier, diffusion, scale, args.guidance_interval),
            args.use_ddim,
            args.clip_denoised,
        )
        samples = sample_job(
            sampler,
            job_of(flags, DIFFUSION, CLASSIFIER),
            args.num_samples,
            args.batch_size,
            labels,
            rows_by_class=bool(args.classes),
            folder=files.join(logger.get_dir(), f"scale-{scale:g}"),
        )
        rows.append({"scale": scale, **run_or_explain(lambda path=samples: evaluation.figures(path))})
        dist_util.from_rank_0(lambda: run_or_explain(lambda: write(rows, evaluation.name)))
    logger.log(format_table(rows, evaluation.name))


class Evaluation:
    """A reference batch, and the network by whose features samples are compared with it.

    :ivar name: of the network, where it is not Inception.
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
        self.ranks, self.batch_size = JobRanks(), args.eval_batch_size
        self.name, channels = "", args.in_channels
        if channels != 3 and not args.feature_path:
            raise InputError(f"--in_channels {channels}: Inception takes colours; take --features classifier")
        self.reference = Batch(args.ref_batch, channels)
        if len(self.reference) < FEWEST:
            raise InputError(f"{args.ref_batch}: {len(self.reference)} images; the metrics need at least {FEWEST}")
        if args.feature_path:
            self.network = self._load_classifier(args)
            self.name = "/".join(args.feature_path.split("/")[-2:])
        else:
            self.network, _ = load_inception(args.inception_path, args.eval_dtype, dist_util.dev(), self.ranks)
        self.known = reference_features(self.network, self.reference, self.batch_size, self.ranks, SWEPT)

    def _load_classifier(self, args):
        flags = without_prefix(args, FEATURES)
        for name in ("image_size", "in_channels"):
            if getattr(flags, name) != getattr(args, name):
                raise InputError(f"--feature_{name} {getattr(flags, name)} does not fit the samples' --{name} "
                                 f"{getattr(args, name)}")  # fmt: skip
        height, width = self.reference.shape[1:3]
        if {height, width} != {args.image_size}:
            raise InputError(f"{args.ref_batch}: images of {height}x{width}, but the classifier of --feature_path "
                             f"takes {args.image_size}x{args.image_size}")  # fmt: skip
        self.reference.statistics = None  # they are of Inception's features
        return ClassifierFeatures(load_classifier(flags, flags.path))

    def figures(self, path):
        """The figures of an .npz of samples, by the metrics' short names. All ranks call it."""
        samples = Batch(path, self.reference.channels)
        check_batches(self.reference, samples, len(samples), self.ranks)
        found = Features(self.network, samples, self.batch_size, self.ranks, SWEPT)
        return dist_util.from_rank_0(
            lambda: run_or_explain(lambda: compare(SWEPT, self.reference, self.known, found, dist_util.dev()))
        )


class JobRanks(Ranks):
    """The ranks of this job, for an evaluation."""

    def __init__(self):
        self.rank, self.size = dist_util.get_rank(), dist_util.get_world_size()

    def gather_all(self, value):
        return dist_util.gather_objects(value)

    def gather(self, value):
        values = self.gather_all(value)
        return values if self.rank == 0 else None


def run_or_explain(work):
    """What is wrong with an evaluation's input is the user's mistake here, too."""
    try:
        return work()
    except EvaluationError as e:
        raise InputError(str(e)) from None


def write(rows, features):
    """Rank 0: the table and the picture of the scales that are done."""
    write_table(files.join(logger.get_dir(), "sweep.csv"), rows, features)
    try:
        draw(files.join(logger.get_dir(), "sweep.png"), rows, features)
    except ImportError:
        logger.warn("no picture of the sweep: pip install matplotlib")


def parse_scales(text):
    scales = sorted(set(parse_numbers("scales", text, float)))
    if not scales or scales[0] < 0:
        raise InputError(f"--scales {text}: give numbers from 0 up, such as 0,1,2,4")
    return scales


def sample_flags():
    """The flags that decide the samples, beside the scale, with their defaults: classifier_sample.py's."""
    flags = {**sampling_flags(), **class_flags(), **guidance_flags()}
    for name in ("classifier_scale", "save_images", "progress_grid"):
        del flags[name]
    return {**flags, **model_and_diffusion_defaults(), **classifier_defaults()}


def create_argparser():
    flags = dict(scales="0,1,2,4,8", ref_batch="", features="inception", inception_path="", feature_path="")
    flags.update(eval_batch_size=32, eval_dtype="fp32")
    flags.update({FEATURES.prefix + name: default for name, default in FEATURES.flags.items()})
    parser = FlagParser(description=__doc__)
    add_dict_to_argparser(parser, {**flags, **sample_flags()})
    return parser


if __name__ == "__main__":
    main()
