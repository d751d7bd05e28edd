"""The sampling loop of GaussianDiffusion, and methods made from it. All loops share the signature of `sample`.

The options skip_timesteps, init_image, randomize_class, cond_fn_with_grad, transformation_fn and transformation_percent
exist for CLIP-guided notebooks. Most of these notebooks import a fork of the original code that has these options.
"""

import functools
import inspect

import torch as th

from .errors import InputError


def sample(
    self, step, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
    device=None, progress=False, skip_timesteps=0, init_image=None, randomize_class=False, cond_fn_with_grad=False,
    transformation_fn=None, transformation_percent=(), **step_options,
):  # fmt: skip
    """Sample from noise to data. Yield the dict of "sample" and "pred_xstart" that each step returns.

    :param shape: the shape (N, C, ...) of the samples.
    :param noise: x_T, of the given shape. By default it is drawn from torch's generator.
    :param clip_denoised, denoised_fn, model_kwargs: see p_mean_variance.
    :param cond_fn: returns the gradient of log p(y | x_t), for guidance.
    :param device: the device to sample on. The default is the device of the noise, or else of the model's parameters.
    :param progress: show a progress bar.
    :param skip_timesteps: the number of first steps to leave out. Sampling then starts from init_image, or from zeros,
        noised to the first timestep that remains.
    :param init_image: images to start from, of the given shape.
    :param randomize_class: before each step, replace model_kwargs["y"] by uniformly drawn labels below
        model.num_classes, from torch's generator.
    :param cond_fn_with_grad: call cond_fn(x, t, out, **model_kwargs), where `out` is the dict of p_mean_variance. Its
        tensors record gradients with respect to x. t is the timestep of this process, not of the original process.
    :param transformation_fn: a function of x_t that is applied before the steps selected by transformation_percent.
    :param transformation_percent: fractions p of the loop. Each selects the timestep int(number of steps * (1 - p)).
    :param step_options: further keyword arguments of the step, such as randn_like.
    :raises InputError: if skip_timesteps leaves no step.
    """
    if not 0 <= skip_timesteps < self.num_timesteps:
        raise InputError(f"skip_timesteps {skip_timesteps}: must be from 0 to {self.num_timesteps - 1}")
    if device is None:
        device = noise.device if noise is not None else next(model.parameters()).device
    x = th.randn(*shape, device=device) if noise is None else noise
    num_steps = self.num_timesteps - skip_timesteps
    if skip_timesteps and init_image is None:
        init_image = th.zeros_like(x)
    if init_image is not None:
        x = self.q_sample(init_image, th.full((shape[0],), num_steps - 1, device=device), noise=x)
    transformed = {int(num_steps * (1 - p)) for p in transformation_percent}
    step_options.update(clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn)
    if cond_fn_with_grad:
        step_options["cond_fn_with_grad"] = True
    is_multistep = "old_out" in inspect.signature(step).parameters
    out = None
    for i in progress_bar(range(num_steps)[::-1], "sampling", progress):
        t = th.full((shape[0],), i, device=device)
        if randomize_class and model_kwargs and "y" in model_kwargs:
            y = model_kwargs["y"]
            model_kwargs["y"] = th.randint(model.num_classes, y.shape, device=y.device)
        if transformation_fn is not None and i in transformed:
            x = transformation_fn(x)
        if is_multistep:
            step_options["old_out"] = out
        with th.no_grad():
            out = step(model, x, t, model_kwargs=model_kwargs, **step_options)
        yield out
        x = out["sample"]


def progress_bar(timesteps, what, visible=True):
    """Iterate over timesteps, with a progress bar if `visible` is set."""
    if not visible:
        return timesteps
    from tqdm.auto import tqdm

    return tqdm(timesteps, desc=what)


def progressive_loop(step, after="progress", **options):
    """Make the method STEP_loop_progressive, which calls `sample` with the method named `step`.

    :param after: the parameter of `sample` after which the options of the step are inserted into the signature.
    :param options: the options of the step, with their defaults.
    """
    name = f"{step}_loop_progressive"
    self, _, *parameters = inspect.signature(sample).parameters.values()
    place = [p.name for p in parameters].index(after) + 1
    parameters[place:place] = [
        inspect.Parameter(o, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=options[o]) for o in options
    ]
    signature = inspect.Signature([self, *parameters])

    def loop(self, *args, **kwargs):
        step_method = getattr(self, step)
        try:
            arguments = signature.bind(self, *args, **kwargs).arguments
            step_options = arguments.pop("step_options", {})
            inspect.signature(step_method).bind_partial(**step_options)
        except TypeError as e:
            raise TypeError(f"{name}: {e}") from None
        if step != "p_sample" and arguments.get("cond_fn") is not None and not step_options.get("threshold_fn"):
            self._warn_of_guidance_in_pure_noise()
        return sample(step=step_method, **arguments, **step_options)

    loop.__name__, loop.__qualname__ = name, f"GaussianDiffusion.{name}"
    loop.__doc__, loop.__signature__ = sample.__doc__, signature
    return loop


def last_of(progressive):
    """Make the method that returns the last sample [N, C, ...] of a progressive loop, and takes the same arguments."""

    @functools.wraps(progressive)
    def loop(self, *args, **kwargs):
        for out in getattr(self, progressive.__name__)(*args, **kwargs):
            pass
        return out["sample"]

    loop.__name__ = progressive.__name__.removesuffix("_progressive")
    loop.__qualname__ = f"GaussianDiffusion.{loop.__name__}"
    loop.__doc__ = f"Return the last sample [N, C, ...] of {progressive.__name__}, which documents the arguments."
    return loop
