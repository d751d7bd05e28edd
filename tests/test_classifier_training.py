"""Classifier training: the loss, validation that does not affect training, and accuracy by noise level."""

import numpy as np
import pytest
import torch as th
from helpers import as_rank, batch_of, copies, new_loop, randomize

from guided_diffusion import classifier_util, dist_util, logger
from guided_diffusion.classifier_util import ClassifierTrainLoop, accuracy_by_noise, accuracy_table, correct_in_top_k
from guided_diffusion.random_util import seed_everything
from guided_diffusion.script_util import (
    classifier_and_diffusion_defaults,
    create_classifier_and_diffusion,
    create_gaussian_diffusion,
)

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


def new_classifier_loop(**options):
    flags = dict(image_size=8, num_classes=3, classifier_width=64, classifier_depth=1,
                 classifier_attention_resolutions="4")  # fmt: skip
    model, diffusion = create_classifier_and_diffusion(**{**classifier_and_diffusion_defaults(), **flags})
    randomize(model)
    return new_loop(model, diffusion, kind=ClassifierTrainLoop, **{"iterations": 4, **options})


def labelled(seed=0):
    while True:
        seed += 1
        yield batch_of(6, seed=seed), {"y": th.tensor([0, 1, 2, 0, 1, 2])}


# The loss


def test_top_k_accuracy():
    logits, labels = th.tensor([[0.1, 0.5, 0.4], [0.9, 0.0, 0.1]]), th.tensor([2, 1])
    for k, expected in {1: [0, 0], 2: [1, 0], 5: [1, 1]}.items():  # k=5 exceeds the number of classes
        assert correct_in_top_k(logits, labels, k).tolist() == expected


