"""make_reference.py: images are cropped and labelled as in training, and statistics agree with numpy."""

import os

import numpy as np
import pytest
from known_features import BAD, Command, KnownNetwork, features, save, truth
from launch import RUN_SCRIPT, run_ranks
from PIL import Image

from evaluations import make_reference
from guided_diffusion.image_datasets import ImageDataset
from guided_diffusion.image_listing import image_classes, list_images, number_classes

pytestmark = pytest.mark.usefixtures("cpu")

SIZE = 4
RNG = np.random.default_rng(0)


def training_sees(path, size=SIZE, channels=3):
    """An image file as ImageDataset crops it for training, in grey levels 0 to 255: uint8 [size, size, channels]."""
    array, _ = ImageDataset(size, [str(path)], random_flip=False, channels=channels)[0]
    return np.rint((array.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with subfolders: 13 images of four classes in several sizes and formats, and a text file."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(13):
        parent = folder / ["", "more", "more/still"][i % 3]
        parent.mkdir(exist_ok=True)
        height, width = [(9, 9), (5, 12), (40, 31), (SIZE, SIZE), (3, 7)][i % 5]
        pixels = RNG.integers(0, 255, (height, width, 3), dtype=np.uint8)
        name = f"{['cat', 'ant', 'Bee', '10'][i % 4]}_{i:02d}.{['png', 'jpg', 'PNG', 'webp'][i % 4]}"
        Image.fromarray(pixels).save(parent / name)
    (folder / "notes_1.txt").write_text("no image")
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    return Command(monkeypatch, capsys, make_reference)


def make(command, folder, out, *flags):
    """Run make_reference.py and return the arrays that it writes."""
    assert not command(folder, out, "--image_size", SIZE, *flags)[0]
    with np.load(out) as arrays:
        return dict(arrays)


def all_images(folder, channels=3):
    return np.stack([training_sees(path, channels=channels) for path in list_images(str(folder))])


def check_statistics(arrays, images):
    for suffix, x in zip(("", "_s"), features(images)):
        np.testing.assert_allclose(arrays[f"mu{suffix}"], x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(arrays[f"sigma{suffix}"], np.cov(x, rowvar=False), rtol=1e-10, atol=1e-12)


def test_by_default_all_images_of_a_small_folder_are_kept(command, folder, tmp_path):
    arrays = make(command, folder, tmp_path / "new" / "ref.npz", "--batch_size", 4)
    images = all_images(folder)
    assert arrays["arr_0"].dtype == np.uint8 and (arrays["arr_0"] == images).all()
    check_statistics(arrays, images)
    assert set(arrays) == {"arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s"}
    assert os.listdir(tmp_path / "new") == ["ref.npz"]
    assert [len(batch) for batch in command.network.seen] == [4, 4, 4, 1]


def labels_in_training(folder):
    """The label of each crop in training: {bytes of the crop: label}."""
    paths = list_images(str(folder))
    labels = number_classes(paths, *image_classes(str(folder), paths))
    assert sorted(set(labels)) == [0, 1, 2, 3]
    return {training_sees(path).tobytes(): label for path, label in zip(paths, labels)}


@pytest.mark.parametrize("flags", [[], ["--no_statistics"]])
def test_num_images_limits_the_stored_images_but_not_the_statistics(flags, command, folder, tmp_path):
    of_training, chosen = labels_in_training(folder), {}
    for seed in (0, 0, 1):
        arrays = make(command, folder, tmp_path / "ref.npz", "--num_images", 6, "--seed", seed, *flags)
        crops = [crop.tobytes() for crop in arrays["arr_0"]]
        assert len(set(crops)) == 6 and crops == chosen.setdefault(seed, crops)
        assert arrays["arr_1"].dtype == np.int64 and arrays["arr_1"].tolist() == [of_training[crop] for crop in crops]
        if flags:
            assert set(arrays) == {"arr_0", "arr_1"} and not command.network.seen
        else:
            check_statistics(arrays, all_images(folder))
    assert set(chosen[0]) != set(chosen[1])


def test_grey_images(command, folder, tmp_path):
    arrays = make(command, folder, tmp_path / "grey.npz", "--channels", 1)
    assert arrays["arr_0"].shape == (13, SIZE, SIZE, 1)
    assert (arrays["arr_0"] == all_images(folder, channels=1)).all()
    check_statistics(arrays, all_images(folder, channels=1).repeat(3, axis=3))


def test_images_without_labels(command, folder, tmp_path):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(all_images(folder)):
        Image.fromarray(image).save(tmp_path / "images" / (f"cat_{i}.png" if i else "lion.png"))
    assert "arr_1" not in make(command, tmp_path / "images", tmp_path / "ref.npz")


KNOWN_NETWORK = """
import known_features
from evaluations import evaluator
evaluator.load_inception = lambda *args: (known_features.KnownNetwork(), "known")
"""


@pytest.mark.parametrize("flags", [[], ["--no_statistics"]])
def test_three_ranks_write_the_same_file_as_one(flags, command, folder, tmp_path):
    flags = ["--num_images", 7, "--batch_size", 3, *flags]
    want = make(command, folder, tmp_path / "1.npz", *flags)
    argv = [make_reference.__file__, folder, tmp_path / "3.npz", "--image_size", SIZE, *flags]
    code = RUN_SCRIPT if "--no_statistics" in flags else KNOWN_NETWORK + RUN_SCRIPT
    run_ranks(3, argv, code=code)[0].check()
    with np.load(tmp_path / "3.npz") as arrays:
        assert set(arrays) == set(want)
        for name, array in want.items():
            assert arrays[name].dtype == array.dtype
            np.testing.assert_allclose(arrays[name], array, rtol=1e-10, atol=1e-13, err_msg=name)
            assert name.startswith(("mu", "sigma")) or (arrays[name] == array).all()


def test_the_evaluator_accepts_the_reference_file(command, folder, tmp_path, monkeypatch, capsys):
    kept = make(command, folder, tmp_path / "ref.npz", "--num_images", 9)["arr_0"]
    samples = RNG.integers(0, 255, (12, SIZE, SIZE, 3), dtype=np.uint8)
    out, _ = Command(monkeypatch, capsys)(tmp_path / "ref.npz", save(tmp_path / "samples.npz", samples))
    of_all, of_kept = truth(all_images(folder), samples), truth(kept, samples)
    want = [of_all["is"], of_all["fid"], of_all["sfid"], of_kept["precision"], of_kept["recall"]]
    assert [float(line.split(": ")[1]) for line in out.splitlines()] == pytest.approx(want, rel=1e-9)


# Bad input


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--image_size", 0], "--image_size 0: must be at least 1"),
        (["--batch_size", 0], "--batch_size 0: must be at least 1"),
        (["--num_images", 3], "--num_images 3: must be at least 4"),
        (["--seed", -1], "--seed -1: must be at least 0"),
    ],
)
def test_bad_flags_are_refused(flags, words, command, folder, tmp_path):
    assert words in command.refused(folder, tmp_path / "ref.npz", "--image_size", SIZE, *flags)
    assert os.listdir(tmp_path) == []


def test_bad_folders_are_refused(command, folder, tmp_path):
    (tmp_path / "images").mkdir()

    def line(of, out=tmp_path / "ref.npz"):
        found = command.refused(of, out, "--image_size", SIZE)
        assert not out.exists() and not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
        return found

    assert line(tmp_path / "gone").endswith("gone: no such folder")
    assert "images: no image in it" in line(tmp_path / "images")
    for i in range(4):
        Image.fromarray(np.full((6, 6, 3), 9, np.uint8)).save(tmp_path / "images" / f"{i}.png")
        if i < 3:
            assert f"images: {i + 1} images; a reference needs at least 4" in line(tmp_path / "images")
    (tmp_path / "images" / "9.png").write_text("an error page, perhaps")
    assert "9.png: cannot read this image" in line(tmp_path / "images")
    (tmp_path / "images" / "9.png").unlink()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in line(tmp_path / "images", tmp_path / "file" / "ref.npz")


def test_images_with_non_finite_features_are_named(command, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(9):
        Image.fromarray(np.full((SIZE, SIZE, 3), BAD if i == 7 else i, np.uint8)).save(tmp_path / f"images/{i}.png")
    line = command.refused(tmp_path / "images", tmp_path / "ref.npz", "--image_size", SIZE, "--batch_size", 2)
    assert f"{tmp_path}/images/6.png to {tmp_path}/images/7.png have features that are not finite" in line
    assert not (tmp_path / "ref.npz").exists()


@pytest.mark.parametrize("moment", ["network", "file"])
def test_an_interrupt_leaves_the_previous_file_unchanged(moment, command, folder, tmp_path, monkeypatch):
    def interrupted(f, **arrays):
        f.write(b"some of it")
        raise KeyboardInterrupt

    (tmp_path / "ref.npz").write_bytes(b"an older one")
    if moment == "network":
        command.network = KnownNetwork(interrupt_at=3)
    else:
        monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(folder, tmp_path / "ref.npz", "--image_size", SIZE, "--batch_size", 2)
    assert os.listdir(tmp_path) == ["ref.npz"] and (tmp_path / "ref.npz").read_bytes() == b"an older one"
