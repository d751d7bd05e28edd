"""What several ranks do together: training as one process would, sharing values, and finding their devices."""

import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from launch import TINY, run
from torch.optim import AdamW

from guided_diffusion import dist_util, logger, rendezvous
from guided_diffusion.errors import InputError
from guided_diffusion.resample import LossSecondMomentResampler
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.train_util import TrainLoop

GLOBAL_BATCH = 12
STEPS = 4
LR = 1e-4
EMA_RATE = 0.9
TESTS = os.path.dirname(os.path.abspath(__file__))

pytestmark = pytest.mark.usefixtures("cpu")


# What runs on the ranks. Each writes what it has in the end to rankN.pt of the folder `out`.


def make_model(seed, **options):
    """A small model whose weights are all random: those that start from zero would hide much of the gradient.

    64 channels: with 32, each of group norm's groups is one channel, and biases before it have no gradient at all.
    """
    options = dict(TINY, image_size=8, attention_resolutions="8", num_channels=64, learn_sigma=True, class_cond=True,
                   num_classes=10, **options)  # fmt: skip
    model, diffusion = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **options})
    g = th.Generator().manual_seed(seed)
    with th.no_grad():
        for p in model.parameters():
            p.copy_(th.randn(p.shape, generator=g) * (0.05 if p.ndim > 1 else 0.3))
    return model, diffusion


def global_batches():
    """The same batches whoever asks: (images, what goes with them), with their timesteps and noise fixed."""
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
    """Trains on the timesteps and noise that come with the batch."""

    def compute_loss(self, micro, cond):
        return mean_loss(self.ddp_model, self.diffusion, micro, cond)


def my_share(batches):
    rank, share = dist_util.get_rank(), GLOBAL_BATCH // dist_util.get_world_size()
    part = slice(rank * share, (rank + 1) * share)
    for x, cond in batches:
        yield x[part], {k: v[part] for k, v in cond.items()}


def train(microbatch, seed):
    """The gradient of the first step, the weights after STEPS and their average."""
    model, diffusion = make_model(seed)
    loop = FixedNoiseLoop(
        model=model,
        diffusion=diffusion,
        data=None,
        batch_size=GLOBAL_BATCH // dist_util.get_world_size(),
        microbatch=microbatch,
        lr=LR,
        ema_rate=str(EMA_RATE),
        log_interval=1,
        save_interval=100,
        resume_checkpoint="",
    )
    gradient = None
    for x, cond in my_share(global_batches()):
        if gradient is None:
            loop.forward_backward(x, cond)
            gradient = [p.grad.clone() for p in model.parameters()]
        loop.run_step(x, cond)
    return {
        "gradient": gradient,
        "weights": [p.detach().clone() for p in model.parameters()],
        "ema": [p.detach().clone() for p in loop.ema_params[0]],
    }


def losses_of_rank(rank):
    """A number of losses that differs from rank to rank, none among them, over 3 timesteps."""
    count = [2, 7, 0][rank]
    return [(i + rank) % 3 for i in range(count)], [1.0 + rank + 0.25 * i for i in range(count)]


def learn_from_losses():
    sampler = LossSecondMomentResampler(SimpleNamespace(num_timesteps=3), history_per_term=2, uniform_prob=0.1)
    ts, losses = losses_of_rank(dist_util.get_rank())
    sampler.update_with_local_losses(th.tensor(ts, dtype=th.int64), th.tensor(losses))
    return sampler.weights()


def freeze_and_train():
    """How far a frozen parameter moves in a step with weight decay."""
    model, diffusion = make_model(seed=0)
    model.time_embed.requires_grad_(False)
    share = GLOBAL_BATCH // dist_util.get_world_size()
    loop = FixedNoiseLoop(model=model, diffusion=diffusion, data=None, batch_size=share, microbatch=-1, lr=0.1,
                          weight_decay=0.5, ema_rate="", log_interval=1, save_interval=100,
                          resume_checkpoint="")  # fmt: skip
    before = [p.clone() for p in model.time_embed.parameters()]
    loop.run_step(*next(my_share(global_batches())))
    return largest_difference(before, list(model.time_embed.parameters()))


