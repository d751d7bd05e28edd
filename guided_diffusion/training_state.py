"""Checkpoints of a training run: which one to resume from, what they hold, and which are kept.

The checkpoint of step N is a set of files in the run's folder. Rank 0 writes them in this order, all ranks read them:

    optN.pt         the optimizer's state
    ema_RATE_N.pt   the weights' moving averages
    stateN.pt       everything else: loss scale, random generators, positions in the data, metrics not yet written
    modelN.pt       the weights: a set without it is incomplete
"""

import os
import re
import time
from contextlib import suppress

import torch as th

from . import dist_util, files, logger
from .checkpoint_util import (
    Checkpoint,
    ema_name,
    find_beside,
    find_ema_checkpoint,
    get_blob_logdir,
    model_name,
    not_finite,
    opt_name,
    parse_resume_step_from_filename,
    require_path,
    state_name,
)
from .errors import InputError, RunStopped
from .random_util import generator_states, restore_generators


class CheckpointIO:
    """Saves the state of a training run, and restores it.

    :param trainer: the MixedPrecisionTrainer, with the model.
    :param opt: the optimizer of its master parameters.
    :param averages: pairs of a rate and the moving averages of the master parameters.
    :param resume_checkpoint: the modelNNNNNN.pt to restore, or "".
    :param keep: the number of checkpoints to keep; 0 keeps all.
    :param stateful: further objects to save, by name. Those without a load_state_dict are skipped.
    """

    def __init__(self, trainer, opt, averages, resume_checkpoint="", keep=0, **stateful):
        self.trainer = trainer
        self.opt = opt
        self.averages = averages
        self.resume_checkpoint = resume_checkpoint
        self.keep = keep
        self.stateful = {name: v for name, v in stateful.items() if hasattr(v, "load_state_dict")}
        self.last_good = resume_checkpoint  # the path that errors advise to go back to

    def load(self):
        """Restore everything from resume_checkpoint, if there is one. Every rank must call it."""
        if not self.resume_checkpoint:
            return
        require_path("resume_checkpoint", self.resume_checkpoint)
        step = parse_resume_step_from_filename(self.resume_checkpoint)
        logger.log(f"resuming from {self.resume_checkpoint}, after step {step}")
        model = self.trainer.model
        weights = Checkpoint(self.resume_checkpoint).weights(model, finite=True)
        model.load_state_dict(weights)
        dist_util.sync_params(model.parameters())
        self._copy_to(self.trainer.master_params, weights)
        for rate, params in self.averages:
            path = find_ema_checkpoint(self.resume_checkpoint, step, rate)
            if path is None:
                logger.warn(f"no moving average {rate} beside {self.resume_checkpoint}: it starts from the weights")
            self._copy_to(params, weights if path is None else Checkpoint(path).weights(model, finite=True))
        self._load_optimizer(find_beside(self.resume_checkpoint, opt_name(step)))
        self._load_state(find_beside(self.resume_checkpoint, state_name(step)))

    @th.no_grad()
    def _copy_to(self, params, state_dict):
        """Copy the weights in a state_dict of the model to tensors that are laid out like the master parameters."""
        for p, value in zip(params, self.trainer.state_dict_to_master_params(state_dict), strict=True):
            p.copy_(value)
        dist_util.sync_params(params)

    def _load_optimizer(self, path):
        if path is None:
            logger.warn(f"no optimiser state beside {self.resume_checkpoint}: the optimiser starts afresh")
            return
        saved = dist_util.load_state_dict(path, map_location=dist_util.dev())
        try:
            # Learning rate and weight decay come from this run's flags, not from the file.
            moments = self.trainer.adapt_moments(saved["state"])
            self.opt.load_state_dict({**self.opt.state_dict(), "state": moments})
            for p, state in self.opt.state.items():
                if state["exp_avg"].shape != p.shape:
                    raise ValueError(f"of shape {tuple(state['exp_avg'].shape)} where a parameter has {tuple(p.shape)}")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
            raise InputError(f"{path}: the optimiser's state of another run ({e})") from None

    def _load_state(self, path):
        if path is None:  # The original wrote no such file.
            return
        state = dist_util.load_state_dict(path, map_location="cpu")
        try:
            self._restore_state(state)
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError):
            raise InputError(
                f"{path}: not the state of a training run, or damaged: remove it to resume without"
            ) from None

    def _restore_state(self, state):
        self.trainer.lg_loss_scale = state["lg_loss_scale"]
        for name, value in self.stateful.items():
            if state.get(name):
                value.load_state_dict(state[name])
        ranks = len(state["generators"])
        if ranks == dist_util.get_world_size():
            restore_generators(state["generators"][dist_util.get_rank()])
        else:
            logger.warn(f"the run to resume had {ranks} ranks: random generators start afresh")
        if dist_util.get_rank() == 0:
            values, counts = state["metrics"]
            logger.get_current().name2val.update(values)
            logger.get_current().name2cnt.update(counts)

    def _state(self):
        """Return the content of stateN.pt. Every rank must call it."""
        current = logger.get_current()
        values = {k: float(v) for k, v in current.name2val.items() if hasattr(v, "__float__")}
        return {
            "lg_loss_scale": self.trainer.lg_loss_scale,
            **{name: value.state_dict() for name, value in self.stateful.items()},
            "generators": dist_util.gather_objects(generator_states()),
            "metrics": [values, {k: n for k, n in current.name2cnt.items() if k in values}],
        }

    def save(self, step, is_good=True):
        """Write the checkpoint of `step`. Every rank must call it.

        :param is_good: False if the last step was skipped. Older checkpoints are then kept, in case training diverges.
        :raises InputError: on every rank, if weights are not finite or the disk is full. Then no file is left behind.
        """
        start, state = time.time(), self._state()
        path = dist_util.from_rank_0(lambda: self._write(step, state))
        if is_good:
            self.last_good = path
            dist_util.from_rank_0(lambda: prune(step, self.keep))
        logger.log(f"saved step {step} to {get_blob_logdir()} in {time.time() - start:.1f} s")

    def _write(self, step, state):
        to_weights = self.trainer.master_params_to_state_dict
        averages = {ema_name(rate, step): to_weights(params) for rate, params in self.averages}
        model = {model_name(step): to_weights(self.trainer.master_params)}
        for name, weights in {**model, **averages}.items():
            if bad := not_finite(weights):
                raise self.diverged(
                    step,
                    f"weights are not finite, and {name} is not written: {len(bad)} of {len(weights)} tensors, the "
                    f"first {bad[0]}",
                )
        folder, written = get_blob_logdir(), []
        contents = {opt_name(step): self.opt.state_dict(), **averages, state_name(step): state, **model}
        try:
            for name, content in contents.items():
                written.append(files.join(folder, name))
                with (
                    files.disk_errors(written[-1], f"the last good checkpoint is {self.last_good or 'none yet'}"),
                    files.write_atomically(written[-1]) as f,
                ):
                    th.save(content, f)
        except RunStopped:
            for path in written:
                with suppress(OSError):
                    files.remove(path)
            raise
        return written[-1]

    def diverged(self, step, trouble):
        """Return the error for a run that diverged: what happened, where it can go back to, and what may help."""
        return RunStopped(
            f"step {step}: {trouble}. Last good checkpoint: {self.last_good or 'none yet'}. "
            f"A lower --lr, --max_grad_norm 1, or --use_bf16 in place of --use_fp16 may help"
        )


