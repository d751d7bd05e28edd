"""Several ranks: training equals that of one process, values are exchanged, and a backend is chosen."""

import os
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch as th
from helpers import batch_of, copies, new_loop, new_model, randomize
from PIL import Image
from sampling import CLASSIFIER, run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from guided_diffusion import dist_util, logger, train_util
from guided_diffusion.classifier_util import ClassifierTrainLoop
from guided_diffusion.errors import InputError
from guided_diffusion.resample import LossSecondMomentResampler
from guided_diffusion.script_util import classifier_defaults, create_classifier
from guided_diffusion.train_util import TrainLoop

GLOBAL_BATCH, STEPS, LR, EMA_RATE = 12, 4, 1e-4, 0.9
TESTS = os.path.dirname(os.path.abspath(__file__))

pytestmark = pytest.mark.usefixtures("cpu")


# Code that runs on every rank. Rank N writes its results to `out`/rankN.pt.


def make_model(seed, **options):
    """A small model with 64 channels: with 32, group norm would normalise single channels and cancel their biases."""
    model, diffusion = new_model(num_channels=64, learn_sigma=True, class_cond=True, num_classes=10, **options)
    randomize(model, seed)
    return model, diffusion


def global_batches():
    """Yield the global batch of each step: images and {"y": labels, "t": timesteps, "noise": noise}."""
    g = th.Generator().manual_seed(7)
    for _ in range(STEPS):
        yield (
            th.rand(GLOBAL_BATCH, 3, 8, 8, generator=g) * 2 - 1,
            {
                "y": th.randint(10, (GLOBAL_BATCH,), generator=g),
                "t": th.randint(1000, (GLOBAL_BATCH,), generator=g),
                "noise": th.randn(GLOBAL_BATCH, 3, 8, 8, generator=g),
            },
        )


def mean_loss(model, diffusion, x, cond):
    losses = diffusion.training_losses(model, x, cond["t"], model_kwargs={"y": cond["y"]}, noise=cond["noise"])
    return losses["loss"].mean()


class FixedNoiseLoop(TrainLoop):
    """A training loop that takes timesteps and noise from the batch instead of drawing them at random."""

    def compute_loss(self, micro, cond):
        return mean_loss(self.ddp_model, self.diffusion, micro, cond)


def my_share(batches):
    rank, share = dist_util.get_rank(), GLOBAL_BATCH // dist_util.get_world_size()
    part = slice(rank * share, (rank + 1) * share)
    for x, cond in batches:
        yield x[part], {k: v[part] for k, v in cond.items()}


@contextmanager
def as_on_gpus():
    """Training loops created in this context use DistributedDataParallel, as on GPUs, but keep tensors on the CPU."""

    def wrap(model, device_ids, **options):
        return DistributedDataParallel(model, **options)  # on CPUs, device_ids must be None

    with (
        patch.object(th.cuda, "is_available", lambda: True),
        patch.object(dist_util, "dev", lambda: th.device("cpu")),
        patch.object(train_util, "DistributedDataParallel", wrap),
    ):
        yield