def exchange():
    """What the functions that pass values between ranks give on this one."""
    rank = dist_util.get_rank()
    params = [th.nn.Parameter(th.full((2, 3), float(rank))), th.full((4,), rank + 0.5)]
    dist_util.sync_params(params)
    return {
        "gathered": dist_util.all_gather_uneven(th.arange(rank * 2).reshape(rank, 2) + 10 * rank),
        "object": dist_util.broadcast_object({"rank": rank, "text": "x" * (rank + 1)}),
        "params": [p.detach() for p in params],
    }


def on_ranks(out):
    """The whole of what a rank does for these tests."""
    dist_util.setup_dist()
    rank, share = dist_util.get_rank(), GLOBAL_BATCH // dist_util.get_world_size()
    logger.configure(dir=out, format_strs=[])
    th.save(
        {
            # Other ranks start from other weights: rank 0's must reach all.
            "whole": train(microbatch=-1, seed=rank),
            "uneven": train(microbatch=share // 2 + 1, seed=rank),
            "frozen_moved": freeze_and_train(),
            "sampler_weights": th.from_numpy(learn_from_losses()),
            **exchange(),
        },
        os.path.join(out, f"rank{rank}.pt"),
    )


# The tests


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """What each rank of a job of 2, and of 3, has in the end."""
    out = str(tmp_path_factory.mktemp(f"ranks{request.param}"))
    snippet = f"import sys; sys.path.insert(0, {TESTS!r}); import test_ranks; test_ranks.on_ranks({out!r})"
    run(["-c", snippet], ranks=request.param).check()
    return [th.load(os.path.join(out, f"rank{r}.pt")) for r in range(request.param)]


@pytest.fixture(scope="module")
def reference():
    """What plain PyTorch makes of the whole batches: no TrainLoop, no ranks, no microbatches."""
    model, diffusion = make_model(seed=0)
    opt = AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    average = [p.detach().clone() for p in model.parameters()]
    gradient = None
    for x, cond in global_batches():
        opt.zero_grad()
        mean_loss(model, diffusion, x, cond).backward()
        gradient = gradient or [p.grad.clone() for p in model.parameters()]
        opt.step()
        average = [EMA_RATE * a + (1 - EMA_RATE) * p.detach() for a, p in zip(average, model.parameters())]
    return {
        "gradient": gradient,
        "weights": [p.detach() for p in model.parameters()],
        "ema": average,
        "start": [p.detach() for p in make_model(seed=0)[0].parameters()],
    }


def largest_difference(a, b):
    assert len(a) == len(b)
    return max(float((x - y).abs().max()) for x, y in zip(a, b))


def check_training(got, reference):
    size = max(float(g.abs().max()) for g in reference["gradient"])
    assert largest_difference(got["gradient"], reference["gradient"]) < 1e-5 * size
    assert largest_difference(got["weights"], reference["weights"]) < 1e-5
    assert largest_difference(got["ema"], reference["ema"]) < 1e-5


def test_frozen_parameters_stay(ranks):
    # Averaging once gave them gradients of zeros, with which weight decay moves them.
    assert [got["frozen_moved"] for got in ranks] == [0.0] * len(ranks)


def test_reference_moves(reference):
    # Guards the comparisons: weights that stand still would agree however they were trained.
    assert largest_difference(reference["start"], reference["weights"]) > 2 * LR


@pytest.mark.parametrize("microbatch", [-1, 5])
def test_one_process_trains_like_plain_pytorch(microbatch, reference):
    with logger.scoped_configure(dir=None, format_strs=[]):
        check_training(train(microbatch, seed=0), reference)


@pytest.mark.parametrize("microbatches", ["whole", "uneven"])
def test_ranks_train_like_plain_pytorch(microbatches, ranks, reference):
    for got in ranks:
        check_training(got[microbatches], reference)


def test_ranks_hold_identical_weights(ranks):
    # Bit for bit: ranks that drift apart by rounding would drift on.
    for other in ranks[1:]:
        for microbatches in ("whole", "uneven"):
            assert largest_difference(ranks[0][microbatches]["weights"], other[microbatches]["weights"]) == 0


def test_samplers_learn_from_all_ranks(ranks):
    history = {0: [], 1: [], 2: []}
    for rank in range(len(ranks)):
        for t, loss in zip(*losses_of_rank(rank)):
            history[t].append(loss)
    # "Improved DDPM", eq. 18, over the latest two losses of each timestep, with a tenth left uniform.
    expected = np.array([np.sqrt(np.mean(np.square(losses[-2:]))) for losses in history.values()])
    expected = 0.9 * expected / expected.sum() + 0.1 / 3
    for got in ranks:
        np.testing.assert_allclose(got["sampler_weights"].numpy(), expected, rtol=1e-12)
        assert (got["sampler_weights"] == ranks[0]["sampler_weights"]).all()


def test_values_pass_between_ranks(ranks):
    for got in ranks:
        assert [g.tolist() for g in got["gathered"]] == [
            [],
            [[10, 11]],
            [[20, 21], [22, 23]],
        ][: len(ranks)]
        assert got["object"] == {"rank": 0, "text": "x"}
        assert all((p == value).all() for p, value in zip(got["params"], [0.0, 0.5]))


def test_values_pass_in_one_process():
    x, p = th.arange(3), th.ones(2)
    dist_util.sync_params([p])
    assert p.tolist() == [1, 1]
    assert [g.tolist() for g in dist_util.all_gather_uneven(x)] == [[0, 1, 2]]
    assert dist_util.broadcast_object("value") == "value"
    assert (dist_util.get_rank(), dist_util.get_world_size()) == (0, 1)


# How ranks find their devices


def backends(names):
    """What ranks choose who find GPUs of these names, "" for none; or what they are told instead."""
    store, found = dist_util.dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), {}

    def choose_device(local_rank):
        if names[local_rank] is None:
            raise RuntimeError("CUDA error: out of order")
        return names[local_rank]

    def choose(rank):
        client = dist_util.dist.TCPStore("127.0.0.1", store.port, is_master=False)
        try:
            found[rank] = dist_util._choose_backend(client, rank, len(names), rank)
        except (InputError, RuntimeError) as e:
            found[rank] = str(e)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist_util, "_choose_device", choose_device)
        patch.setattr(dist_util.dist, "is_nccl_available", lambda: True)
        threads = [threading.Thread(target=choose, args=[rank]) for rank in range(len(names))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [found[rank] for rank in range(len(names))]


@pytest.mark.parametrize(
    "names, backend",
    [
        (["node GPU-0"], "nccl"),
        ([""], "gloo"),
        (["a GPU-0", "a GPU-1", "b GPU-0"], "nccl"),  # also where each rank sees only its own
        (["a GPU-0", "a GPU-0"], "gloo"),
        (["", "", ""], "gloo"),
    ],
)
def test_nccl_where_every_rank_has_a_gpu_of_its_own(names, backend, capfd):
    assert backends(names) == [backend] * len(names)
    assert ("ranks share a GPU" in capfd.readouterr().err) == (names == ["a GPU-0", "a GPU-0"])


def test_all_ranks_refuse_where_some_find_no_gpu():
    assert all(text.startswith("1 of 3 ranks find no GPU, rank 1 the first:") for text in backends(["a 0", "", "a 1"]))


def test_all_ranks_end_where_one_has_a_broken_gpu():
    told = "rank 1 cannot use its GPU, and says why"
    assert backends(["a 0", None, "a 2"]) == [told, "CUDA error: out of order", told]


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"])
def test_the_rank_within_the_node(name, monkeypatch):
    for other in rendezvous.LOCAL_RANK_VARIABLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "5")
    assert rendezvous._from_environment(rendezvous.LOCAL_RANK_VARIABLES, 0) == 5
