"""Reference batches from folders of images: cropped and labelled as in training, with numpy's statistics."""

import os

import numpy as np
import pytest
import torch as th
from launch import ROOT, run
from PIL import Image
from test_evaluation_features import BAD, Command, InterruptedNetwork, KnownNetwork, on_ranks, save, truth
from test_evaluator import make_graph

from evaluations import make_reference
from evaluations.errors import EvaluationError
from evaluations.inception import InceptionV3, read_graph
from guided_diffusion.image_datasets import ImageDataset
from guided_diffusion.image_listing import image_classes, list_images, number_classes

pytestmark = pytest.mark.usefixtures("cpu")

SIZE = 4
RNG = np.random.default_rng(0)


def training_sees(path, size=SIZE, channels=3):
    """An image as training shows it to the network, in whole grey levels: uint8 [size, size, channels]."""
    array, _ = ImageDataset(size, [str(path)], random_flip=False, channels=channels)[0]
    return np.rint((array.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """13 images of four classes in several sizes and formats, also in folders below; and other files."""
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
    """The arrays that the command writes."""
    status, printed, err = command(folder, out, "--image_size", SIZE, *flags)
    assert status == 0 and not printed, err
    with np.load(out) as arrays:
        return dict(arrays)


def all_images(folder, channels=3):
    """The crops of all images in the order of the command's listing."""
    return np.stack([training_sees(path, channels=channels) for path in sorted(list_images(str(folder)))])


def check_statistics(arrays, images):
    flat = images.reshape(len(images), -1) / 64  # KnownNetwork's features
    for suffix, features in (("", flat[:, :6]), ("_s", flat[:, 6:10])):
        np.testing.assert_allclose(arrays[f"mu{suffix}"], features.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(arrays[f"sigma{suffix}"], np.cov(features, rowvar=False), rtol=1e-10, atol=1e-12)


# Crops

EXIF = {
    "empty": b"Exif\0\0",
    "no header": b"Exif\0\0no TIFF header at all",
    "beyond the end": b"Exif\0\0MM\0*\xff\xff\xff\xff",
    "255 letters": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\0\0\0\x26\0\0\0",
    "cut off": b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01",
}


def kinds_of_images():
    """Pictures by the names that they are saved by, with the options of that."""
    noise = Image.fromarray(RNG.integers(0, 256, (50, 71, 3), dtype=np.uint8))
    palette = noise.quantize(40)
    grey16 = Image.fromarray(RNG.integers(0, 65536, (30, 41), dtype=np.uint16))
    alpha = noise.convert("RGBA")
    alpha.putalpha(77)
    kinds = {
        "wide.png": (noise, {}),
        "tall.jpg": (noise.transpose(Image.Transpose.ROTATE_90), {}),
        "small.png": (noise.resize((5, 3)), {}),
        "exact.png": (noise.resize((8, 8)), {}),
        "grey.png": (noise.convert("L"), {}),
        "black and white.png": (noise.convert("1"), {}),
        "palette.png": (palette, {}),
        "transparent palette.png": (palette, dict(transparency=bytes(range(0, 200, 5)))),
        "transparent colour.png": (noise, dict(transparency=(1, 2, 3))),
        "transparent.gif": (palette, dict(transparency=1)),
        "alpha.png": (alpha, {}),
        "grey alpha.png": (noise.convert("LA"), {}),
        "inks.jpg": (noise.convert("CMYK"), {}),
        "16 bits.png": (grey16, {}),
        "animated.gif": (palette, dict(save_all=True, append_images=[noise.convert("L").quantize(9)])),
        "lossy.webp": (noise, {}),
    }
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for name in ("turned.jpg", "turned.png"):
            kinds[f"{orientation} {name}"] = (noise, dict(exif=exif))
    for damage, exif in EXIF.items():
        kinds[f"{damage} exif.jpg"] = (noise, dict(exif=exif))
    return kinds


@pytest.mark.parametrize("name", kinds_of_images())
def test_crops_are_those_of_training(name, tmp_path, recwarn):
    image, options = kinds_of_images()[name]
    image.save(tmp_path / name, **options)
    for size in (8, 15, 50):
        for channels in (1, 3):
            got = make_reference.read_image(str(tmp_path / name), size, channels)
            assert got.dtype == np.uint8 and got.shape == (size, size, channels)
            assert (got == training_sees(tmp_path / name, size, channels)).all()
    assert not recwarn.list


def test_pictures_without_a_meaning_are_refused_as_in_training(tmp_path):
    """Numbers of an open range, and files that are cut short."""
    Image.fromarray(np.full((8, 8), 1000, np.int32)).save(tmp_path / "x.tif")
    os.rename(tmp_path / "x.tif", tmp_path / "wide.png")
    noise = Image.fromarray(RNG.integers(0, 256, (50, 71, 3), dtype=np.uint8))
    noise.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    (tmp_path / "text.jpg").write_text("an error page, perhaps")
    (tmp_path / "nothing.gif").write_bytes(b"")
    for name in ("wide.png", "cut.png", "text.jpg", "nothing.gif", "gone.png"):
        with pytest.raises(EvaluationError, match=f"{name}: cannot read this image") as caught:
            make_reference.read_image(str(tmp_path / name), 8)
        assert "\n" not in str(caught.value)


def test_the_images_are_those_of_training(folder, tmp_path):
    """Also in folders that are links, however the extension is written."""
    (tmp_path / "mine").mkdir()
    os.symlink(folder, tmp_path / "mine" / "link")
    os.symlink(tmp_path / "mine", tmp_path / "mine" / "loop")
    os.symlink(tmp_path / "gone", tmp_path / "mine" / "nowhere")
    for name in ("a.jpeg", "b.GIF", "c.bmp", "d", "png", ".hidden.png", ".png"):
        (tmp_path / "mine" / name).write_bytes(b"")
    got = make_reference.list_images(str(tmp_path / "mine"))
    assert got == sorted(got) and set(got) == set(list_images(str(tmp_path / "mine")))
    assert len(got) == 13 + 4


# What is written


def test_a_small_folder_is_kept_whole(command, folder, tmp_path):
    arrays = make(command, folder, tmp_path / "new" / "ref.npz", "--batch_size", 4)
    images = all_images(folder)
    assert arrays["arr_0"].dtype == np.uint8 and (arrays["arr_0"] == images).all()
    check_statistics(arrays, images)
    assert set(arrays) == {"arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s"}
    assert os.listdir(tmp_path / "new") == ["ref.npz"]
    assert [len(batch) for batch in command.network.seen] == [4, 4, 4, 1]


def labels_in_training(folder):
    """By crop, as bytes: the label that training gives it."""
    paths = list_images(str(folder))
    classes, names = image_classes(str(folder), paths)
    labels = number_classes(paths, classes, names)
    assert sorted(set(labels)) == [0, 1, 2, 3]
    return {training_sees(path).tobytes(): label for path, label in zip(paths, labels)}


@pytest.mark.parametrize("flags", [[], ["--no_statistics"]])
def test_some_images_of_many(flags, command, folder, tmp_path):
    """The statistics are of all of them all the same."""
    of_training, chosen = labels_in_training(folder), {}
    for seed in range(4):
        arrays = make(command, folder, tmp_path / "ref.npz", "--num_images", 6, "--seed", seed, *flags)
        crops = [crop.tobytes() for crop in arrays["arr_0"]]
        assert len(set(crops)) == 6
        assert arrays["arr_1"].dtype == np.int64 and arrays["arr_1"].tolist() == [of_training[crop] for crop in crops]
        if flags:
            assert set(arrays) == {"arr_0", "arr_1"} and not command.network.seen
        else:
            check_statistics(arrays, all_images(folder))
        chosen[seed] = crops
        again = make(command, folder, tmp_path / "again.npz", "--num_images", 6, "--seed", seed, *flags)
        assert (again["arr_0"] == arrays["arr_0"]).all()
    assert len({tuple(crops) for crops in chosen.values()}) == 4
    assert set().union(*chosen.values()) > set(chosen[0])


def test_grey_images(command, folder, tmp_path):
    arrays = make(command, folder, tmp_path / "grey.npz", "--no_statistics", "--channels", 1)
    assert arrays["arr_0"].shape == (13, SIZE, SIZE, 1)
    assert (arrays["arr_0"] == all_images(folder, channels=1)).all()


def test_images_without_labels(command, folder, tmp_path):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(all_images(folder)):
        Image.fromarray(image).save(tmp_path / "images" / (f"cat_{i}.png" if i else "lion.png"))
    assert "arr_1" not in make(command, tmp_path / "images", tmp_path / "ref.npz")


@pytest.mark.parametrize("flags", [[], ["--no_statistics"]])
def test_ranks_write_the_same(flags, command, folder, tmp_path):
    flags = ["--num_images", 7, "--batch_size", 3, *flags]
    want = make(command, folder, tmp_path / "1.npz", *flags)
    with command.monkeypatch.context() as patch:
        patch.setattr(make_reference, "load_inception", lambda *args: (KnownNetwork(), ""))
        for size in (2, 3, 6):
            argv = [folder, tmp_path / f"{size}.npz", "--image_size", SIZE, *flags]
            args = make_reference.create_argparser().parse_args(list(map(str, argv)))
            on_ranks(size, lambda ranks, args=args: make_reference.make_reference(args, ranks))
            with np.load(tmp_path / f"{size}.npz") as arrays:
                assert set(arrays) == set(want)
                for name, array in want.items():
                    assert arrays[name].dtype == array.dtype
                    np.testing.assert_allclose(arrays[name], array, rtol=1e-10, atol=1e-13, err_msg=name)
                    assert name.startswith(("mu", "sigma")) or (arrays[name] == array).all()


def test_the_evaluator_takes_it(command, folder, tmp_path, monkeypatch, capsys):
    make(command, folder, tmp_path / "ref.npz", "--num_images", 9)
    images = all_images(folder)
    samples = RNG.integers(0, 255, (12, SIZE, SIZE, 3), dtype=np.uint8)
    path = save(tmp_path / "samples.npz", samples, "plain")
    status, out, _ = Command(monkeypatch, capsys)(tmp_path / "ref.npz", path)
    figures = {line.split(": ")[0]: float(line.split(": ")[1]) for line in out.splitlines()}
    with np.load(tmp_path / "ref.npz") as arrays:
        kept = arrays["arr_0"]
    of_all, of_kept = truth(images, samples), truth(kept, samples)
    assert status == 0 and figures == {
        "Inception Score": pytest.approx(of_all["is"], rel=1e-9),
        "FID": pytest.approx(of_all["fid"], rel=1e-9),
        "sFID": pytest.approx(of_all["sfid"], rel=1e-9),
        "Precision": pytest.approx(of_kept["precision"]),
        "Recall": pytest.approx(of_kept["recall"]),
    }


def test_with_inception_on_two_ranks(folder, tmp_path):
    graph = make_graph(tmp_path / "graph.pb")
    script = os.path.join(ROOT, "evaluations", "make_reference.py")
    argv = [script, str(folder), str(tmp_path / "ref.npz"), "--inception_path", str(graph), "--image_size", "8"]
    run([*argv, "--num_images", "5", "--batch_size", "4"], ranks=2, timeout=120).check()
    images = np.stack([training_sees(path, 8) for path in sorted(list_images(str(folder)))])
    features = InceptionV3(read_graph(graph))(th.from_numpy(images))
    with np.load(tmp_path / "ref.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 8, 8, 3) and arrays["arr_1"].shape == (5,)
        for suffix, found in zip(("", "_s"), features):
            found = found.double().numpy()
            np.testing.assert_allclose(arrays[f"mu{suffix}"], found.mean(axis=0), rtol=1e-6, atol=1e-7)
            want = np.cov(found, rowvar=False)
            assert np.linalg.norm(arrays[f"sigma{suffix}"] - want) < 1e-6 * np.linalg.norm(want)


# Bad input


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--image_size", 0], "--image_size and --batch_size must be at least 1"),
        (["--batch_size", 0], "--image_size and --batch_size must be at least 1"),
        (["--num_images", 3], "--num_images at least 4"),
        (["--num_images", -1], "--num_images at least 4"),
        (["--seed", -1], "--seed"),
        (["--channels", 1], "give --no_statistics, too"),
        (["--device", "abacus"], "--device abacus: not to be had here"),
    ],
)
def test_bad_flags(flags, words, command, folder, tmp_path):
    line = command.refused(folder, tmp_path / "ref.npz", "--image_size", SIZE, *flags)
    assert words in line and os.listdir(tmp_path) == []


def test_bad_folders(command, folder, tmp_path):
    (tmp_path / "images").mkdir()

    def line(of, out=tmp_path / "ref.npz"):
        found = command.refused(of, out, "--image_size", SIZE)
        assert not out.exists() and not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
        return found

    assert line(tmp_path / "gone").endswith("gone: no such folder")
    assert line(folder / "notes_1.txt").endswith("notes_1.txt: not a folder")
    assert "images: 0 images; a reference needs at least 4" in line(tmp_path / "images")
    for i in range(4):
        assert f"images: {i} images; a reference needs at least 4" in line(tmp_path / "images")
        Image.fromarray(np.full((6, 6, 3), 9, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "9.png").write_text("an error page, perhaps")
    assert "9.png: cannot read this image" in line(tmp_path / "images")
    (tmp_path / "images" / "9.png").unlink()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in line(tmp_path / "images", tmp_path / "file" / "ref.npz")


@pytest.mark.parametrize("size", [1, 2])
def test_features_that_are_not_finite_name_the_images(size, folder, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for i in range(9):
        Image.fromarray(np.full((SIZE, SIZE, 3), BAD if i == 7 else i, np.uint8)).save(tmp_path / f"images/{i}.png")
    monkeypatch.setattr(make_reference, "load_inception", lambda *args: (KnownNetwork(), ""))
    argv = [str(tmp_path / "images"), str(tmp_path / "ref.npz"), "--image_size", str(SIZE), "--batch_size", "2"]
    args = make_reference.create_argparser().parse_args(argv)
    with pytest.raises(EvaluationError) as caught:
        on_ranks(size, lambda ranks: make_reference.make_reference(args, ranks))
    message = str(caught.value)
    assert "\n" not in message and "features that are not finite" in message
    assert f"{tmp_path}/images/6.png to {tmp_path}/images/7.png" in message
    assert not (tmp_path / "ref.npz").exists()


# Ctrl-C


@pytest.mark.parametrize("moment", ["network", "file"])
def test_ctrl_c_leaves_no_file(moment, command, folder, tmp_path, monkeypatch):
    def interrupted(f, **arrays):
        f.write(b"some of it")
        raise KeyboardInterrupt

    (tmp_path / "ref.npz").write_bytes(b"an older one")
    if moment == "network":
        command.network = InterruptedNetwork()
    else:
        monkeypatch.setattr("evaluations.files.np.savez", interrupted)
    status, _, err = command(folder, tmp_path / "ref.npz", "--image_size", SIZE, "--batch_size", 2)
    assert status == 130 and err.splitlines()[-1] == "interrupted" and "Traceback" not in err
    assert os.listdir(tmp_path) == ["ref.npz"] and (tmp_path / "ref.npz").read_bytes() == b"an older one"
