"""Training the noisy-image classifier, and evaluating its accuracy by noise level."""

import numpy as np
import torch as th
import torch.nn.functional as F

from . import dist_util, logger
from .errors import check_at_least
from .image_datasets import each_once
from .random_util import SampleNoise, TrainingRandomness
from .train_util import TrainLoop, log_loss_dict
from .training_job import common_training_flags

VALIDATION_SEED = 1 << 40  # far above usual --seed values, so that training and validation noise differ


def classifier_training_flags():
    """Return the flags that classifier_train.py passes to ClassifierTrainLoop, with their defaults."""
    flags = dict(noised=True, iterations=150000, lr=3e-4, weight_decay=0.0, anneal_lr=False, ema_rate="")
    return {**flags, "eval_interval": 5, **common_training_flags(batch_size=4)}


class ClassifierTrainLoop(TrainLoop):
    """Trains a classifier on images that are noised to timesteps drawn by the schedule sampler.

    :param noised: noise the images. False trains on clean images, at t = 0.
    :param iterations: the number of optimizer steps after which training ends.
    :param anneal_lr: decrease the learning rate linearly to zero over the iterations.
    :param val_data: an iterator over held-out batches, or None.
    :param eval_interval: the number of training steps between evaluations on a batch of val_data.
    :param kwargs: arguments of TrainLoop.
    """

    ANNEAL_DELAY = 0

    def __init__(self, *, iterations, noised=True, anneal_lr=False, val_data=None, eval_interval=5, **kwargs):
        check_at_least(1, iterations=iterations, eval_interval=eval_interval)
        self.noised = noised
        self.val_data = val_data
        self.val_randomness = TrainingRandomness(VALIDATION_SEED, for_dropout=False)
        self.eval_interval = eval_interval
        kwargs = {"ema_rate": "", "initial_lg_loss_scale": 16.0, **kwargs}
        super().__init__(total_steps=iterations, lr_anneal_steps=iterations if anneal_lr else 0, **kwargs)

    def stateful(self):
        return {**super().stateful(), "val_data": self.val_data}

    def prepare(self, batch, cond, randomness=None):
        """Noise the images, and add their timesteps to `cond` under the key "t"."""
        batch = batch.to(dist_util.dev())
        t = th.zeros(len(batch), dtype=th.long, device=dist_util.dev())
        if self.noised:
            t, _, noise = (randomness or self.randomness).draw(batch)
            batch = self.diffusion.q_sample(batch, t, noise=noise)
        return batch, {**cond, "t": t}

    def compute_loss(self, micro, cond, prefix="train"):
        logits = self.ddp_model(micro, timesteps=self.diffusion.model_timesteps(cond["t"]))
        loss = F.cross_entropy(logits, cond["y"], reduction="none")
        metrics = {
            f"{prefix}_loss": loss.detach(),
            f"{prefix}_acc@1": correct_in_top_k(logits, cond["y"], 1),
            f"{prefix}_acc@5": correct_in_top_k(logits, cond["y"], 5),
        }
        log_loss_dict(self.diffusion, cond["t"], metrics)
        return loss.mean()

    def after_step(self):
        if self.val_data is not None and self.steps_done % self.eval_interval == 0:
            self.evaluate()

    @th.no_grad()
    def evaluate(self):
        """Log the loss and accuracy on a held-out batch, whose noise is independent of the training noise."""
        self.model.eval()
        batch, cond = next(self.val_data)
        self.val_randomness.start_step(self.steps_done, len(batch), self.schedule_sampler)
        batch, cond = self.prepare(batch, cond, self.val_randomness)
        for start in range(0, len(batch), self.microbatch):
            part = slice(start, start + self.microbatch)
            micro_cond = {k: v[part].to(dist_util.dev()) for k, v in cond.items()}
            self.compute_loss(batch[part], micro_cond, prefix="val")
        self.model.train()


def correct_in_top_k(logits, labels, k):
    """Return [N] floats: 1 where the label is among the k largest logits, and 0 elsewhere."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).any(dim=1).float()


NOISE_LEVELS = ("clean", "q0", "q1", "q2", "q3")  # clean images, and the quartiles of the timesteps


@th.no_grad()
def accuracy_by_noise(model, diffusion, dataset, batch_size, num_workers=0, skip_bad_images=False):
    """Return a classifier's accuracy on all images of a dataset, by noise level.

    Every rank must call this function. Each rank evaluates its share of the images. The classifier gets each image once
    without noise and once per quartile of the timesteps. The noise depends only on the index of the image.

    :param dataset: an ImageDataset with labels, without random crops and flips.
    :return: {"acc@1": {level: accuracy in 0..1}, "acc@5": {...}}, with the levels in NOISE_LEVELS.
    """
    device = dist_util.dev()
    correct = th.zeros(1, 2, len(NOISE_LEVELS), dtype=th.float64)
    model.eval()
    batches = each_once(dataset, batch_size, num_workers, skip_bad_images=skip_bad_images)
    for indices, batch, cond in logger.progress_bar(iterable=batches, desc="held-out images", unit="batch"):
        batch, y = batch.to(device), cond["y"].to(device)
        noise = SampleNoise(VALIDATION_SEED, indices, device)
        for level in range(len(NOISE_LEVELS)):
            t, x = th.zeros(len(batch), dtype=th.long, device=device), batch
            if level > 0:
                t = th.tensor([_timestep_in_quartile(diffusion, i, level - 1) for i in indices], device=device)
                x = diffusion.q_sample(batch, t, noise=noise.randn_like(batch))
            logits = model(x, timesteps=diffusion.model_timesteps(t))
            for row, k in enumerate((1, 5)):
                correct[0, row, level] += float(correct_in_top_k(logits, y, k).sum())
    shares = th.cat(dist_util.all_gather_uneven(correct)).sum(dim=0) / len(dataset)
    return {name: dict(zip(NOISE_LEVELS, row)) for name, row in zip(("acc@1", "acc@5"), shares.tolist())}


def _timestep_in_quartile(diffusion, index, quartile):
    first, end = (-(-q * diffusion.num_timesteps // 4) for q in (quartile, quartile + 1))
    return int(np.random.default_rng([VALIDATION_SEED, index, quartile]).integers(first, max(end, first + 1)))


def accuracy_table(shares):
    """Format the result of accuracy_by_noise as a text table with one row per metric."""
    rows = [["held out", *NOISE_LEVELS]]
    rows += [[name, *(f"{100 * share:.1f}%" for share in by_level.values())] for name, by_level in shares.items()]
    return "\n".join("  ".join(f"{cell:>8}" for cell in row) for row in rows)