def make_loop(model, diffusion, kind, ddp=False, **options):
    with as_on_gpus() if ddp else nullcontext():
        loop = new_loop(model, diffusion, kind, batch_size=GLOBAL_BATCH // dist_util.get_world_size(), **options)
    assert isinstance(loop.ddp_model, DistributedDataParallel) == ddp
    return loop


def train(seed, microbatch=-1, ddp=False, **model_options):
    """Train, and return the gradient of the first step, and the weights and their moving average after STEPS steps."""
    model, diffusion = make_model(seed, **model_options)
    loop = make_loop(model, diffusion, FixedNoiseLoop, ddp, microbatch=microbatch, lr=LR, ema_rate=str(EMA_RATE))
    gradient = None
    for x, cond in my_share(global_batches()):
        if gradient is None:
            loop.forward_backward(x, cond)
            gradient = [p.grad.clone() for p in model.parameters()]
        loop.run_step(x, cond)
    return {"gradient": gradient, "weights": copies(model.parameters()), "ema": copies(loop.ema_params[0])}


def train_classifier(ddp):
    """Train a classifier for STEPS steps, with an evaluation on a held-out batch after each, and return its weights."""
    classifier = create_classifier(**{**classifier_defaults(), **CLASSIFIER})
    randomize(classifier, seed=dist_util.get_rank())

    def batches():
        for step in range(2 * STEPS):
            seed = 100 * step + dist_util.get_rank()
            yield batch_of(5, seed), {"y": th.arange(seed, seed + 5) % 4}

    options = dict(iterations=STEPS, val_data=batches(), eval_interval=1, microbatch=2, lr=0.1, seed=0)
    loop = make_loop(classifier, make_model(seed=0)[1], ClassifierTrainLoop, ddp, **options)
    # A large eps makes Adam's update proportional to the gradient. The usual update hides a wrong factor and
    # magnifies rounding errors of small gradients.
    loop.opt.param_groups[0]["eps"] = 1.0
    for x, cond in list(batches())[:STEPS]:
        loop.run_step(x, cond)
    return copies(classifier.parameters())


def losses_of_rank(rank):
    """Timesteps and losses of a rank. Rank 0 has 2 losses, rank 1 has 7 and rank 2 has none."""
    numbers = range([2, 7, 0][rank])
    return [(i + rank) % 3 for i in numbers], [1.0 + rank + 0.25 * i for i in numbers]


def learn_from_losses():
    sampler = LossSecondMomentResampler(SimpleNamespace(num_timesteps=3), history_per_term=2, uniform_prob=0.1)
    ts, losses = losses_of_rank(dist_util.get_rank())
    sampler.update_with_local_losses(th.tensor(ts, dtype=th.int64), th.tensor(losses))
    return sampler.weights()


def freeze_and_train():
    """Return the largest change of a frozen parameter in a training step with weight decay."""
    model, diffusion = make_model(seed=0)
    model.time_embed.requires_grad_(False)
    loop = make_loop(model, diffusion, FixedNoiseLoop, lr=0.1, weight_decay=0.5)
    before = copies(model.time_embed.parameters())
    loop.run_step(*next(my_share(global_batches())))
    return largest_difference(before, list(model.time_embed.parameters()))


def exchange():
    """Return what all_gather_uneven, broadcast_object and sync_params give on the current rank."""
    rank = dist_util.get_rank()
    params = [th.nn.Parameter(th.full((2, 3), float(rank))), th.full((4,), rank + 0.5)]
    dist_util.sync_params(params)
    return {
        "gathered": dist_util.all_gather_uneven(th.arange(rank * 2).reshape(rank, 2) + 10 * rank),
        "object": dist_util.broadcast_object({"rank": rank, "text": "x" * (rank + 1)}),
        "params": [p.detach() for p in params],
    }


def on_ranks(out):
    dist_util.setup_dist()
    rank, share = dist_util.get_rank(), GLOBAL_BATCH // dist_util.get_world_size()
    logger.configure(dir=out, format_strs=[])
    found = {
        # Ranks start from different weights, so rank 0 must broadcast its weights.
        **{name: train(rank, **{"microbatch": share // 2 + 1, **options}) for name, options in TRAININGS.items()},
        "classifiers": [train_classifier(ddp) for ddp in (False, True)],
        "frozen_moved": freeze_and_train(),
        "sampler_weights": th.from_numpy(learn_from_losses()),
        **exchange(),
    }
    th.save(found, os.path.join(out, f"rank{rank}.pt"))


TRAININGS = {
    "whole": dict(microbatch=-1),
    "uneven": {},
    "ddp": dict(ddp=True, use_checkpoint=True),  # use_checkpoint recomputes blocks in the backward pass
}


# The tests


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each rank of a job with 3 ranks."""
    out = str(tmp_path_factory.mktemp("ranks"))
    snippet = f"import test_ranks; test_ranks.on_ranks({out!r})"
    run_ranks(3, [], snippet, quick_end=True)[0].check()
    return [th.load(os.path.join(out, f"rank{r}.pt")) for r in range(3)]


@pytest.fixture(scope="module")
def reference():
    """Train in plain PyTorch on the global batches, without TrainLoop, ranks or microbatches."""
    model, diffusion = make_model(seed=0)
    opt = AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    average = copies(model.parameters())
    gradient = None
    for x, cond in global_batches():
        opt.zero_grad()
        mean_loss(model, diffusion, x, cond).backward()
        gradient = gradient or [p.grad.clone() for p in model.parameters()]
        opt.step()
        average = [EMA_RATE * a + (1 - EMA_RATE) * p.detach() for a, p in zip(average, model.parameters())]
    weights = copies(model.parameters())
    # The weights must have changed during training, or comparing them would show nothing.
    assert largest_difference(weights, list(make_model(seed=0)[0].parameters())) > 2 * LR
    return {"gradient": gradient, "weights": weights, "ema": average}


def largest_difference(a, b):
    assert len(a) == len(b)
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b))


def check_training(got, reference):
    size = max(float(g.abs().max()) for g in reference["gradient"])
    for name, tolerance in [("gradient", 1e-5 * size), ("weights", 1e-5), ("ema", 1e-5)]:
        assert largest_difference(got[name], reference[name]) < tolerance, name


def test_frozen_parameters_do_not_change(ranks):
    # Gradient averaging must not give frozen parameters zero gradients: weight decay would then change them.
    assert [got["frozen_moved"] for got in ranks] == [0.0] * len(ranks)


@pytest.mark.parametrize("microbatch", [-1, 5])
def test_one_process_trains_like_plain_pytorch(microbatch, reference):
    with logger.scoped_configure(dir=None, format_strs=[]):
        check_training(train(0, microbatch), reference)


@pytest.mark.parametrize("training", TRAININGS)
def test_ranks_train_like_plain_pytorch(training, ranks, reference):
    for got in ranks:
        check_training(got[training], reference)
        # All ranks must have bitwise equal weights, because small differences grow during training.
        assert largest_difference(ranks[0][training]["weights"], got[training]["weights"]) == 0


def test_classifiers_train_equally_with_and_without_ddp(ranks):
    for got in ranks:
        plain, ddp = got["classifiers"]
        assert largest_difference(plain, ddp) < 1e-6
        assert largest_difference(ranks[0]["classifiers"][1], ddp) == 0


def test_timestep_samplers_use_the_losses_of_all_ranks(ranks):
    history = {0: [], 1: [], 2: []}
    for rank in range(len(ranks)):
        for t, loss in zip(*losses_of_rank(rank)):
            history[t].append(loss)
    # "Improved DDPM", eq. 18, with the last two losses of each timestep, mixed with a uniform part of 0.1.
    expected = np.array([np.sqrt(np.mean(np.square(losses[-2:]))) for losses in history.values()])
    expected = 0.9 * expected / expected.sum() + 0.1 / 3
    for got in ranks:
        np.testing.assert_allclose(got["sampler_weights"].numpy(), expected, rtol=1e-12)
        assert (got["sampler_weights"] == ranks[0]["sampler_weights"]).all()


def test_values_are_exchanged_between_ranks(ranks):
    for got in ranks:
        assert [g.tolist() for g in got["gathered"]] == [[], [[10, 11]], [[20, 21], [22, 23]]][: len(ranks)]
        assert got["object"] == {"rank": 0, "text": "x"}
        assert all((p == value).all() for p, value in zip(got["params"], [0.0, 0.5]))


def test_exchanging_values_works_in_one_process():
    x, p = th.arange(3), th.ones(2)
    dist_util.sync_params([p])
    assert p.tolist() == [1, 1]
    assert [g.tolist() for g in dist_util.all_gather_uneven(x)] == [[0, 1, 2]]
    assert dist_util.broadcast_object("value") == "value"
    assert (dist_util.get_rank(), dist_util.get_world_size()) == (0, 1)


# The process group


def test_nccl_is_used_if_every_rank_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(dist_util.dist, "is_nccl_available", lambda: True)
    for gpus in (["node GPU-0"], ["a GPU-0", "a GPU-1", "b GPU-0"]):
        assert dist_util.choose_backend(gpus) == "cpu:gloo,cuda:nccl"
    for gpus in (["a GPU-0", "a GPU-0"], ["", "", ""]):
        assert dist_util.choose_backend(gpus) == "gloo"
    with pytest.raises(InputError, match="rank 1 has no GPU"):
        dist_util.choose_backend(["a GPU-0", "", "a GPU-1"])


OWN_GROUP = """
import sys
import torch.distributed as dist
from guided_diffusion import dist_util
from guided_diffusion.image_datasets import load_data
dist.init_process_group("gloo")
dist_util.setup_dist()
data = load_data(data_dir=sys.argv[1], batch_size=5, image_size=4, num_workers=0, random_flip=False)
seen = [float(x.mean()) for _ in range(4) for x in next(data)[0]]
seen = sum(dist_util.gather_objects(seen), [])
assert len(set(seen)) == 40, f"{len(set(seen))} of 40 images"
"""


def test_an_epoch_has_every_image_in_a_process_group_that_the_caller_initialised(tmp_path):
    # Regression test: ranks drew different seeds in such a process group, and two ranks saw 30 of 40 images.
    for i in range(40):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"{i}.png")
    run_ranks(2, [tmp_path], OWN_GROUP)[0].check()
