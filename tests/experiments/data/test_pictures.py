"""Pictures of all kinds become arrays of one form, and what is wrong with a folder is said."""

import dataclasses
import sys

import numpy as np
import photos
import pytest
from PIL import Image

from experiments.common.errors import DataError, UsageError
from experiments.data import folders
from experiments.data.folders import Folders, load_folders
from experiments.data.pictures import Pictures, for_fit, read


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """Return a folder with pictures to train and to test on."""
    base = tmp_path_factory.mktemp("photos")
    photos.write(base / "train", 15, seed=0)
    photos.write(base / "test", 5, seed=1)
    return base


def given(where, **options):
    return Folders(**{"train": str(where / "train"), "size": 16} | options)


def quiet(options):
    return load_folders(options, progress=False)


def test_all_kinds_are_colour_of_one_size(where):
    dataset = quiet(given(where, test=str(where / "test")))
    images, labels = dataset.train
    assert images.shape == (45, 16, 16, 3) and images.dtype == np.uint8
    assert dataset.classes == photos.CLASSES
    np.testing.assert_array_equal(np.bincount(labels), [15, 15, 15])
    np.testing.assert_array_equal(np.bincount(dataset.test[1]), [5, 5, 5])
    pixels = images.reshape(-1, 3)
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), atol=1e-2)
    np.testing.assert_allclose(dataset.std, pixels.std(0), atol=1e-2)


def four(path, size=8, **options):
    """Write red, green, blue and white quarters; returns what is read of them."""
    image = Image.new("RGB", (40, 40), "white")
    for box, colour in (
        ((0, 0, 20, 20), "red"),
        ((20, 0, 40, 20), "lime"),
        ((0, 20, 20, 40), "blue"),
    ):
        image.paste(colour, box)
    image = options.pop("change", lambda image: image)(image)
    image.save(path, **options)
    found = read(path, size).astype(int)
    return [tuple(found[i, j]) for i, j in ((1, 1), (1, 6), (6, 1), (6, 6))]


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif", "a.bmp"])
def test_colours_stay_where_they_are(name, tmp_path):
    options = {"lossless": True} if name.endswith("webp") else {}
    assert four(tmp_path / name, **options) == [RED, GREEN, BLUE, WHITE]


def test_a_picture_is_turned_as_its_exif_data_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it by 90 degrees clockwise
    assert four(tmp_path / "a.png", exif=exif) == [BLUE, RED, WHITE, GREEN]


def test_grey_transparent_and_deep_pictures(tmp_path):
    def clear(image):
        image = image.convert("RGBA")
        image.putalpha(Image.new("L", image.size, 0))
        return image

    assert four(tmp_path / "a.png", change=clear) == [WHITE] * 4
    grey = four(tmp_path / "b.png", change=lambda image: image.convert("L"))
    assert all(len(set(colour)) == 1 for colour in grey) and grey[3] == WHITE
    deep = np.full((9, 9), 32768, np.uint16)
    Image.fromarray(deep).save(tmp_path / "c.png")
    np.testing.assert_array_equal(read(tmp_path / "c.png", 8), 127)
    palette = four(tmp_path / "d.png", change=lambda image: image.convert("P"))
    assert palette == [RED, GREEN, BLUE, WHITE]
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(tmp_path / "e.jpg")
    assert np.abs(read(tmp_path / "e.jpg", 8).astype(int) - RED).max() < 8


def test_the_middle_of_an_oblong_picture(tmp_path):
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("lime", (30, 0, 60, 30))
    wide.save(tmp_path / "a.png")
    inner = read(tmp_path / "a.png", 8)[:, 1:-1]
    np.testing.assert_array_equal(inner.reshape(-1, 3), [GREEN] * 48)
    Image.new("RGB", (1, 200), "blue").save(tmp_path / "b.png")
    np.testing.assert_array_equal(read(tmp_path / "b.png", 8), np.full((8, 8, 3), BLUE))


