"""load() returns a model that is ready to sample, with the same images as the sampling scripts."""

import numpy as np
import pytest
from helpers import refused
from sampling import CLASSIFIER, MODEL, read_npz, run_here, save_network

from guided_diffusion.models import load
from guided_diffusion.presets import MODELS, PRESETS, Preset

pytestmark = pytest.mark.usefixtures("quiet", "cpu")

NAMES = ["cat", "dog", "tench, Tinca tinca", "newt"]
FAST = dict(timestep_respacing=3)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The paths of a diffusion model and a classifier, each with a config.json as training writes it."""
    folder = tmp_path_factory.mktemp("own")
    return dict(
        model_path=save_network(str(folder / "x/ema_0.9999_010000.pt"), MODEL, config={"classes": NAMES}),
        classifier_path=save_network(str(folder / "y/model010000.pt"), CLASSIFIER, seed=1, config={"classes": NAMES}),
    )


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A folder with checkpoints of two presets, tiny and tiny_classifier, which form the model tiny_pair."""
    save_network(str(tmp_path / "models/tiny.pt"), MODEL)
    save_network(str(tmp_path / "models/tiny_classifier.pt"), CLASSIFIER, seed=1)
    advice = dict(timestep_respacing="4")
    monkeypatch.setitem(PRESETS, "tiny", Preset("diffusion", "tiny.pt", MODEL, sampling=advice))
    guided = Preset("classifier", "tiny_classifier.pt", CLASSIFIER, dict(classifier_scale=30.0))
    monkeypatch.setitem(PRESETS, "tiny_classifier", guided)
    monkeypatch.setitem(MODELS, "tiny_pair", ("tiny", "tiny_classifier"))
    return str(tmp_path / "models")


def of_script(monkeypatch, name, folder, **options):
    run_here(monkeypatch, name, log_dir=folder, **{"num_samples": 5, "batch_size": 2, **options})
    return read_npz(folder)["arr_0"]


def check_same(images, others):
    assert images.dtype == np.uint8 and images.shape == others.shape and 5 < images.std()
    assert (images == others).all()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "unipc"])
def test_images_equal_those_of_image_sample(sampler, own, monkeypatch, tmp_path):
    model = load(own["model_path"], steps=3, sampler=sampler, batch_size=2)
    options = dict(FAST, model_path=own["model_path"], sampler=sampler, seed=7)
    want = of_script(monkeypatch, "image_sample", tmp_path / "a", classes="1,3", **options)
    check_same(model.sample(classes=[1, 3], num_samples=5, seed=7), want)
    random = of_script(monkeypatch, "image_sample", tmp_path / "b", **options)
    check_same(model.sample(num_samples=5, seed=7), random)
    assert (want != random).any()


def test_images_equal_those_of_classifier_sample(own, monkeypatch, tmp_path):
    model = load(own["model_path"], classifier=own["classifier_path"], steps=3, batch_size=2)
    options = dict(classes="1,3", **FAST, **own)
    want = of_script(monkeypatch, "classifier_sample", tmp_path / "a", classifier_scale=30, **options)
    check_same(model.sample(classes=[1, 3], num_samples=5, scale=30), want)
    weaker = of_script(monkeypatch, "classifier_sample", tmp_path / "b", **options)
    check_same(model.sample(classes=[1, 3], num_samples=5), weaker)  # the default guidance scale is 1
    assert (want != weaker).any()


def test_a_preset_selects_checkpoints_and_sampling_settings(released, monkeypatch, tmp_path):
    options = dict(preset="tiny_pair", models_dir=released, classes="0,2")
    want = of_script(monkeypatch, "classifier_sample", tmp_path / "a", **options)
    guided = load("tiny_pair", models_dir=released, batch_size=2)
    check_same(guided.sample(classes="0,2", num_samples=5), want)

    alone = load("tiny", models_dir=released, batch_size=2)
    assert alone.classifier is None and alone.diffusion.num_timesteps == 4
    check_same(alone.sample(classes=[0, 2], num_samples=5), guided.sample(classes=[0, 2], num_samples=5, scale=0))


def test_classes_are_given_by_number_or_name_with_one_image_each(own):
    model = load(own["model_path"], steps=2)
    images = model.sample(classes=["newt", "Tinca tinca"])
    assert images.shape == (2, 8, 8, 3)
    check_same(images, model.sample(classes=np.array([3, 2])))
    assert model.sample().shape == (1, 8, 8, 3)


def test_load_accepts_the_other_flags_of_the_scripts(own, monkeypatch, tmp_path):
    guide = save_network(str(tmp_path / "guide/model.pt"), MODEL, seed=2, config={})
    options = dict(sample_size=12, guide_model_path=guide, guide_scale=2.0, clip_denoised=False)
    want = of_script(monkeypatch, "image_sample", tmp_path / "a", model_path=own["model_path"], **FAST, **options)
    check_same(load(own["model_path"], steps=3, batch_size=2, **options).sample(num_samples=5), want)


def test_errors_name_the_wrong_argument(own, released, tmp_path):
    refused(lambda: load("imagenet255"), "imagenet255: no such file", "imagenet256", "lsun_cat", "tiny_pair")
    # load() accepts diffusion models, but no pipelines, upsamplers or classifiers.
    for name in ("imagenet64_256", "64_256_upsampler", "256x256_classifier"):
        refused(lambda name=name: load(name), f"{name}: no such file")
    refused(lambda: load("lsun_cat", models_dir=tmp_path), tmp_path / "lsun_cat.pt", "download_models.py lsun_cat")
    refused(lambda: load(own["model_path"], classifier=tmp_path / "no.pt"), "classifier_path", tmp_path / "no.pt")
    refused(lambda: load(own["model_path"], num_samples=3), "'num_samples'", "classifier_sample.py")
    refused(lambda: load("tiny", models_dir=released, num_heads=4), "num_heads 4 in load()", "--preset tiny")
    plain = save_network(str(tmp_path / "plain/model.pt"), {**MODEL, "class_cond": False}, config={})
    labelled = dict(guide_model_path=own["model_path"], guide_scale=2.0, num_classes=4)
    refused(lambda: load(plain, **labelled), "guide_model_path", "it takes class labels, but the model takes none")
    model = load(own["model_path"], steps=2)
    refused(lambda: model.sample(scale=2), "scale 2", "classifier")
    refused(lambda: model.sample(classes=[4]), "class 4", "0..3")
    refused(lambda: model.sample(num_samples=0), "num_samples 0")
    refused(lambda: model.sample(seed=-1), "seed -1")