def test_learning_rate_falls_over_the_iterations():
    loop = new_classifier_loop(anneal_lr=True, lr=0.8, data=labelled())
    rates = []
    loop.after_step = lambda: rates.append(loop.opt.param_groups[0]["lr"])
    loop.run_loop()
    assert rates == pytest.approx([0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("noised", [True, False])
def test_loss_is_the_cross_entropy_of_noised_images(noised):
    loop = new_classifier_loop(noised=noised, microbatch=3)
    x, y = batch_of(6), th.tensor([0, 1, 2, 0, 1, 2])
    loop.randomness.start_step(0, 6, loop.schedule_sampler)
    batch, cond = loop.prepare(x, {"y": y})
    assert (cond["t"] == 0).all() != noised
    assert (batch == x).all() != noised
    loop.prepare = lambda *_: (batch, cond)
    loop.forward_backward(x, {"y": y})
    logits = loop.model(batch, cond["t"])
    expected = -logits.log_softmax(1)[th.arange(6), y].mean()
    assert logger.getkvs()["train_loss"] == pytest.approx(expected.item(), rel=1e-5)
    for p, g in zip(loop.model.parameters(), th.autograd.grad(expected, list(loop.model.parameters()))):
        assert th.allclose(p.grad, g, rtol=1e-3, atol=1e-5)


# Validation


@pytest.mark.parametrize("seed", [4, -1])
def test_validation_does_not_affect_training(seed):
    ends = []
    for val_data in (None, labelled(100)):
        seed_everything(0)
        loop = new_classifier_loop(data=labelled(), val_data=val_data, eval_interval=1, seed=seed)
        loop.run_loop()
        assert loop.model.training and all(p.grad is not None for p in loop.model.parameters())
        ends.append(copies(loop.model.parameters()))
    assert all(th.equal(a, b) for a, b in zip(*ends))


def test_validation_noise_depends_only_on_the_step():
    logged = []
    for _ in range(2):
        loop = new_classifier_loop(data=labelled(), val_data=labelled(100))
        th.rand(len(logged) + 1)
        loop.evaluate()
        logged.append(logger.dumpkvs()["val_loss"])
    assert logged[0] == logged[1]


def test_position_in_the_held_out_data_is_saved():
    class Numbered:
        step = 0

        def __next__(self):
            self.step += 1
            return next(labelled(self.step))

        def state_dict(self):
            return {"step": self.step}

        def load_state_dict(self, state):
            self.step = state["step"]

    loop = new_classifier_loop(data=labelled(), val_data=Numbered(), eval_interval=2)
    loop.run_loop()  # two evaluations: at steps 0 and 2
    resumed = new_classifier_loop(data=labelled(), val_data=Numbered(), resume_checkpoint=loop.checkpoints.last_good)
    assert resumed.val_data.step == 2


# Accuracy by noise level

SIGNS = th.tensor([-1.0, -0.4, 0.4, 1.0])  # grey value of each class


class Greys(th.utils.data.Dataset):
    """A data set of uniformly grey images whose class is given by the grey value."""

    def __init__(self, count):
        self.labels = [i % 4 for i in range(count)]

    def __len__(self):
        return len(self.labels)

    def get(self, i, rng):
        return np.full((1, 2, 2), SIGNS[self.labels[i]], np.float32), {"y": np.array(self.labels[i])}


class Bayes(th.nn.Module):
    """The Bayes-optimal classifier of noised Greys: the class whose scaled grey value is nearest to the mean."""

    def __init__(self, diffusion):
        super().__init__()
        self.signal = th.from_numpy(diffusion.sqrt_alphas_cumprod).float()

    def forward(self, x, timesteps):
        mean = x.mean(dim=(1, 2, 3))
        return -(mean[:, None] - self.signal[timesteps][:, None] * SIGNS).abs()


def bayes_accuracy(diffusion, quartile):
    """Return the exact accuracy of Bayes in one quarter of the timesteps, from the normal distribution of the mean."""
    ts = np.arange(quartile * diffusion.num_timesteps // 4, (quartile + 1) * diffusion.num_timesteps // 4)
    # The mean of 4 pixels has half the standard deviation of the noise.
    signal, noise = diffusion.sqrt_alphas_cumprod[ts], diffusion.sqrt_one_minus_alphas_cumprod[ts] / 2
    # Decision boundaries: -0.7, 0, 0.7. An outer class is 0.3 from its boundary; an inner class is 0.3 and 0.4 away.
    beyond = [0.5 * th.erfc(th.from_numpy(d * signal / noise) / 2**0.5).mean() for d in (0.3, 0.4)]
    return 1 - float(0.5 * beyond[0] + 0.5 * (beyond[0] + beyond[1]))


@pytest.fixture
def diffusion():
    return create_gaussian_diffusion(steps=100, noise_schedule="cosine")


def test_accuracy_by_noise_matches_theory(diffusion):
    count = 4000
    shares = accuracy_by_noise(Bayes(diffusion), diffusion, Greys(count), batch_size=500)
    assert shares["acc@1"]["clean"] == 1.0
    for quartile in range(4):
        want = bayes_accuracy(diffusion, quartile)
        # Five standard errors of a proportion
        assert abs(shares["acc@1"][f"q{quartile}"] - want) < 5 * (max(want * (1 - want), 1e-3) / count) ** 0.5
    assert set(shares["acc@5"].values()) == {1.0}  # there are only four classes


def test_accuracy_is_the_same_on_several_ranks(diffusion, monkeypatch):
    """The counts of three simulated ranks, the last with fewer images, add up to the single-rank accuracy."""
    want = accuracy_by_noise(Bayes(diffusion), diffusion, Greys(50), batch_size=7)
    sums = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        monkeypatch.setattr(dist_util, "all_gather_uneven", lambda t: sums.append(t) or [t])
        accuracy_by_noise(Bayes(diffusion), diffusion, Greys(50), batch_size=4)
    total = th.cat(sums).sum(dim=0) / 50
    assert total.tolist() == [list(row.values()) for row in want.values()]


def test_accuracy_table_is_readable():
    shares = {"acc@1": dict(zip(classifier_util.NOISE_LEVELS, [1, 0.5, 0.25, 0.125, 0.1])), "acc@5": {"clean": 1.0}}
    lines = accuracy_table(shares).splitlines()
    assert lines[0].split() == ["held", "out", "clean", "q0", "q1", "q2", "q3"]
    assert lines[1].split() == ["acc@1", "100.0%", "50.0%", "25.0%", "12.5%", "10.0%"]
