"""Compatibility with projects that import the original package: signatures, private names, overridden methods."""

import importlib.util
import inspect
import shutil
import sys
import types
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch as th
from helpers import load_json, randn, relative_error

import guided_diffusion
from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion import respace, script_util
from guided_diffusion.script_util import create_gaussian_diffusion

API = load_json("api.json")["script_util"]
FACTORIES = [name for name in API if name.startswith(("create_", "sr_create_")) and name != "create_gaussian_diffusion"]
TINY = dict(image_size=16, num_channels=32, channel_mult="1", num_res_blocks=1, attention_resolutions="8", num_heads=1)
TINY_CLASSIFIER = dict(image_size=32, classifier_width=64, classifier_depth=1)


def model(x, t, y=None):
    """A function with the output shape of a network that learns the variance."""
    out = th.tanh(x) * (1 + t.float().view(-1, 1, 1, 1) / 1000)
    return th.cat([out, th.cos(3 * x)], dim=1)


def cond_fn(x, t, y=None):
    return 0.1 * x * t.float().view(-1, 1, 1, 1) / 1000


def process(kind=None, **options):
    options = dict(learn_sigma=True, timestep_respacing="ddim5", **options)
    plain = create_gaussian_diffusion(**options)
    if kind is None:
        return plain
    names = ("model_mean_type", "model_var_type", "loss_type", "rescale_timesteps")
    betas = gd.get_named_beta_schedule("linear", 1000)
    return kind(use_timesteps=plain.use_timesteps, betas=betas, **{name: getattr(plain, name) for name in names})


X, T = randn(3, 2, 3, 4, 4), th.tensor([0, 3])


# Factories


@pytest.mark.parametrize("name", FACTORIES)
def test_factories_have_the_original_parameters_for_inspect(name):
    names = [part.split("=")[0].strip() for part in API[name].strip("()").split(",")]
    spec = inspect.getfullargspec(getattr(script_util, name))
    assert spec.args == names
    assert set(spec.kwonlyargs) <= script_util.ADDED_FLAGS and spec.varkw is spec.varargs is None


@pytest.mark.parametrize("defaults, options, name", [
    ("model_and_diffusion_defaults", TINY, "create_model_and_diffusion"),
    ("classifier_defaults", TINY_CLASSIFIER, "create_classifier"),
    ("classifier_and_diffusion_defaults", TINY_CLASSIFIER, "create_classifier_and_diffusion"),
    ("sr_model_and_diffusion_defaults", {"num_channels": 32, "large_size": 64}, "sr_create_model_and_diffusion"),
])  # fmt: skip
def test_factories_accept_the_original_flags_by_name_and_position(defaults, options, name):
    create = getattr(script_util, name)
    flags = {**getattr(script_util, defaults)(), **options}
    values = [flags[parameter] for parameter in inspect.getfullargspec(create).args]
    # Scripts written for the original do not pass the added flags.
    flags = {k: v for k, v in flags.items() if k not in script_util.ADDED_FLAGS}
    built = [create(*values), create(**flags)]
    by_position, by_name = (b[0] if isinstance(b, tuple) else b for b in built)
    shapes = [[(k, v.shape) for k, v in network.state_dict().items()] for network in (by_position, by_name)]
    assert shapes[0] == shapes[1]


def test_args_to_dict_accepts_a_namespace_without_the_added_flags():
    keys = script_util.model_and_diffusion_defaults().keys()
    args = Namespace(**{k: 1 for k in keys if k not in script_util.ADDED_FLAGS})
    assert script_util.args_to_dict(args, keys) == vars(args)
    del args.num_heads
    with pytest.raises(AttributeError, match="num_heads"):
        script_util.args_to_dict(args, keys)


def test_assigning_num_classes_takes_effect(monkeypatch):
    monkeypatch.setattr(script_util, "NUM_CLASSES", 10)
    flags = {**script_util.model_and_diffusion_defaults(), **TINY, "class_cond": True}
    assert script_util.create_model_and_diffusion(**flags)[0].label_emb.num_embeddings == 10
    assert script_util.create_model(16, 32, 1, channel_mult="1", class_cond=True).label_emb.num_embeddings == 10
    classifier = script_util.create_classifier(**{**script_util.classifier_defaults(), **TINY_CLASSIFIER})
    assert classifier.out_channels == 10


