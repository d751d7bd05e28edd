"""Training the noisy-image classifier: hooks of the common training loop."""

import torch as th
import torch.nn.functional as F

from . import dist_util
from .errors import InputError
from .train_util import TrainLoop, log_loss_dict


def classifier_training_flags():
    """The flags of training a classifier that ClassifierTrainLoop takes as they are, with their defaults."""
    return dict(
        noised=True,
        iterations=150000,
        lr=3e-4,
        weight_decay=0.0,
        anneal_lr=False,
        batch_size=4,
        microbatch=-1,
        resume_checkpoint="",
        seed=-1,
        log_interval=10,
        eval_interval=5,
        save_interval=10000,
    )


class ClassifierTrainLoop(TrainLoop):
    """Trains a classifier on images noised to timesteps of the schedule sampler.

    :param noised: False trains on clean images, at t = 0.
    :param iterations: the step at which training ends.
    :param anneal_lr: let the learning rate fall linearly to zero by then.
    :param val_data: an iterator of held-out batches, or None.
    :param eval_interval: steps between evaluations on a batch of val_data.
    :param kwargs: TrainLoop's.
    """

    def __init__(self, *, iterations, noised=True, anneal_lr=False, val_data=None, eval_interval=5, **kwargs):
        for name, value in [("iterations", iterations), ("eval_interval", eval_interval)]:
            if value < 1:
                raise InputError(f"--{name} {value}: at least 1 is needed")
        self.noised = noised
        self.val_data = val_data
        self.eval_interval = eval_interval
        kwargs.setdefault("initial_lg_loss_scale", 16.0)
        super().__init__(ema_rate="", total_steps=iterations, lr_anneal_steps=iterations if anneal_lr else 0, **kwargs)

    def run_step(self, batch, cond):
        self._anneal_lr()
        super().run_step(batch, cond)

    def prepare(self, batch, cond):
        """Noise the images; the timesteps go along with the labels."""
        batch = batch.to(dist_util.dev())
        t = th.zeros(len(batch), dtype=th.long, device=dist_util.dev())
        if self.noised:
            t, _ = self.randomness.timesteps(self.schedule_sampler, len(batch), dist_util.dev())
            batch = self.diffusion.q_sample(batch, t, noise=self.randomness.randn_like(batch))
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
        if self.val_data is not None and self.step % self.eval_interval == 0:
            self.evaluate()

    @th.no_grad()
    def evaluate(self):
        """Log loss and accuracy on a held-out batch."""
        self.model.eval()
        self.randomness.start_step(self.steps_done, self.batch_size)
        batch, cond = self.prepare(*next(self.val_data))
        for start in range(0, len(batch), self.microbatch):
            part = slice(start, start + self.microbatch)
            micro_cond = {k: v[part].to(dist_util.dev()) for k, v in cond.items()}
            self.compute_loss(batch[part], micro_cond, prefix="val")
        self.model.train()


def correct_in_top_k(logits, labels, k):
    """Whether the label is among the k largest logits: [N] float."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).any(dim=1).float()
