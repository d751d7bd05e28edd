"""Save, find, restore and prune the checkpoints of a training run.

The checkpoint of step N is a set of files in the run folder. Rank 0 writes the files in this order:

    optN.pt         the optimizer's state
    stateN.pt       the loss scale, the position in the data, the history of the schedule sampler
    ema_RATE_N.pt   the moving averages of the weights
    modelN.pt       the weights; a checkpoint without this file is incomplete
"""

import os
import re
import time

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


class CheckpointIO:
    """Saves the state of a training run, and restores it.

    :param trainer: the MixedPrecisionTrainer, with the model.
    :param opt: the optimizer of the trainer's master parameters.
    :param averages: a list of (rate, moving averages of the master parameters).
    :param resume_checkpoint: the modelNNNNNN.pt to restore, or "".
    :param keep: the number of checkpoints to keep; 0 keeps all.
    :param stateful: further objects to save, by name. Objects without a load_state_dict are skipped.
    """

    def __init__(self, trainer, opt, averages, resume_checkpoint="", keep=0, **stateful):
        self.trainer = trainer
        self.opt = opt
        self.averages = averages
        self.resume_checkpoint = resume_checkpoint
        self.keep = keep
        self.stateful = {name: v for name, v in stateful.items() if hasattr(v, "load_state_dict")}
        self.last_good = resume_checkpoint  # the path that error messages recommend

    def load(self):
        """Restore the state of the run from resume_checkpoint, if there is one. Every rank must call this method."""
        if not self.resume_checkpoint:
            return
        require_path("resume_checkpoint", self.resume_checkpoint)
        step = parse_resume_step_from_filename(self.resume_checkpoint)
        logger.log(f"resuming from {self.resume_checkpoint}, after step {step}")
        model = self.trainer.model
        weights = Checkpoint(self.resume_checkpoint).weights(model, finite=True)
        model.load_state_dict(weights)
        self._copy_to(self.trainer.master_params, weights)
        for rate, params in self.averages:
            path = find_ema_checkpoint(self.resume_checkpoint, step, rate)
            if path is None:
                logger.warn(f"no moving average {rate} beside {self.resume_checkpoint}: it starts from the weights")
            self._copy_to(params, weights if path is None else Checkpoint(path).weights(model, finite=True))
        if path := find_beside(self.resume_checkpoint, opt_name(step)):
            self._load_optimizer(path)
        else:
            logger.warn(f"no optimiser state beside {self.resume_checkpoint}: the optimiser starts afresh")
        if path := find_beside(self.resume_checkpoint, state_name(step)):  # the original wrote no such file
            state = dist_util.load_state_dict(path, map_location="cpu")
            self.trainer.lg_loss_scale = state["lg_loss_scale"]
            for name, value in self.stateful.items():
                if state.get(name):
                    value.load_state_dict(state[name])

    @th.no_grad()
    def _copy_to(self, params, state_dict):
        """Copy the weights in a state_dict of the model to `params`, which have the layout of the master parameters."""
        for p, value in zip(params, self.trainer.state_dict_to_master_params(state_dict), strict=True):
            p.copy_(value)

    def _load_optimizer(self, path):
        saved = dist_util.load_state_dict(path, map_location=dist_util.dev())
        moments = self.trainer.adapt_moments(saved["state"])
        if moments is None:
            raise InputError(f"{path}: the optimiser's state of another network")
        # The learning rate and weight decay come from the flags of this run, not from the file.
        self.opt.load_state_dict({**self.opt.state_dict(), "state": moments})

    def save(self, step):
        """Write the checkpoint of `step`, and remove old checkpoints. Every rank must call this method.

        :raises InputError: on every rank, if weights are not finite or the disk is full.
        """
        start = time.time()
        self.last_good = dist_util.from_rank_0(lambda: self._write(step))
        logger.log(f"saved step {step} to {get_blob_logdir()} in {time.time() - start:.1f} s")

    def _write(self, step):
        to_weights = self.trainer.master_params_to_state_dict
        weights = {ema_name(rate, step): to_weights(params) for rate, params in self.averages}
        weights[model_name(step)] = to_weights(self.trainer.master_params)
        for name, state_dict in weights.items():
            if bad := not_finite(state_dict):
                trouble = f"weights are not finite: {len(bad)} of {len(state_dict)} tensors, the first {bad[0]}"
                raise self.diverged(step, f"{trouble}; {name} is not written")
        state = {name: value.state_dict() for name, value in self.stateful.items()}
        state["lg_loss_scale"] = self.trainer.lg_loss_scale
        for name, content in {opt_name(step): self.opt.state_dict(), state_name(step): state, **weights}.items():
            path = files.join(get_blob_logdir(), name)
            kept = f"the last good checkpoint is {self.last_good or 'none yet'}"
            with files.disk_errors(path, kept), files.write_atomically(path) as f:
                th.save(content, f)
        prune(step, self.keep)
        return path

    def diverged(self, step, trouble):
        """Return the error of a run that diverged. The message names the last good checkpoint."""
        return RunStopped(
            f"step {step}: {trouble}. Last good checkpoint: {self.last_good or 'none yet'}. "
            f"A lower --lr, --max_grad_norm 1, or --use_bf16 in place of --use_fp16 may help"
        )