def test_a_part_of_each_class_is_held_out_by_the_seed(where):
    first, again, other = (quiet(given(where, seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(np.bincount(first.test[1]), [3, 3, 3])  # a fifth of 15
    np.testing.assert_array_equal(np.bincount(first.train[1]), [12, 12, 12])
    np.testing.assert_array_equal(first.test[0], again.test[0])
    assert first.digest == again.digest != other.digest
    rows = {image.tobytes() for image in first.train[0]}
    assert not rows & {image.tobytes() for image in first.test[0]}


def test_labels_per_class_makes_a_transfer_set_of_the_rest(where):
    whole = quiet(given(where, test=str(where / "test")))
    few = quiet(given(where, test=str(where / "test"), labels_per_class=4))
    np.testing.assert_array_equal(np.bincount(few.train[1]), [4, 4, 4])
    assert few.transfer.shape == (33, 16, 16, 3) and few.digest != whole.digest
    rows = {image.tobytes() for image in few.train[0]}
    assert not rows & {image.tobytes() for image in few.transfer}
    assert rows | {i.tobytes() for i in few.transfer} == {i.tobytes() for i in whole.train[0]}


def test_what_is_not_read_into_memory_is_the_same(where, monkeypatch):
    inside = quiet(given(where))
    monkeypatch.setattr(folders, "memory_for_pictures", lambda: 1000)
    outside = quiet(given(where))
    assert (
        isinstance(outside.train[0], Pictures) and outside.train[0].shape == inside.train[0].shape
    )
    np.testing.assert_array_equal(outside.train[0][:], inside.train[0])
    np.testing.assert_array_equal(outside.test[0][np.array([2, 0])], inside.test[0][[2, 0]])
    assert (outside.digest, outside.mean, outside.std) == (inside.digest, inside.mean, inside.std)
    [*batches] = for_fit(outside.test, 4, None)
    assert [len(labels) for _, labels in batches] == [4, 4, 1]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), inside.test[0])
    with pytest.raises(UsageError, match="--labels-per-class keeps the pictures in memory"):
        quiet(given(where, labels_per_class=2))


def test_pictures_that_cannot_be_read_are_named_and_counted(where, tmp_path, capsys):
    photos.write(tmp_path / "train", 5, broken=7)
    (tmp_path / "train" / "disc" / "text.jpg").write_text("no picture")
    with pytest.raises(DataError, match="8 of 23 pictures cannot be read") as error:
        quiet(given(tmp_path))
    assert "square/broken0.png (OSError: image file is truncated)" in str(error.value)
    assert "and 3 more" in str(error.value) and "--skip-unreadable" in str(error.value)
    dataset = quiet(given(tmp_path, skip_unreadable=True))
    assert len(dataset.train[0]) + len(dataset.test[0]) == 15
    assert "8 of 23 pictures cannot be read and left out" in capsys.readouterr().out


def test_what_is_wrong_with_a_folder_is_said(where, tmp_path):
    def message(**options):
        with pytest.raises((UsageError, DataError)) as error:
            quiet(given(where, **options))
        return str(error.value)

    assert message(train=str(tmp_path / "none")).endswith(
        "cannot be read: No such file or directory"
    )
    assert "holds no pictures: it takes a folder per class" in message(train=str(tmp_path))
    assert "holds pictures, but not in folders" in message(train=str(where / "train" / "disc"))
    assert f"--train={where}/train --test={where}/test" in message(train=str(where))
    (tmp_path / "test" / "cat").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "test" / "cat" / "a.png")
    assert "has classes that --train has not: cat" in message(test=str(tmp_path / "test"))
    assert "class disc has 15 to train on" in message(test=str(where / "test"), labels_per_class=16)
    assert "leaves no picture without" in message(test=str(where / "test"), labels_per_class=15)
    (tmp_path / "one" / "a").mkdir(parents=True)
    (tmp_path / "one" / "b").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "one" / "a" / "a.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "one" / "b" / "a.png")
    assert "class a has only 1 picture:" in message(train=str(tmp_path / "one"))
    (tmp_path / "one" / "b" / "a.png").rename(tmp_path / "one" / "b" / "a.heic")
    assert "pictures in only one folder, a: it takes" in message(train=str(tmp_path / "one"))
    (tmp_path / "one" / "a" / "a.png").unlink()
    assert "no pictures, but 1 file of other kinds (1 .heic)" in message(
        train=str(tmp_path / "one")
    )


def test_what_is_found_and_what_is_left_out_is_said(where, capsys):
    (where / "train" / "empty").mkdir()
    quiet(given(where, test=str(where / "test"), labels_per_class=4))
    (where / "train" / "empty").rmdir()
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"--train={where}/train: left out 1 file of other kinds (1 .txt): "
        "it takes png, jpg, jpeg, webp",
        f"--train={where}/train: no picture in empty: no class",
        f"--test={where}/test: left out 1 file of other kinds (1 .txt): "
        "it takes png, jpg, jpeg, webp",
        "3 classes: 12 pictures to train on, 33 without a label, 15 to test on",
    ]


def test_a_link_back_is_not_followed_and_another_is(tmp_path):
    """A class that has itself inside would be counted forty times, and tested on what it saw."""
    photos.write(tmp_path / "train", 5)
    (tmp_path / "train" / "disc" / "below").mkdir()
    (tmp_path / "train" / "disc" / "below" / "again").symlink_to(tmp_path / "train" / "disc")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "train" / "square" / "more").symlink_to(tmp_path / "elsewhere")
    dataset = quiet(given(tmp_path))
    counts = np.bincount(dataset.train[1]) + np.bincount(dataset.test[1])
    np.testing.assert_array_equal(counts, [5, 6, 5])


def test_the_options_are_in_the_run_and_read_back(where):
    dataset = quiet(given(where))
    names = {field.name for field in dataclasses.fields(Folders)}
    again = quiet(Folders(**{k: v for k, v in dataset.origin.items() if k in names}))
    assert again.digest == dataset.digest


def test_a_data_set_of_hugging_face(where, tmp_path, monkeypatch):
    """Its loader of folders stands for one of the hub, which is not to be reached here."""
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name: load("imagefolder", data_dir=str(where), cache_dir=str(tmp_path)),
    )
    found = quiet(Folders(dataset="hf:some/photos", size=16))
    same = quiet(given(where, test=str(where / "test")))
    assert found.classes == same.classes
    np.testing.assert_array_equal(found.test[0], same.test[0])
    np.testing.assert_array_equal(np.bincount(found.train[1]), np.bincount(same.train[1]))
    assert found.origin["dataset"] == "hf:some/photos"

    def gone(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(DataError, match="hf:some/photos cannot be loaded: no network"):
        quiet(Folders(dataset="hf:some/photos"))


def test_hugging_face_without_its_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs it: pip install datasets"):
        quiet(Folders(dataset="hf:some/photos"))