def test_replacement_network_classes_need_no_bfloat16_option(monkeypatch):
    seen = {}
    for name in ("UNetModel", "SuperResModel", "EncoderUNetModel"):
        monkeypatch.setattr(script_util, name, lambda **kwargs: seen.update(kwargs))
    script_util.create_model(64, 32, 1)
    script_util.create_classifier(**script_util.classifier_defaults())
    assert "use_bf16" not in seen


# Private names that public projects use


def test_scale_timesteps_is_left_to_the_wrapped_model():
    assert th.equal(process()._scale_timesteps(T), T)
    assert th.equal(process(rescale_timesteps=True)._scale_timesteps(T), T)  # the wrapped model scales the timesteps
    plain = gd.GaussianDiffusion(
        betas=[0.01] * 250, model_mean_type=gd.ModelMeanType.EPSILON, model_var_type=gd.ModelVarType.FIXED_LARGE,
        loss_type=gd.LossType.MSE, rescale_timesteps=True,
    )  # fmt: skip
    assert plain._scale_timesteps(T).tolist() == [0.0, 12.0]


def test_wrapped_models_map_and_scale_timesteps():
    for rescale, want in ((False, [0, 600]), (True, [0.0, 600.0])):
        wrapped = process(rescale_timesteps=rescale)._wrap_model(lambda x, t, y: (t, y))
        assert isinstance(wrapped, respace._WrappedModel)
        assert process()._wrap_model(wrapped) is wrapped
        t, y = wrapped(X, T, y=5)
        assert t.tolist() == want and y == 5 and t.is_floating_point() == rescale
    assert respace._WrappedModel(lambda x, t: t, [7, 8, 9], True, 500)(X, T - T + 2).tolist() == [18.0, 18.0]


def test_private_methods_of_the_variational_bound():
    diffusion = process()
    terms = diffusion._vb_terms_bpd(model=model, x_start=X, x_t=X, t=T, clip_denoised=True, model_kwargs=None)
    assert terms["output"].shape == (2,) and terms["pred_xstart"].shape == X.shape
    x_t = diffusion.q_sample(X, T, noise=X)
    assert relative_error(diffusion._predict_xstart_from_eps(x_t=x_t, t=T, eps=X), X) < 1e-5
    assert relative_error(diffusion._predict_eps_from_xstart(x_t, T, pred_xstart=X), X) < 1e-3
    mean, _, _ = diffusion.q_posterior_mean_variance(X, x_t, T)
    assert relative_error(diffusion._predict_xstart_from_xprev(x_t=x_t, t=T, xprev=mean), X) < 1e-3
    assert diffusion._prior_bpd(X).shape == (2,)


def test_extract_into_tensor_broadcasts_float32_values():
    got = gd._extract_into_tensor(process().betas, T, X.shape)
    assert got.shape == X.shape and got.dtype == th.float32
    assert th.equal(got[:, 0, 0, 0], th.tensor(process().betas)[T].float())
    assert gd._extract_into_tensor(np.arange(5.0), th.tensor([2]), (1, 3)).tolist() == [[2.0] * 3]


# Overridden methods

