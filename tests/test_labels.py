"""Class names and labels of images: from file names, folders or a CSV file."""

import pytest

from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import load_data
from guided_diffusion.image_listing import image_classes, number_classes


def test_classes_are_names_up_to_the_underscore_in_sorted_order():
    paths = ["a/dog_1.png", "b/cat_7_x.png", "dog_2.png", "10_0.png", "9_0.png", "c_d/cat_.png"]
    classes, table = image_classes("", paths)
    assert table == ["10", "9", "cat", "dog"]
    assert number_classes(paths, classes, table, num_classes=4) == [3, 2, 3, 0, 1, 2]
    # An underscore in the folder's name does not separate a class name.
    with pytest.raises(InputError, match="some_folder/plain.png"):
        image_classes("", ["cat_0.png", "some_folder/plain.png"])


def test_classes_by_folder():
    paths = ["data/10/a.png", "data/9/b_0.png", "data/more/cat/c.png", "data/9/d.png"]
    assert image_classes("data", paths, "folder") == (["10", "9", "cat", "9"], ["10", "9", "cat"])
    with pytest.raises(InputError, match=r"data/stray_0.png: not in a class's folder.*--labels folder"):
        image_classes("data", [*paths, "data/stray_0.png"], "folder")


def labelled(tmp_path, text, names=("b/1.png", "a.png", "c.png"), encoding="utf-8"):
    """Classes of the images `names` and the list of class names, according to a CSV file with the content `text`."""
    (tmp_path / "labels.csv").write_text(text, encoding=encoding)
    return image_classes("data", [f"data/{name}" for name in names], str(tmp_path / "labels.csv"))


def test_classes_by_csv(tmp_path):
    expected = (["dog", "cat", "dog"], ["cat", "dog"])
    assert labelled(tmp_path, "path,label\nb/1.png,dog\na.png,cat\nc.png,dog\n") == expected
    assert labelled(tmp_path, "c.png, dog \r\n\r\n./a.png,cat\r\nb//1.png,dog", encoding="utf-8-sig") == expected
    assert labelled(tmp_path, 'a.png,"cat, big"\nb/1.png,ant\nc.png,ant')[1] == ["ant", "cat, big"]


def test_whole_numbers_in_a_csv_are_the_labels_themselves(tmp_path):
    # Labels 9 and 10 stay 9 and 10, although the folder has no images of classes 0 to 8 and "10" < "9" as strings.
    classes, table = labelled(tmp_path, "a.png,9\nb/1.png,10\nc.png,03\n")
    assert table == [str(i) for i in range(11)]
    assert classes == ["10", "9", "3"]
    assert labelled(tmp_path, "a.png,20240101\nb/1.png,9\nc.png,9\n")[1] == ["20240101", "9"]  # class names


@pytest.mark.parametrize("header", ["filename,label", "image,class", "Path, Label", "\nid,breed", "file.name,kind"])
def test_the_header_of_a_csv_is_not_a_class(header, tmp_path):
    words = (["dog", "cat", "cat"], ["cat", "dog"])
    assert labelled(tmp_path, f"{header}\na.png,cat\nb/1.png,dog\nc.png,cat\n") == words
    numbers = (["10", "0", "9"], [str(i) for i in range(11)])
    assert labelled(tmp_path, f"{header}\na.png,0\nb/1.png,10\nc.png,9\n") == numbers


def test_a_csv_may_list_more_images_than_there_are(tmp_path):
    # The list of class names includes the classes of images that do not exist.
    assert labelled(tmp_path, "gone.png,w\na.png,x\nb/1.png,y\nc.png,z\n")[1] == ["w", "x", "y", "z"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a.png,cat\n", ["no label for 2 of 3 images", "b/1.png"]),
        ("", ["no label for 3 of 3 images"]),
        ("a.png,cat\nb/1.png\n", ["line 2 is not path,label"]),
        ("a.png,cat\nb/1.png,dog,3\n", ["line 2 is not path,label"]),
        ("a.png,cat\nb/1.png, \n", ["line 2 is not path,label"]),
        ("a.png;cat\nb/1.png;dog\nc.png;x\n", ["line 1 is not path,label"]),
    ],
)
def test_an_invalid_csv_is_refused(text, words, tmp_path):
    with pytest.raises(InputError) as caught:
        labelled(tmp_path, text)
    assert all(word in str(caught.value) for word in [f"--labels {tmp_path / 'labels.csv'}", *words])


def test_invalid_values_of_labels_are_refused(tmp_path):
    (tmp_path / "a_0.png").touch()
    options = dict(data_dir=str(tmp_path), batch_size=1, image_size=4, class_cond=True)
    with pytest.raises(InputError, match="--labels colour: give name, folder, or .*CSV"):
        load_data(**options, labels="colour")
    with pytest.raises(InputError, match="--labels .*gone.csv: cannot read it .*No such file"):
        load_data(**options, labels=str(tmp_path / "gone.csv"))
    (tmp_path / "latin.csv").write_bytes(b"a_0.png,caf\xe9\n")
    with pytest.raises(InputError, match="--labels .*latin.csv: cannot read it as CSV in UTF-8"):
        load_data(**options, labels=str(tmp_path / "latin.csv"))


def test_load_data_gives_its_class_names(tmp_path):
    for name in ("dog/b_0.png", "cat/a_1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    options = dict(data_dir=str(tmp_path), batch_size=1, image_size=4)
    assert load_data(**options).classes is None
    assert load_data(**options, class_cond=True).classes == ["a", "b"]
    folders = load_data(**options, class_cond=True, labels="folder")
    assert folders.classes == ["cat", "dog"] and folders.dataset.local_classes == [0, 1]
    # With the training data's class names, held-out images get the same labels as in training.
    given = load_data(**options, class_cond=True, labels="folder", classes=["ant", "dog", "cat"])
    assert given.classes == ["ant", "dog", "cat"] and given.dataset.local_classes == [2, 1]
    with pytest.raises(InputError, match="dog/b_0.png: its class dog is not one of the 2 classes of the training data"):
        load_data(**options, class_cond=True, labels="folder", classes=["ant", "cat"])
