"""Compatibility with the original's public interface: names, signatures, constants, and the flags of its scripts.

tests/data/api.json and tests/data/flags.json record the original's interface. Additions are allowed.
"""

import ast
import importlib
import importlib.util
import inspect

import pytest
from helpers import ROOT, load_json

from guided_diffusion import script_util

API = load_json("api.json")
FLAGS = load_json("flags.json")


def is_constant(what):
    return isinstance(what, str) and not what.startswith(("(", "static"))


FUNCTIONS = [
    (module, name, what)
    for module, names in API.items()
    for name, what in names.items()
    if isinstance(what, str) and not is_constant(what)
]
CONSTANTS = [(module, name, what) for module, names in API.items() for name, what in names.items() if is_constant(what)]
CLASSES = [
    (module, name, what) for module, names in API.items() for name, what in names.items() if isinstance(what, dict)
]
METHODS = [
    (module, name, method, signature)
    for module, name, what in CLASSES
    for method, signature in what.items()
    if method not in ("bases", "members")
]


def resolve(module, *names):
    found = importlib.import_module(f"guided_diffusion.{module}")
    for name in names:
        found = getattr(found, name)
    return found


class Signature:
    """A parsed signature, such as "(self, x, *, t=0)".

    :ivar positional: the names of the parameters that accept positional arguments, without self.
    :ivar keyword_only: the names of the keyword-only parameters.
    :ivar defaults: a dict from parameter names to default values.
    :ivar open: whether the signature has *args or **kwargs.
    """

    def __init__(self, text):
        args = ast.parse(f"def f{text.removeprefix('static ')}: pass").body[0].args
        self.positional = [a.arg for a in args.args if a.arg != "self"]
        self.keyword_only = [a.arg for a in args.kwonlyargs]
        with_default = args.args[len(args.args) - len(args.defaults) :]
        pairs = [*zip(with_default, args.defaults), *zip(args.kwonlyargs, args.kw_defaults)]
        self.defaults = {a.arg: ast.literal_eval(value) for a, value in pairs if value is not None}
        self.open = args.vararg is not None or args.kwarg is not None
        self.names = self.positional + self.keyword_only


def assert_accepts(function, signature, before=()):
    """Check that `function` accepts all calls that the recorded `signature` accepts.

    :param before: positional arguments to pass first, such as self.
    """
    own = inspect.signature(function)
    # A signature with *args or **kwargs is recorded incompletely, so `function` may require more arguments.
    bind = own.bind_partial if signature.open else own.bind
    values = {name: object() for name in signature.names}

    def reached(bound):
        """Map each parameter name to the value that it receives, with the contents of **kwargs merged in."""
        arguments = dict(bound.arguments)
        for parameter in own.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        return arguments

    arrived = reached(bind(*before, **values))
    assert all(arrived[name] is value for name, value in values.items())
    for count in range(1, min(3, len(signature.positional)) + 1):
        first = signature.positional[:count]
        rest = {name: value for name, value in values.items() if name not in first}
        arrived = reached(bind(*before, *[values[name] for name in first], **rest))
        assert all(arrived[name] is value for name, value in values.items())
    # Parameters that were optional in the original are still optional and have the same defaults.
    bind(*before, **{name: value for name, value in values.items() if name not in signature.defaults})
    for name, default in signature.defaults.items():
        if name in own.parameters:
            assert own.parameters[name].default == default, name


@pytest.mark.parametrize("module, name, recorded", FUNCTIONS, ids=lambda x: x if str(x).isidentifier() else "")
def test_function_accepts_the_original_arguments(module, name, recorded):
    assert_accepts(resolve(module, name), Signature(recorded))


@pytest.mark.parametrize("module, name, recorded", CONSTANTS, ids=lambda x: x if str(x).isidentifier() else "")
def test_constants_have_the_original_values(module, name, recorded):
    want = ast.literal_eval(recorded)
    assert resolve(module, name) == want
    assert type(resolve(module, name)) is type(want)


@pytest.mark.parametrize("module, name, recorded", CLASSES, ids=lambda x: x if str(x).isidentifier() else "")
def test_class_has_the_original_bases(module, name, recorded):
    found = resolve(module, name)
    assert set(recorded["bases"]) <= {base.__name__ for base in found.__mro__}
    if "members" in recorded:
        assert [member.name for member in found] == recorded["members"]


@pytest.mark.parametrize("module, name, method, recorded", METHODS, ids=lambda x: x if str(x).isidentifier() else "")
def test_method_accepts_the_original_arguments(module, name, method, recorded):
    static = recorded.startswith("static")
    assert isinstance(inspect.getattr_static(resolve(module, name), method), staticmethod) == static
    assert_accepts(resolve(module, name, method), Signature(recorded), () if static else (object(),))


@pytest.mark.parametrize("method", sorted(API["respace"]["SpacedDiffusion"].keys() - {"bases", "__init__"}))
def test_spaced_diffusion_accepts_the_arguments_of_gaussian_diffusion(method):
    # SpacedDiffusion's recorded methods end in *args and **kwargs, which they pass to GaussianDiffusion.
    recorded = Signature(API["gaussian_diffusion"]["GaussianDiffusion"][method])
    assert_accepts(resolve("respace", "SpacedDiffusion", method), recorded, (object(),))