# The run's folder


def find_model_to_resume(value):
    """Return the path of the model file that --resume_checkpoint selects. Every rank must call this function.

    :param value: a path, "auto" for the newest complete checkpoint in the run folder, or "", which is returned.
    :return: the path, or "" if "auto" finds no checkpoint.
    :raises InputError: for another file of a checkpoint, such as a moving average.
    """
    if value == "auto":
        return dist_util.from_rank_0(_newest)
    if match := re.search(r"(?:^|[/\\])(?:ema_[^/\\]*_|opt|state)(\d+)\.pt$", value):
        model = files.join(files.dirname(value), model_name(int(match.group(1))))
        raise InputError(
            f"--resume_checkpoint {value}: give the model file, {model}: the run reads the files beside it"
        )
    return value


def _newest():
    folder = get_blob_logdir()
    for name in files.list_dir(folder):
        if re.fullmatch(r"(model|opt|state|ema_|config|progress).*\.\d+\.tmp", name):  # of a killed run
            files.remove(files.join(folder, name))
    steps = _saved_steps()
    return files.join(folder, model_name(steps[-1])) if steps else ""


def _saved_steps():
    """Return the steps of the complete checkpoints in the run folder, in ascending order."""
    names = files.list_dir(get_blob_logdir())
    return sorted(int(m.group(1)) for name in names if (m := re.fullmatch(r"model(\d+)\.pt", name)))


def continues_records(resume_checkpoint):
    """Return whether a run is new or resumes from a checkpoint in its own folder."""
    folder = files.dirname(resume_checkpoint)
    return not resume_checkpoint or os.path.realpath(folder) == os.path.realpath(get_blob_logdir())


def refuse_later_checkpoints(step):
    """Raise InputError if the run folder has checkpoints of later steps than `step`. Only rank 0 calls this function.

    Later checkpoints belong to another run. A later --resume_checkpoint auto would mix the two runs.
    """
    newest = max(_saved_steps(), default=0)
    if newest > step:
        raise InputError(
            f"--log_dir {get_blob_logdir()} holds {model_name(newest)}, of a later step than this run starts from: use "
            f"--resume_checkpoint auto, or give another --log_dir, or move the later checkpoints away"
        )


def prune(newest, keep):
    """Remove the checkpoints up to step `newest` in the run folder, except the last `keep`. 0 keeps all.

    Checkpoints of later steps, which may belong to another run, are kept. Only rank 0 calls this function.
    """
    if keep < 1:
        return
    folder, kept = get_blob_logdir(), [step for step in _saved_steps() if step <= newest][-keep:]
    # Remove the model files first, because a checkpoint without its model file counts as incomplete.
    for name in sorted(files.list_dir(folder), key=lambda name: not name.startswith("model")):
        match = re.fullmatch(r"(?:model|opt|state|ema_[^_]+_)(\d+)\.pt", name)
        if match and int(match.group(1)) < kept[0]:
            files.remove(files.join(folder, name))
