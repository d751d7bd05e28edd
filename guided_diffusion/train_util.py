"""The training loop: steps, averages of the weights, logs, checkpoints and resuming."""

import copy
import math
import os
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext

import torch as th
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from . import checkpoint_util, dist_util, logger
from .checkpoint_util import (  # others import these from here
    find_ema_checkpoint,
    find_resume_checkpoint,
    get_blob_logdir,
    parse_resume_step_from_filename,
)
from .compile_util import compiling
from .errors import InputError, RunStopped, check_at_least
from .fp16_util import INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer
from .logger import progress_bar
from .monitor import Pace, log_loss_dict
from .nn import update_ema
from .random_util import generator_states, restore_generators, training_randomness
from .resample import LossAwareSampler, UniformSampler

__all__ = [
    "TrainLoop",
    "find_ema_checkpoint",
    "find_resume_checkpoint",
    "get_blob_logdir",
    "log_loss_dict",
    "parse_resume_step_from_filename",
]


class TrainLoop:
    """Trains a diffusion model; with other hooks (`prepare`, `compute_loss`, `after_step`), another network.

    A step's gradient is that of the mean loss over the whole batch, over all ranks, however it is split into
    microbatches. `step` counts the steps that this process has ended, `resume_step` those before it; both count steps
    that were skipped for trouble.

    :param model: the network, on this rank's device, with the same architecture on every rank.
    :param data: an iterator of pairs (images [batch_size, C, ...], dict of model keyword arguments [batch_size, ...]).
    :param batch_size: images a step on each rank.
    :param microbatch: how many of them pass through the network at once; -1 for all.
    :param ema_rate: the rates of the weights' moving averages: a number, or a string of numbers with commas.
    :param log_interval, save_interval: in steps.
    :param resume_checkpoint: the modelNNNNNN.pt to go on from; "auto" for the newest of the run's folder; or "".
    :param schedule_sampler: which timesteps to train on; uniform by default.
    :param lr_anneal_steps: steps over which the learning rate falls linearly to zero, after which training ends; 0
        keeps it constant.
    :param warmup_steps: steps over which the learning rate first rises linearly.
    :param max_grad_norm: see MixedPrecisionTrainer.
    :param max_bad_steps: after so many steps in a row whose loss or gradient is not finite, training ends with an
        error; 0 never does. Each such step is skipped.
    :param total_steps: steps after which training ends; 0 leaves that to lr_anneal_steps.
    :param keep_checkpoints: how many of the newest to keep; 0 keeps all.
    :param preview: a monitor.Preview, to be written every `sample_interval` steps from the first moving average.
    :param seed: makes timesteps and noise functions of (seed, step, position in the global batch); a negative one
        leaves them to the global generators.
    :param compile: compile the network by torch.compile in the first step.
    :param use_fp16, use_bf16, fp16_scale_growth, initial_lg_loss_scale: see MixedPrecisionTrainer.
    """

    ANNEAL_DELAY = 1  # the original set the rate after a step by the steps before it: the second has the whole too

    def __init__(
        self,
        *,
        model,
        diffusion,
        data,
        batch_size,
        microbatch,
        lr,
        ema_rate,
        log_interval,
        save_interval,
        resume_checkpoint,
        use_fp16=False,
        fp16_scale_growth=1e-3,
        schedule_sampler=None,
        weight_decay=0.0,
        lr_anneal_steps=0,
        total_steps=0,
        initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE,
        use_bf16=False,
        seed=-1,
        warmup_steps=0,
        max_grad_norm=0.0,
        max_bad_steps=20,
        keep_checkpoints=0,
        preview=None,
        sample_interval=0,
        compile=False,
    ):
        check_at_least(1, batch_size=batch_size, log_interval=log_interval, save_interval=save_interval)
        check_at_least(0, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm, warmup_steps=warmup_steps)
        check_at_least(0, max_bad_steps=max_bad_steps, keep_checkpoints=keep_checkpoints)
        check_at_least(0, sample_interval=sample_interval, lr_anneal_steps=lr_anneal_steps, total_steps=total_steps)
        if logger.get_dir() is None:
            logger.configure()
        self.model = model
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr = lr
        self.ema_rate = _parse_rates(ema_rate)
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.resume_checkpoint = find_resume_checkpoint() or checkpoint_util.resolve_resume_checkpoint(
            resume_checkpoint
        )
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.weight_decay = weight_decay
        self.lr_anneal_steps = lr_anneal_steps
        self.warmup_steps = warmup_steps
        self.max_bad_steps = max_bad_steps
        self.keep_checkpoints = keep_checkpoints
        self.preview = preview
        self.sample_interval = sample_interval if preview is not None else 0
        self.total_steps = min((n for n in (total_steps, lr_anneal_steps) if n > 0), default=None)

        self.step = 0
        self.resume_step = parse_resume_step_from_filename(self.resume_checkpoint)
        self.global_batch = batch_size * dist_util.get_world_size()

        self.randomness = training_randomness(seed)
        self.pace = Pace()
        self.bad_steps = 0  # in a row
        self.loss_terms = []  # of this step's microbatches
        self.last_checkpoint = self.resume_checkpoint
        self._stop_signal = None

        self._load_weights()
        self.mp_trainer = MixedPrecisionTrainer(
            model=model,
            use_fp16=use_fp16,
            fp16_scale_growth=fp16_scale_growth,
            initial_lg_loss_scale=initial_lg_loss_scale,
            use_bf16=use_bf16,
            max_grad_norm=max_grad_norm,
        )
        self.opt = AdamW(self.mp_trainer.master_params, lr=lr, weight_decay=weight_decay, fused=True)
        self._load_optimizer()
        self.ema_params = [self._load_ema(rate) for rate in self.ema_rate]

        self.use_ddp = th.cuda.is_available() and dist_util.get_world_size() > 1
        self.ddp_model = model
        if self.use_ddp:
            self.ddp_model = DistributedDataParallel(
                model, device_ids=[dist_util.dev()], broadcast_buffers=False, bucket_cap_mb=128
            )
        self.compiles_next = compile
        if compile:
            if self.use_ddp and getattr(model, "use_checkpoint", False):
                th._dynamo.config.optimize_ddp = False  # torch 2.6 cannot part such a graph by DDP's buckets
            self.ddp_model = th.compile(self.ddp_model, dynamic=False)
        self._load_state()

    # Resuming. Every rank reads the files; the weights are then made equal to rank 0's all the same.

    def _load_weights(self):
        if self.resume_checkpoint:
            checkpoint_util.require_path("resume_checkpoint", self.resume_checkpoint)
            logger.log(f"resuming from {self.resume_checkpoint}, after step {self.resume_step}")
            weights = checkpoint_util.read_weights_to_train(self.model, self.resume_checkpoint)
            self.model.load_state_dict(weights, strict=True)
        dist_util.sync_params(self.model.parameters())

    def _load_optimizer(self):
        if not self.resume_checkpoint:
            return
        path = checkpoint_util.beside(self.resume_checkpoint, checkpoint_util.opt_name(self.resume_step))
        if path is None:
            logger.warn(f"no optimiser state beside {self.resume_checkpoint}: it starts afresh")
            return
        saved = dist_util.load_state_dict(path, map_location=dist_util.dev())
        try:
            # Rates and decays are this run's flags, not the file's.
            moments = self.mp_trainer.adapt_moments(saved["state"])
            self.opt.load_state_dict({**self.opt.state_dict(), "state": moments})
            for p, state in self.opt.state.items():
                if state["exp_avg"].shape != p.shape:
                    raise ValueError(f"of shape {tuple(state['exp_avg'].shape)} where a parameter has {tuple(p.shape)}")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
            raise InputError(f"{path}: the optimiser's state of another run ({e})") from None

    def _load_ema(self, rate):
        path = find_ema_checkpoint(self.resume_checkpoint or None, self.resume_step, rate)
        if path is None:
            if self.resume_checkpoint:
                logger.warn(f"no moving average {rate} beside {self.resume_checkpoint}: it starts from the weights")
            return copy.deepcopy(self.mp_trainer.master_params)
        state_dict = checkpoint_util.read_weights_to_train(self.model, path, dist_util.dev())
        params = self.mp_trainer.state_dict_to_master_params(state_dict)
        dist_util.sync_params(params)
        return params

    def _load_state(self):
        """Take up what else a restart needs. An original run's checkpoints lack it, and go on without."""
        if not self.resume_checkpoint:
            return
        path = checkpoint_util.beside(self.resume_checkpoint, checkpoint_util.state_name(self.resume_step))
        if path is None:
            return
        state = dist_util.load_state_dict(path, map_location="cpu")
        try:
            self._take_up(state)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(
                f"{path}: not the state of a training run, or damaged: remove it to go on without"
            ) from None

    def _take_up(self, state):
        self.mp_trainer.lg_loss_scale = state["lg_loss_scale"]
        for name, owner in self._owners_of_state().items():
            if state.get(name) and hasattr(owner, "load_state_dict"):
                owner.load_state_dict(state[name])
        if len(state["generators"]) == dist_util.get_world_size():
            restore_generators(state["generators"][dist_util.get_rank()])
        else:
            logger.warn(f"the run to resume had {len(state['generators'])} ranks: random generators start afresh")
        if dist_util.get_rank() == 0:
            values, counts = state["metrics"]
            logger.get_current().name2val.update(values)
            logger.get_current().name2cnt.update(counts)

    def _owners_of_state(self):
        """What has a state of its own, by its name in the state file. Others' data and samplers may have none."""
        return {"schedule_sampler": self.schedule_sampler, "data": self.data}

    def _state(self):
        """What a restart needs beside weights, averages and optimiser. Every rank must call it."""
        current = logger.get_current()
        values = {k: float(v) for k, v in current.name2val.items() if hasattr(v, "__float__")}
        return {
            "lg_loss_scale": self.mp_trainer.lg_loss_scale,
            **{name: getattr(owner, "state_dict", dict)() for name, owner in self._owners_of_state().items()},
            "generators": dist_util.gather_objects(generator_states()),
            "metrics": [values, {k: n for k, n in current.name2cnt.items() if k in values}],
        }

    # Running

    def run_loop(self):
        """Train until the end, with a progress bar on rank 0, logging and saving on the way and at the end."""
        if self.total_steps is None:
            logger.log("this run has no end: stop it by hand, or give --total_steps or --lr_anneal_steps")
        # A run that was killed has logged steps after its last checkpoint, which this run logs again.
        if not self.resume_checkpoint or checkpoint_util.is_of_this_run(self.resume_checkpoint):
            dist_util.from_rank_0(lambda: logger.truncate_records(logger.get_dir(), self.steps_done))
        saved = None
        self.pace = Pace()
        with (
            self._heeding_signals(),
            progress_bar(total=self.total_steps, initial=self.steps_done, desc="training", unit="step") as bar,
        ):
            while self.total_steps is None or self.steps_done < self.total_steps:
                with self.pace.waiting():
                    batch, cond = next(self.data)
                self.run_step(batch, cond)
                self.pace.steps += 1
                if self.steps_done % self.log_interval == 0:
                    self._dump_log()
                self.step += 1
                bar.update()
                if self.steps_done % self.save_interval == 0 and self._is_sound():
                    self.save()
                    saved = self.steps_done
                    if os.environ.get("DIFFUSION_TRAINING_TEST"):  # integration tests end after the first save
                        return
                if dist_util.any_rank(self._stop_signal is not None):
                    logger.log(f"stopping after step {self.steps_done}, as a signal asked")
                    break
                if self.sample_interval and self.steps_done % self.sample_interval == 0:
                    self.write_preview()
            if saved != self.steps_done and self.step > 0:
                self.save()

    def _is_sound(self):
        """Whether the last step was good: a checkpoint in the midst of trouble is none to rely on."""
        if self.bad_steps:
            logger.log(f"not saving step {self.steps_done}: the last {self.bad_steps} steps were skipped")
        return not self.bad_steps

    def _dump_log(self):
        left = None if self.total_steps is None else self.total_steps - self.steps_done - 1
        logger.logkvs(self.pace.metrics(self.global_batch, left))
        counts = Counter()
        for of_rank in dist_util.gather_objects(getattr(self.data, "counts", dict)()):
            counts.update(of_rank)
        logger.logkvs(counts)
        logger.dumpkvs()

    @contextmanager
    def _heeding_signals(self):
        """SIGTERM and SIGUSR1, which clusters send before they take a node back, end the run after the current step."""

        def note(number, frame):
            self._stop_signal = number

        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def steps_done(self):
        """Optimiser steps behind the weights, this process's and earlier ones'."""
        return self.step + self.resume_step

    def run_step(self, batch, cond):
        """Take one step with a batch."""
        self._anneal_lr()
        if self.compiles_next:
            compiling(lambda: self.forward_backward(batch, cond))
            self.compiles_next = False
        else:
            self.forward_backward(batch, cond)
        took_step = self.mp_trainer.optimize(self.opt)
        if took_step:
            self._update_ema()
        self._count_bad_steps(took_step)
        self.after_step()
        self.log_step()

    def forward_backward(self, batch, cond):
        """Compute the gradient of the mean loss over the global batch."""
        self.mp_trainer.zero_grad()
        self.loss_terms = []
        self.randomness.start_step(self.steps_done, len(batch))
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

    # Hooks

    def prepare(self, batch, cond):
        """Change a batch before it is split into microbatches."""
        return batch, cond

    def compute_loss(self, micro, cond):
        """The mean loss of a microbatch; logs its terms."""
        t, weights = self.randomness.timesteps(self.schedule_sampler, len(micro), dist_util.dev())
        noise = self.randomness.randn_like(micro)
        losses = self.diffusion.training_losses(self.ddp_model, micro, t, model_kwargs=cond, noise=noise)
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
        self.log_losses(t, {k: v * weights for k, v in losses.items()})
        return (losses["loss"] * weights).mean()

    def after_step(self):
        """Whatever is to happen after a step, before its log."""

    # After the gradient

    def _update_ema(self):
        for rate, params in zip(self.ema_rate, self.ema_params):
            update_ema(params, self.mp_trainer.master_params, rate=rate)

    def _anneal_lr(self):
        """Set the learning rate of the step to come."""
        lr = self.lr
        if self.lr_anneal_steps:
            lr *= 1 - max(0, self.steps_done - self.ANNEAL_DELAY) / self.lr_anneal_steps
        if self.steps_done < self.warmup_steps:
            lr *= (self.steps_done + 1) / self.warmup_steps
        for group in self.opt.param_groups:
            group["lr"] = lr

    def _count_bad_steps(self, took_step):
        self.bad_steps = 0 if took_step else self.bad_steps + 1
        if self.bad_steps < (self.max_bad_steps or math.inf):
            return
        # All ranks come here together: they have the same gradient.
        own = [(name, float(v.mean())) for terms in self.loss_terms for name, v in terms.items()]
        terms = [
            f"{name} {value:.4g}" + (f" on rank {rank}" if rank else "")
            for rank, pairs in enumerate(dist_util.gather_objects(own))
            for name, value in pairs
            if rank == 0 or not math.isfinite(value)
        ]
        culprits = self.mp_trainer.not_finite()
        raise self._diverged(
            f"the loss or gradient was not finite in {self.bad_steps} steps in a row "
            f"(--max_bad_steps), and all of them were skipped. Loss terms: {', '.join(terms) or 'none logged'}. "
            f"Gradients that are not finite: {len(culprits)} of {len(self.mp_trainer.model_params)}, the first "
            f"{culprits[0] if culprits else 'none'}"
        )

    def _diverged(self, trouble):
        """The error that says what has gone wrong by this step, where the run can go back to, and what may help."""
        return RunStopped(
            f"step {self.steps_done}: {trouble}. Last good checkpoint: {self.last_checkpoint or 'none yet'}. "
            f"A lower --lr, --max_grad_norm 1, or --use_bf16 in place of --use_fp16 may help"
        )

    def log_losses(self, t, terms):
        """Log a microbatch's losses, tensors [N], and remember them for a message about trouble."""
        terms = {k: v.detach() for k, v in terms.items()}
        self.loss_terms.append(terms)
        log_loss_dict(self.diffusion, t, terms)

    def log_step(self):
        """Log how far the run is."""
        logger.logkv("step", self.steps_done)
        logger.logkv("samples", (self.steps_done + 1) * self.global_batch)

    def save(self):
        """Write the checkpoint files from rank 0, each whole or not at all, the model's last. Every rank must call.

        :raises InputError: on every rank, when weights or averages are not finite; then nothing is written.
        """
        start, state = time.time(), self._state()
        path = dist_util.from_rank_0(lambda: self._write_checkpoint(state))
        self.last_checkpoint = self.last_checkpoint if self.bad_steps else path
        logger.log(f"saved step {self.steps_done} to {get_blob_logdir()} in {time.time() - start:.1f} s")

    def _write_checkpoint(self, state):
        in_form = self.mp_trainer.master_params_to_state_dict
        model = (checkpoint_util.model_name(self.steps_done), in_form(self.mp_trainer.master_params))
        averages = [
            (checkpoint_util.ema_name(rate, self.steps_done), in_form(params))
            for rate, params in zip(self.ema_rate, self.ema_params)
        ]
        for name, weights in (model, *averages):
            if bad := checkpoint_util.not_finite(weights):  # no later step mends them
                raise self._diverged(
                    f"weights are not finite, and {name} is not written: {len(bad)} of {len(weights)} tensors, the "
                    f"first {bad[0]}"
                )
        files = [
            (checkpoint_util.opt_name(self.steps_done), self.opt.state_dict()),
            *averages,
            (checkpoint_util.state_name(self.steps_done), state),
            model,
        ]
        path = checkpoint_util.save_set(files, last_good=self.last_checkpoint)
        if not self.bad_steps:
            checkpoint_util.prune(self.steps_done, self.keep_checkpoints)
        return path

    # Watching

    @contextmanager
    def averaged_weights(self):
        """The model with the first moving average (without any, its own weights) in evaluation mode, for a block."""
        params = dict(self.model.named_parameters())
        own = {name: p.detach().clone() for name, p in params.items()}
        if self.ema_params:
            average = self.mp_trainer.master_params_to_state_dict(self.ema_params[0])
            self._assign(params, average)
        self.model.eval()
        try:
            yield self.model
        finally:
            self._assign(params, own)
            self.model.train()

    @staticmethod
    @th.no_grad()
    def _assign(params, values):
        for name, p in params.items():
            p.copy_(values[name])

    def write_preview(self):
        """Write a picture of what the model makes of always the same noise. Every rank must call it."""
        with self.averaged_weights() as model:
            self.preview.write(model, self.steps_done)


def _parse_rates(ema_rate):
    try:
        rates = [float(x) for x in ema_rate.split(",") if x.strip()] if isinstance(ema_rate, str) else [float(ema_rate)]
        if not all(0 <= rate <= 1 for rate in rates):
            raise ValueError
        return rates
    except ValueError:
        raise InputError(
            f"--ema_rate {ema_rate}: give a number from 0 to 1 such as 0.9999, or several with commas"
        ) from None