@pytest.mark.parametrize(
    "module, name, arguments",
    [
        ("dist_util", "load_state_dict", dict(args=("path",), kwargs=dict(map_location="cpu"))),
        ("nn", "conv_nd", dict(args=(2, 3, 4, 1), kwargs=dict(padding=1))),
        ("nn", "avg_pool_nd", dict(args=(2,), kwargs=dict(kernel_size=2, stride=2))),
        ("nn", "linear", dict(args=(3, 4), kwargs=dict(bias=False))),
        ("logger", "log", dict(args=("a", "b"), kwargs=dict(level=20))),
        ("logger", "warn", dict(args=("a", "b"), kwargs={})),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_functions_with_args_and_kwargs_still_accept_any_arguments(module, name, arguments):
    inspect.signature(resolve(module, name)).bind(*arguments["args"], **arguments["kwargs"])


# Flags

EVERY_SCRIPT = sorted({path.name for path in (ROOT / "scripts").glob("*.py")} - {"download_models.py"})
SCRIPT_FLAGS = [(script, flag, default) for script in FLAGS for flag, default in FLAGS[script].items()]


@pytest.fixture(scope="module")
def parsers():
    """The argument parsers of the scripts, by file name."""
    found = {}
    for script in EVERY_SCRIPT:
        spec = importlib.util.spec_from_file_location(f"script_{script[:-3]}", ROOT / "scripts" / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[script] = module.create_argparser()
    return found


def another_value(value):
    """A value of the type of `value` that differs from `value`."""
    if isinstance(value, bool):
        return not value
    return {int: 7, float: 0.625, str: "8,4"}[type(value)]


@pytest.mark.parametrize("script, flag, default", SCRIPT_FLAGS)
def test_script_has_the_original_flag(parsers, script, flag, default):
    parsed = vars(parsers[script].parse_args([]))
    assert flag in parsed
    assert parsed[flag] == default
    assert type(parsed[flag]) is type(default)
    given = another_value(default)
    parsed = vars(parsers[script].parse_args([f"--{flag}", str(given)]))
    assert parsed[flag] == given
    assert type(parsed[flag]) is type(default)


@pytest.mark.parametrize("script", EVERY_SCRIPT)
def test_help_explains_every_flag_in_its_group(parsers, script):
    text = parsers[script].format_help()
    for action in parsers[script]._actions:
        assert action.dest == "help" or "(default: " in (action.help or ""), action.dest
    groups = [group.title for group in parsers[script]._action_groups if group._group_actions]
    assert {"model", "process", "output"} <= set(groups) or {"classifier", "process", "output"} <= set(groups)
    assert "None" not in text


@pytest.mark.parametrize("script", FLAGS)
@pytest.mark.parametrize("text, value", [("True", True), ("false", False), ("yes", True), ("n", False), ("1", True)])
def test_boolean_flags_accept_words_for_true_and_false(parsers, script, text, value):
    flag = next(name for name, default in FLAGS[script].items() if isinstance(default, bool))
    assert getattr(parsers[script].parse_args([f"--{flag}", text]), flag) is value


DEFAULTS = {
    "super_res_train.py": ("sr_create_model_and_diffusion", "sr_model_and_diffusion_defaults"),
    "super_res_sample.py": ("sr_create_model_and_diffusion", "sr_model_and_diffusion_defaults"),
    "classifier_train.py": ("create_classifier_and_diffusion", "classifier_and_diffusion_defaults"),
}


@pytest.mark.parametrize("script", FLAGS)
def test_defaults_hold_the_model_flags(script):
    factory, defaults = DEFAULTS.get(script, ("create_model_and_diffusion", "model_and_diffusion_defaults"))
    # The parameters of the factory are exactly the flags of the model and the diffusion process.
    names = Signature(API["script_util"][factory]).names
    found = getattr(script_util, defaults)()
    assert {name: found.get(name) for name in names} == {name: FLAGS[script][name] for name in names}
    found.clear()  # defaults are returned as a new dict, so clearing one does not change the next
    assert names[0] in getattr(script_util, defaults)()


def test_classifier_and_diffusion_defaults_can_be_read_separately():
    recorded = FLAGS["classifier_train.py"]
    classifier, diffusion = script_util.classifier_defaults(), script_util.diffusion_defaults()
    wanted = Signature(API["script_util"]["create_classifier"]).names
    assert {name: classifier[name] for name in wanted} == {name: recorded[name] for name in wanted}
    assert diffusion == {name: recorded[name] for name in diffusion}
    assert len(diffusion) == 8


def test_upsampler_defaults_lack_the_flags_that_the_original_lacks():
    # Existing programs pass image_size and others next to **defaults, so a default with such a name is a TypeError.
    lacking = {"image_size", "channel_mult", "use_new_attention_order"}
    assert not lacking & script_util.sr_model_and_diffusion_defaults().keys()
