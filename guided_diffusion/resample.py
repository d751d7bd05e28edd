"""Schedule samplers: distributions over the timesteps to train on."""

from abc import ABC, abstractmethod

import numpy as np
import torch as th

from . import dist_util
from .errors import choose


def create_named_schedule_sampler(name, diffusion):
    """Create the schedule sampler "uniform" or "loss-second-moment" for the timesteps of `diffusion`."""
    return choose("--schedule_sampler", name, SAMPLERS)(diffusion)


class ScheduleSampler(ABC):
    """A distribution over timesteps that reduces the variance of the training objective.

    Timesteps are drawn by importance sampling, and losses are weighted so that the mean of the objective does not
    change.
    """

    @abstractmethod
    def weights(self):
        """The weights of the timesteps: a numpy array [num_timesteps] of positive numbers, which need not sum to 1."""

    def state_dict(self):
        """Return the state to save in a checkpoint."""
        return {}

    def load_state_dict(self, state_dict):
        """Restore the state that state_dict() returned."""

    def sample(self, batch_size, device):
        """Draw timesteps for a batch from numpy's global generator.

        :return: timesteps [batch_size] int64, and the factors [batch_size] float32 to multiply their losses by.
        """
        p = self.weights()
        p = p / np.sum(p)
        indices = np.random.choice(len(p), size=(batch_size,), p=p)
        factors = 1 / (len(p) * p[indices])
        return th.from_numpy(indices).long().to(device), th.from_numpy(factors).float().to(device)


class UniformSampler(ScheduleSampler):
    """Draws all timesteps with equal probability."""

    def __init__(self, diffusion):
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self):
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A schedule sampler whose weights depend on the training losses of all ranks."""

    def update_with_local_losses(self, local_ts, local_losses):
        """Update the weights with the losses of all ranks. Every rank must call this method, with its own losses.

        :param local_ts: timesteps [N], where N may differ between ranks.
        :param local_losses: their losses [N].
        """
        pairs = th.stack([local_ts.double(), local_losses.detach().double()], dim=1)
        by_rank = dist_util.all_gather_uneven(pairs)
        if len({len(p) for p in by_rank}) == 1:  # the order of the global batch
            by_rank = th.stack(by_rank, dim=1).unbind()
        pairs = th.cat(tuple(by_rank))
        ts, losses = pairs[pairs[:, 1].isfinite()].T.tolist()  # one bad step must not affect later weights
        self.update_with_all_losses([int(t) for t in ts], losses)

    @abstractmethod
    def update_with_all_losses(self, ts, losses):
        """Update the weights with `losses` at timesteps `ts`, two lists that are equal on all ranks.

        An implementation must be deterministic, so that the state stays equal on all ranks.
        """


class LossSecondMomentResampler(LossAwareSampler):
    """Weights timesteps by sqrt(E[loss^2]) over the latest losses of each timestep ("Improved DDPM", eq. 18).

    :param history_per_term: the number of losses to keep per timestep. Until every timestep has this many losses, all
        timesteps are drawn with equal probability.
    :param uniform_prob: the fraction of timesteps that are drawn uniformly.
    """

    def __init__(self, diffusion, history_per_term=10, uniform_prob=0.001):
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term], dtype=np.float64)
        self._loss_counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def state_dict(self):
        return {"history": th.from_numpy(self._loss_history.copy()), "counts": th.from_numpy(self._loss_counts.copy())}

    def load_state_dict(self, state_dict):
        if state_dict["history"].shape == self._loss_history.shape:  # else: of other timesteps
            self._loss_history = state_dict["history"].numpy().copy()
            self._loss_counts = state_dict["counts"].numpy().copy()

    def weights(self):
        if (self._loss_counts < self.history_per_term).any():
            return np.ones([self.diffusion.num_timesteps], dtype=np.float64)
        weights = np.sqrt(np.mean(self._loss_history**2, axis=-1))
        weights /= np.sum(weights)
        return weights * (1 - self.uniform_prob) + self.uniform_prob / len(weights)

    def update_with_all_losses(self, ts, losses):
        for t, loss in zip(ts, losses):
            if self._loss_counts[t] == self.history_per_term:
                self._loss_history[t, :-1] = self._loss_history[t, 1:]
                self._loss_history[t, -1] = loss
            else:
                self._loss_history[t, self._loss_counts[t]] = loss
                self._loss_counts[t] += 1


SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
