"""The training loop: batches, gradients, optimizer steps, moving averages, logs, checkpoints and previews."""

import copy
import os
import signal
import threading
from collections import Counter
from contextlib import contextmanager, nullcontext

import torch as th
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from . import dist_util, logger
from .checkpoint_util import (  # other projects import these names from train_util
    find_ema_checkpoint,
    find_resume_checkpoint,
    get_blob_logdir,
    parse_resume_step_from_filename,
)
from .errors import InputError, check_at_least
from .fp16_util import INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer
from .nn import update_ema
from .previews import average_is_ready, evaluating
from .random_util import TrainingRandomness
from .resample import LossAwareSampler, UniformSampler
from .script_util import parse_numbers
from .training_metrics import Throughput, log_loss_dict
from .training_state import CheckpointIO, continues_records, find_model_to_resume

__all__ = ["TrainLoop", "find_ema_checkpoint", "find_resume_checkpoint", "get_blob_logdir", "log_loss_dict",
           "parse_resume_step_from_filename"]  # fmt: skip


class TrainLoop:
    """Trains a diffusion model. Subclasses override `prepare`, `compute_loss` and `after_step` to train other networks.

    The gradient of a step is the gradient of the mean loss over the global batch, for any number of ranks and
    microbatches. `step` is the number of steps of this process, and `resume_step` the number of steps of the resumed
    checkpoint. Both numbers include skipped steps.

    :param model: the network, on this rank's device. All ranks have the same architecture.
    :param data: an iterator of pairs (images [batch_size, C, ...], dict of model keyword arguments [batch_size, ...]).
    :param batch_size: images per step on each rank.
    :param microbatch: the number of images that pass through the network at once; -1 for the whole batch.
    :param ema_rate: the rates of the moving averages of the weights: a number, or a string of numbers with commas.
    :param log_interval, save_interval: the number of steps between log rows, and between checkpoints.
    :param resume_checkpoint: the modelNNNNNN.pt to resume from, "auto" for the newest one in the run folder, or "".
    :param schedule_sampler: the ScheduleSampler that draws timesteps. The default draws them uniformly.
    :param lr_anneal_steps: the number of steps over which the learning rate falls linearly to zero. Training then ends.
        0 keeps the learning rate constant.
    :param warmup_steps: the number of first steps over which the learning rate rises linearly.
    :param max_grad_norm: see MixedPrecisionTrainer.
    :param max_bad_steps: the number of consecutive skipped steps after which training ends with an error; 0 for no
        limit. A step is skipped if its loss or gradient is not finite.
    :param total_steps: the number of steps after which training ends; 0 for no limit other than lr_anneal_steps.
    :param keep_checkpoints: the number of checkpoints to keep; 0 keeps all.
    :param preview: a previews.Preview, which is written every `sample_interval` steps.
    :param seed: timesteps and noise are functions of (seed, step, position in the global batch). With a negative seed,
        the global generators draw them, and a resumed run draws other numbers.
    :param compile: compile the network with torch.compile in the first step.
    :param use_fp16, use_bf16, fp16_scale_growth, initial_lg_loss_scale: see MixedPrecisionTrainer.
    """

    ANNEAL_DELAY = 1  # In the original, annealing begins one step late: steps 0 and 1 have the full rate.

    def __init__(
        self, *, model, diffusion, data, batch_size, microbatch, lr, ema_rate, log_interval, save_interval,
        resume_checkpoint, use_fp16=False, fp16_scale_growth=1e-3, schedule_sampler=None, weight_decay=0.0,
        lr_anneal_steps=0, total_steps=0, initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE, use_bf16=False, seed=-1,
        warmup_steps=0, max_grad_norm=0.0, max_bad_steps=20, keep_checkpoints=0, preview=None, sample_interval=0,
        compile=False,
    ):  # fmt: skip
        check_at_least(1, batch_size=batch_size, log_interval=log_interval, save_interval=save_interval)
        check_at_least(0, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm, warmup_steps=warmup_steps)
        check_at_least(0, max_bad_steps=max_bad_steps, keep_checkpoints=keep_checkpoints)
        check_at_least(0, sample_interval=sample_interval, lr_anneal_steps=lr_anneal_steps, total_steps=total_steps)
        if logger.get_dir() is None:
            logger.configure()
        self.model, self.diffusion, self.data = model, diffusion, data
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.randomness = TrainingRandomness(seed)
        self.use_fp16, self.fp16_scale_growth = use_fp16, fp16_scale_growth
        self.batch_size = batch_size
        self.global_batch = batch_size * dist_util.get_world_size()
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr, self.weight_decay = lr, weight_decay
        self.lr_anneal_steps, self.warmup_steps = lr_anneal_steps, warmup_steps
        self.ema_rate = [float(rate) for rate in parse_numbers("ema_rate", str(ema_rate), float)]
        if not all(0 <= rate <= 1 for rate in self.ema_rate):
            raise InputError(f"--ema_rate {ema_rate}: give a number from 0 to 1 such as 0.9999, or several with commas")
        self.max_bad_steps = max_bad_steps
        self.log_interval, self.save_interval = log_interval, save_interval
        self.preview = preview
        self.sample_interval = sample_interval if preview is not None else 0
        self.total_steps = min((n for n in (total_steps, lr_anneal_steps) if n > 0), default=None)
        self.resume_checkpoint = find_model_to_resume(find_resume_checkpoint() or resume_checkpoint)
        self.resume_step = parse_resume_step_from_filename(self.resume_checkpoint)
        self.step = 0
        self.bad_steps = 0  # consecutive skipped steps
        self.throughput = Throughput()

        dist_util.sync_params(model.parameters())
        self.mp_trainer = MixedPrecisionTrainer(
            model=model, use_fp16=use_fp16, fp16_scale_growth=fp16_scale_growth, use_bf16=use_bf16,
            initial_lg_loss_scale=initial_lg_loss_scale, max_grad_norm=max_grad_norm,
        )  # fmt: skip
        self.opt = AdamW(self.mp_trainer.master_params, lr=lr, weight_decay=weight_decay, fused=True)
        self.ema_params = [copy.deepcopy(self.mp_trainer.master_params) for _ in self.ema_rate]
        self._wrap_model(compile)
        self.checkpoints = CheckpointIO(
            self.mp_trainer, self.opt, list(zip(self.ema_rate, self.ema_params)), self.resume_checkpoint,
            keep_checkpoints, **self.stateful(),
        )  # fmt: skip
        self.checkpoints.load()

    def _wrap_model(self, compile):
        """Set `ddp_model`: the network, in DistributedDataParallel if there are several GPUs, and perhaps compiled."""
        self.ddp_model = self.model
        self.use_ddp = th.cuda.is_available() and dist_util.get_world_size() > 1
        if self.use_ddp:
            self.ddp_model = DistributedDataParallel(
                self.model, device_ids=[dist_util.dev()], broadcast_buffers=False, bucket_cap_mb=128
            )
        if compile:
            logger.log("compiling the network (--compile True): the first step can take minutes")
            if self.use_ddp and getattr(self.model, "use_checkpoint", False):
                th._dynamo.config.optimize_ddp = False  # torch 2.6 cannot split such a graph at DDP's buckets
            self.ddp_model = th.compile(self.ddp_model, dynamic=False)

    def stateful(self):
        """Return {name: object}, the objects whose state is saved in a checkpoint. Subclasses may add objects."""
        return {"schedule_sampler": self.schedule_sampler, "data": self.data}

    @property
    def steps_done(self):
        """The number of training steps of the weights, including those before this process."""
        return self.step + self.resume_step

    def run_loop(self):
        """Train until the end of the run. Write log rows, checkpoints and previews at their intervals."""
        if self.total_steps is None:
            logger.log("this run has no end: stop it by hand, or give --total_steps or --lr_anneal_steps")
        # A killed run may have logged steps after its last checkpoint. This run repeats these steps and logs them
        # again.
        if continues_records(self.resume_checkpoint):
            dist_util.from_rank_0(lambda: logger.truncate_records(logger.get_dir(), self.steps_done))
        saved, due = self.steps_done, False
        self.throughput = Throughput()
        with (
            noting_signals() as signals,
            logger.progress_bar(total=self.total_steps, initial=self.steps_done, desc="training", unit="step") as bar,
        ):
            while self.total_steps is None or self.steps_done < self.total_steps:
                with self.throughput.waiting():
                    batch, cond = next(self.data)
                self.run_step(batch, cond)
                if self.steps_done % self.log_interval == 0:
                    self._write_log_row()
                self.step += 1
                bar.update()
                due = due or self.steps_done % self.save_interval == 0
                if due and not self.bad_steps:  # do not save after a skipped step, because the run may be diverging
                    self.save()
                    saved, due = self.steps_done, False
                    if os.environ.get("DIFFUSION_TRAINING_TEST"):  # as in the original, for integration tests
                        return
                if any(dist_util.gather_objects(bool(signals))):
                    logger.log(f"stopping after step {self.steps_done}, as a signal asked")
                    break
                if self.sample_interval and self.steps_done % self.sample_interval == 0:
                    self.write_preview()
            if saved != self.steps_done:
                self.save()

    def run_step(self, batch, cond):
        """Take one optimizer step with a batch, unless the loss or the gradient is not finite."""
        self._anneal_lr()
        self.forward_backward(batch, cond)
        if self.mp_trainer.optimize(self.opt):
            self.bad_steps = 0
            for rate, params in zip(self.ema_rate, self.ema_params):
                update_ema(params, self.mp_trainer.master_params, rate=rate)
        else:
            self.bad_steps += 1
            if self.bad_steps == self.max_bad_steps:
                trouble = f"loss or gradient not finite in {self.bad_steps} consecutive steps (--max_bad_steps)"
                raise self.checkpoints.diverged(self.steps_done, trouble)
        self.after_step()
        self.log_step()

    def _anneal_lr(self):
        """Set the learning rate for the next step."""
        lr = self.lr
        if self.lr_anneal_steps:
            lr *= 1 - max(0, self.steps_done - self.ANNEAL_DELAY) / self.lr_anneal_steps
        if self.steps_done < self.warmup_steps:
            lr *= (self.steps_done + 1) / self.warmup_steps
        for group in self.opt.param_groups:
            group["lr"] = lr

    def forward_backward(self, batch, cond):
        """Compute the gradient of the mean loss over the global batch."""
        self.mp_trainer.zero_grad()
        self.randomness.start_step(self.steps_done, len(batch), self.schedule_sampler)
        batch, cond = self.prepare(batch, cond)
        for start in range(0, len(batch), self.microbatch):
            part = slice(start, start + self.microbatch)
            micro = batch[part].to(dist_util.dev(), non_blocking=True)
            micro_cond = {k: v[part].to(dist_util.dev(), non_blocking=True) for k, v in cond.items()}
            last = start + self.microbatch >= len(batch)
            with self.ddp_model.no_sync() if self.use_ddp and not last else nullcontext():
                loss = self.compute_loss(micro, micro_cond)
                self.mp_trainer.backward(loss * (len(micro) / len(batch)))
        if not self.use_ddp:
            dist_util.average_gradients(self.mp_trainer.model_params)

    def prepare(self, batch, cond):
        """Transform a batch before it is split into microbatches. Subclasses override this method."""
        return batch, cond

    def compute_loss(self, micro, cond):
        """Return the mean loss of a microbatch, and log the terms of the loss. Subclasses override this method."""
        t, weights, noise = self.randomness.draw(micro)
        losses = self.diffusion.training_losses(self.ddp_model, micro, t, model_kwargs=cond, noise=noise)
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
        log_loss_dict(self.diffusion, t, {k: v * weights for k, v in losses.items()})
        return (losses["loss"] * weights).mean()

    def after_step(self):
        """Called after each step, before it is logged. Subclasses override this method."""

    def log_step(self):
        """Log the step and the number of images that the run has seen."""
        logger.logkv("step", self.steps_done)
        logger.logkv("samples", (self.steps_done + 1) * self.global_batch)

    def _write_log_row(self):
        left = None if self.total_steps is None else self.total_steps - self.steps_done - 1
        logger.logkvs(self.throughput.metrics(self.global_batch, left))
        counts = dist_util.gather_objects(getattr(self.data, "counts", dict)())
        logger.logkvs(sum(map(Counter, counts), Counter()))
        logger.dumpkvs()

    def save(self):
        """Write a checkpoint. Every rank must call it. See CheckpointIO.save."""
        self.checkpoints.save(self.steps_done)

    def write_preview(self):
        """Write a preview of the first moving average, or of the weights until the average is ready."""
        weights, name, what = self.model.state_dict(), "weights", "weights themselves"
        if self.ema_rate and average_is_ready(self.ema_rate[0], self.steps_done):
            weights = self.mp_trainer.master_params_to_state_dict(self.ema_params[0])
            name, what = f"ema_{self.ema_rate[0]}", f"moving average of rate {self.ema_rate[0]}"
        with evaluating(self.model, weights):
            path = self.preview.write(self.model, self.steps_done, name)
        logger.log(f"wrote {path}: samples of the {what}")


@contextmanager
def noting_signals():
    """Record SIGTERM and SIGUSR1 in a list within a `with` block. Clusters send these signals to end a job."""
    signals = []
    # Only the main thread may set signal handlers.
    numbers = (signal.SIGTERM, signal.SIGUSR1) if threading.current_thread() is threading.main_thread() else ()
    before = {n: signal.signal(n, lambda n, _: signals.append(n)) for n in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