# The run's folder


def find_model_to_resume(value):
    """Return the path of the model file that --resume_checkpoint names. Every rank must call it.

    :param value: a path; "auto" for the newest complete checkpoint in the run's folder; or "", which is returned.
    :return: the path, or "" if "auto" finds no checkpoint.
    :raises InputError: for another file of a checkpoint, such as a moving average.
    """
    if value == "auto":
        return dist_util.from_rank_0(_newest_complete)
    if match := re.search(r"(?:^|[/\\])(?:ema_[^/\\]*_|opt|state)(\d+)\.pt$", value):
        model = files.join(files.dirname(value), model_name(int(match.group(1))))
        raise InputError(
            f"--resume_checkpoint {value}: give the model file, {model}: the run reads the files beside it"
        )
    return value


def _newest_complete():
    folder = get_blob_logdir()
    names = set(files.list_dir(folder))
    for name in names:
        if re.fullmatch(r"(model|opt|state|ema_|config|progress).*\.\d+\.tmp", name):  # a write that was killed
            files.remove(files.join(folder, name))
    steps = {int(m.group(1)) for name in names if (m := re.fullmatch(r"(?:model|opt|state)(\d+)\.pt", name))}
    for step in sorted(steps, reverse=True):
        missing = [name for name in (model_name(step), opt_name(step), state_name(step)) if name not in names]
        if not missing:
            return files.join(folder, model_name(step))
        logger.warn(f"ignoring the half-written checkpoint of step {step}: there is no {missing[0]}")
    return ""


def continues_records(resume_checkpoint):
    """Whether a run continues the records in its folder: it is new, or resumes from a checkpoint in this folder."""
    folder = files.dirname(resume_checkpoint)
    return not resume_checkpoint or os.path.realpath(folder) == os.path.realpath(get_blob_logdir())


def refuse_later_checkpoints(step):
    """Raise InputError if the run's folder has checkpoints of steps after `step`. Rank 0 calls it.

    They belong to another run, and a later --resume_checkpoint auto would mix the two.
    """
    folder = get_blob_logdir()
    found = [int(m.group(1)) for name in files.list_dir(folder) if (m := re.fullmatch(r"model(\d+)\.pt", name))]
    if max(found, default=0) > step:
        raise InputError(
            f"--log_dir {folder} holds {model_name(max(found))}, of a later step than this run starts from: use "
            f"--resume_checkpoint auto, or give another --log_dir, or move the later checkpoints away"
        )


def prune(newest, keep):
    """Remove all checkpoints up to step `newest` in the run's folder but the last `keep`; 0 keeps all. Rank 0 calls it.

    Checkpoints of later steps, perhaps of another run, stay.
    """
    if keep < 1:
        return
    folder = get_blob_logdir()
    by_step = {}
    for name in files.list_dir(folder):
        if match := re.fullmatch(r"(?:model|opt|state|ema_[^_]+_)(\d+)\.pt", name):
            by_step.setdefault(int(match.group(1)), []).append(name)
    steps = sorted(step for step in by_step if step <= newest and model_name(step) in by_step[step])
    for step in by_step:
        if step < min(steps[-keep:], default=0):
            # The model file first: a set without it counts as incomplete.
            for name in sorted(by_step[step], key=lambda name: not name.startswith("model")):
                files.remove(files.join(folder, name))
