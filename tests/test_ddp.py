"""DistributedDataParallel, which averages gradients among GPUs: on CPUs here, against CPUs' own way of averaging."""

import itertools
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch as th
from helpers import batch_of, copies, new_loop, randomize
from sampling import CLASSIFIER, run_ranks
from test_ranks import largest_difference, make_model
from torch.nn.parallel import DistributedDataParallel

from guided_diffusion import dist_util, logger, train_util
from guided_diffusion.classifier_util import ClassifierTrainLoop
from guided_diffusion.script_util import classifier_defaults, create_classifier

RANKS = 2
STEPS = 3
BATCH = 5
TRAINING = dict(batch_size=BATCH, microbatch=2, lr=0.1, seed=0)  # three passes a step, the last of a single image


# What runs on the ranks. Each writes what it has in the end to rankN.pt of the folder `out`.


@contextmanager
def as_on_gpus():
    """Loops that are made within this take themselves for a GPU's, while their tensors stay on the CPU."""

    def wrap(model, device_ids, **options):
        return DistributedDataParallel(model, **options)  # which takes no device_ids for CPUs

    with (
        patch.object(th.cuda, "is_available", lambda: True),
        patch.object(dist_util, "dev", lambda: th.device("cpu")),
        patch.object(train_util, "DistributedDataParallel", wrap),
    ):
        yield


def batches(seed):
    """Other images and labels on each rank: otherwise each would have the common gradient by itself."""
    for step in itertools.count(seed):
        rng = 100 * step + dist_util.get_rank()
        yield batch_of(BATCH, rng), {"y": th.randint(4, (BATCH,), generator=th.Generator().manual_seed(rng))}


def diffusion_loop(**options):
    """With other weights on each rank, here and below: rank 0's must reach all."""
    return new_loop(*make_model(seed=dist_util.get_rank(), **options), **TRAINING)


def classifier_loop():
    """With a batch held out after each step: a pass through the wrapped network that has no backward pass."""
    classifier = create_classifier(**{**classifier_defaults(), **CLASSIFIER})
    randomize(classifier, seed=dist_util.get_rank())
    options = dict(TRAINING, iterations=STEPS, val_data=batches(50), eval_interval=1)
    return new_loop(classifier, make_model(seed=0)[1], ClassifierTrainLoop, **options)


LOOPS = {
    "diffusion": diffusion_loop,
    "checkpoint": lambda: diffusion_loop(use_checkpoint=True),  # its backward pass computes blocks anew
    "classifier": classifier_loop,
}


def train(name, ddp):
    """The weights before and after a few steps."""
    with as_on_gpus() if ddp else nullcontext():
        loop = LOOPS[name]()
    assert loop.use_ddp == ddp and isinstance(loop.ddp_model, DistributedDataParallel) == ddp
    # Steps in proportion to the gradient: Adam's own would hide a factor, and magnify rounding where it is near zero.
    loop.opt.param_groups[0]["eps"] = 1.0
    start = copies(loop.model.parameters())
    for x, cond in itertools.islice(batches(0), STEPS):
        loop.run_step(x, cond)
    return {"start": start, "end": copies(loop.model.parameters())}


def on_ranks(out):
    dist_util.setup_dist()
    logger.configure(out, format_strs=[])
    found = {name: {ddp: train(name, ddp) for ddp in (False, True)} for name in LOOPS}
    th.save(found, f"{out}/rank{dist_util.get_rank()}.pt")


# The tests


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has in the end."""
    out = tmp_path_factory.mktemp("ddp")
    run_ranks(RANKS, [out], "import sys, test_ddp; test_ddp.on_ranks(sys.argv[1])")[0].check()
    return [th.load(out / f"rank{r}.pt") for r in range(RANKS)]


@pytest.mark.parametrize("name", LOOPS)
def test_ddp_trains_as_cpus_do_without_it(name, ranks):
    for found in ranks:
        plain, ddp = found[name][False], found[name][True]
        assert largest_difference(plain["start"], plain["end"]) > 1e-2  # standing still, they would agree anyway
        assert largest_difference(plain["end"], ddp["end"]) < 1e-6


@pytest.mark.parametrize("name", LOOPS)
def test_ddp_keeps_ranks_at_identical_weights(name, ranks):
    # Bit for bit: ranks that drift apart by rounding would drift on.
    first, *others = (found[name][True] for found in ranks)
    for other in others:
        assert all(largest_difference(first[moment], other[moment]) == 0 for moment in ("start", "end"))