USES = {
    "p_sample": lambda d: d.p_sample(model, X, T, cond_fn=cond_fn),
    "ddim_sample": lambda d: d.ddim_sample(model, X, T, cond_fn=cond_fn, eta=0.5),
    "ddim_reverse_sample": lambda d: d.ddim_reverse_sample(model, X, T),
    "p_sample_loop": lambda d: d.p_sample_loop(model, X.shape, noise=X),
    "ddim_sample_loop": lambda d: d.ddim_sample_loop(model, X.shape, noise=X),
    "training_losses": lambda d: d.training_losses(model, X, T, noise=X),
    "calc_bpd_loop": lambda d: d.calc_bpd_loop(model, X),
}
ALL, SAMPLING = set(USES), {name for name in USES if "sample" in name}
USED_BY = {
    "p_mean_variance": ALL,
    "q_posterior_mean_variance": ALL,
    "_predict_xstart_from_eps": ALL,
    "_scale_timesteps": ALL,
    "condition_mean": {"p_sample"},
    "condition_score": {"ddim_sample"},
    "_vb_terms_bpd": {"training_losses", "calc_bpd_loop"},
    "q_sample": {"training_losses", "calc_bpd_loop"},
    "p_sample": {"p_sample", "p_sample_loop"},
    "ddim_sample": {"ddim_sample", "ddim_sample_loop"},
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("method", USED_BY)
def test_overridden_and_patched_methods_are_used(method, use, monkeypatch):
    expected, calls = use in USED_BY[method], []

    def override(self, *args, **kwargs):
        calls.append(1)
        return getattr(respace.SpacedDiffusion, method)(self, *args, **kwargs)

    USES[use](process(type("Own", (respace.SpacedDiffusion,), {method: override})))
    assert bool(calls) == expected
    calls.clear()
    diffusion = process()
    monkeypatch.setattr(diffusion, method, types.MethodType(override, diffusion))
    USES[use](diffusion)
    assert bool(calls) == expected


def assert_same_results(use, kind):
    """Check that the class `kind` gives the results of SpacedDiffusion."""
    th.manual_seed(0)
    got = USES[use](process(kind))
    th.manual_seed(0)
    want = USES[use](process())
    assert th.equal(got, want) if isinstance(want, th.Tensor) else all(th.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("use", USES)
def test_options_of_p_mean_variance_are_passed_by_keyword(use):
    class Own(respace.SpacedDiffusion):
        def p_mean_variance(self, model, x, t, *, clip_denoised=True, denoised_fn=None, model_kwargs=None):
            return super().p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)

    assert_same_results(use, Own)


@pytest.mark.parametrize("use", USES)
def test_a_subclass_that_wraps_the_model_itself_maps_timesteps_once(use):
    class Own(respace.SpacedDiffusion):
        def p_mean_variance(self, model, *args, **kwargs):
            return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

        def training_losses(self, model, *args, **kwargs):
            return super().training_losses(self._wrap_model(model), *args, **kwargs)

    assert_same_results(use, Own)


OTHER_PROCESS = '''
import numpy as np
import torch as th


class GaussianDiffusion:
    """A project's own diffusion process. As in the original, this class scales timesteps but does not map them."""

    def __init__(self, *, betas, rescale_timesteps=False, **kwargs):
        self.betas, self.rescale_timesteps = np.array(betas), rescale_timesteps
        self.num_timesteps = len(betas)

    def _scale_timesteps(self, t):
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        return {"mean": model(x, self._scale_timesteps(t), **(model_kwargs or {}))}

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        return cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        return cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        return {"loss": model(x_start, self._scale_timesteps(t), **(model_kwargs or {}))}
'''


@pytest.mark.parametrize("rescale", [False, True])
def test_respace_maps_timesteps_for_another_diffusion_class(tmp_path, monkeypatch, rescale):
    package = tmp_path / "vendored"
    package.mkdir()
    (package / "gaussian_diffusion.py").write_text(OTHER_PROCESS)
    for name in ("respace.py", "errors.py"):
        shutil.copy(Path(guided_diffusion.__path__[0]) / name, package)
    (package / "__init__.py").write_text("")
    spec = importlib.util.spec_from_file_location(
        "vendored", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    monkeypatch.setitem(sys.modules, "vendored", importlib.util.module_from_spec(spec))
    vendored = importlib.import_module("vendored.respace")
    diffusion = vendored.SpacedDiffusion([0, 250, 999], betas=np.full(1000, 0.01), rescale_timesteps=rescale)
    t = th.tensor([2, 1])

    def see(x, t):
        return t

    for seen in (
        diffusion.p_mean_variance(see, X, t)["mean"],
        diffusion.condition_mean(see, {}, X, t),
        diffusion.condition_score(see, {}, X, t),
        diffusion.training_losses(see, X, t)["loss"],
    ):
        assert seen.tolist() == [999, 250] and seen.is_floating_point() == rescale
    for name in [m for m in sys.modules if m.startswith("vendored.")]:
        monkeypatch.delitem(sys.modules, name)


# Loops


@pytest.mark.parametrize("name", ["p_sample_loop", "ddim_sample_loop"])
def test_loops_refuse_unknown_options_when_they_are_called(name):
    diffusion = process()
    for loop in (name, f"{name}_progressive"):
        with pytest.raises(TypeError, match=rf"{name}_progressive.*'skip'"):
            getattr(diffusion, loop)(model, X.shape, skip=3)
    with pytest.raises(TypeError, match=f"{name}_progressive.*shape"):
        getattr(diffusion, f"{name}_progressive")(model)
