"""Reading data sets: what is read, and what a damaged file says."""

import functools
import io
import os
import re
import shutil
import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds
from archives import COUNTS, SOURCES, fake_archives, register, shape
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from experiments.common.errors import DataError
from experiments.data.load import decoded, load


def configure(monkeypatch, **options):
    config = functools.partial(tfds.download.DownloadConfig, **options)
    monkeypatch.setattr(tfds.download, "DownloadConfig", config)


def as_set(images, labels):
    """Return a split as a sorted list of (label, pixels): tfds shuffles when it prepares."""
    return sorted((int(y), x.tobytes()) for x, y in zip(images, labels, strict=True))


def stock(name, split, root):
    kwargs = {"data_dir": root, "builder_kwargs": {"file_format": "array_record"}}
    return tfds.data_source(SOURCES[name], split=split, download=False, **kwargs)


def failure(name, root):
    with pytest.raises(DataError) as caught:
        load(name, root, progress=False)
    assert len(str(caught.value).splitlines()) <= 5
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test of this module leaves the machine."""
    lookup = socket.getaddrinfo

    def only_here(host, *args, **kwargs):
        if host not in ("127.0.0.1", b"127.0.0.1"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    monkeypatch.setenv("NO_PROXY", "*")


def test_digits():
    digits = load("digits", "/nowhere", progress=False)
    (images, labels), (test_images, test_labels) = digits.train, digits.test
    assert images.shape == (1347, 8, 8, 1) and test_images.shape == (450, 8, 8, 1)
    assert images.dtype == test_images.dtype == np.uint8 and images.max() == 16
    assert labels.dtype == test_labels.dtype == np.int32
    assert digits.classes == tuple("0123456789") and not (digits.crop_padding or digits.flip)
    share = np.bincount(test_labels) / (np.bincount(labels) + np.bincount(test_labels))
    np.testing.assert_allclose(share, 0.25, atol=0.01)
    # The first test labels, so that the split cannot change unnoticed.
    assert test_labels[:10].tolist() == [2, 0, 4, 9, 4, 1, 2, 4, 6, 7]
    np.testing.assert_allclose(digits.mean, images.mean(), atol=1e-3)
    np.testing.assert_allclose(digits.std, images.std(), atol=1e-3)


def test_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown data set 'cifar': did you mean .*cifar10"):
        load("cifar")


@pytest.mark.parametrize("name", SOURCES)
def test_prepared_data_reads_back(name, tmp_path, monkeypatch):
    splits = fake_archives(name, tmp_path / "downloads/manual")
    register(monkeypatch, name, tmp_path / "downloads/manual")
    dataset = load(name, tmp_path, progress=False)
    for split, (images, labels) in splits.items():
        read_images, read_labels = getattr(dataset, split)
        assert read_images.dtype == np.uint8 and read_labels.dtype == np.int32
        assert as_set(read_images, read_labels) == as_set(images, labels)
        source = stock(name, split, tmp_path)
        np.testing.assert_array_equal([e["image"] for e in source], read_images)
        np.testing.assert_array_equal([e["label"] for e in source], read_labels)
        for example in source:
            if name != "mnist":  # the others say the place in the archive
                i = int(example["id"].decode().removeprefix(f"{split}_"))
                np.testing.assert_array_equal(example["image"], images[i])
            if name == "cifar100":
                assert example["coarse_label"] == example["label"] // 5
    word = "class" if name.startswith("cifar") else ""
    assert dataset.classes == tuple(f"{word}{i}" for i in range(100 if name == "cifar100" else 10))
    assert dataset.crop_padding == (0 if name == "mnist" else 4)
    assert dataset.flip == name.startswith("cifar")
    assert len(dataset.mean) == len(dataset.std) == shape(name)[-1]
    # The second time from disk, in the same order, without the archives.
    shutil.rmtree(tmp_path / "downloads")
    again = load(name, tmp_path, progress=False)
    np.testing.assert_array_equal(again.train[0], dataset.train[0])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """CIFAR-10 of random images, in three shards a split, which load when nothing is damaged."""
    root = tmp_path_factory.mktemp("sharded")
    splits = fake_archives("cifar10", root / "downloads/manual")
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch, "cifar10", root / "downloads/manual")
        configure(monkeypatch, num_shards=3)
        dataset = load("cifar10", root, progress=False)
    assert as_set(*dataset.train) == as_set(*splits["train"])
    return root / "cifar10"


def overwrite(path, start, content):
    old = path.read_bytes()
    path.write_bytes(old[:start] + content + old[start + len(content) :])


def rewrite(path, change):
    """Replace the records of a shard by `change` of them."""
    records = change(ArrayRecordReader(str(path)).read_all())
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def change_in(record, mark, content):
    """Return the record with the bytes after the only `mark` overwritten."""
    head, tail = record.split(mark)
    return head + mark + content + tail[len(content) :]


LABEL = b"\x1a\x03\n\x01"  # an Int64List of one value, which follows
DAMAGE = {
    "truncated": lambda p: os.truncate(p, p.stat().st_size // 2),
    "cut at the end": lambda p: os.truncate(p, p.stat().st_size - 10),
    "empty": lambda p: os.truncate(p, 0),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "zeros inside": lambda p: overwrite(p, 20_000, bytes(5_000)),
    "one bit": lambda p: overwrite(p, 20_000, bytes([p.read_bytes()[20_000] ^ 1])),
    "missing": lambda p: p.unlink(),
    "records lost": lambda p: rewrite(p, lambda r: r[:-1]),
    "records added": lambda p: rewrite(p, lambda r: r + r[:1]),
    "bad image": lambda p: rewrite(p, lambda r: [change_in(r[0], b"IDAT", bytes(99)), *r[1:]]),
    "bad label": lambda p: rewrite(p, lambda r: [*r[:-1], change_in(r[-1], LABEL, b"\x63")]),
    "no example": lambda p: rewrite(p, lambda r: [b"nothing", *r[1:]]),
}


@pytest.mark.parametrize("split", COUNTS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shard_is_named(damage, split, sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "cifar10")
    DAMAGE[damage](shard := next(tmp_path.glob(f"cifar10/*/cifar10-{split}.*-00001-of-00003")))
    assert f"{shard} cannot be used" in failure("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (r"(?s).*", "", ""),
        (r'"shardLengths": \[[^]]*\]', '"shardLengths": []', ""),
        ("array_record", "tfrecord", "its format, tfrecord, is read by TensorFlow alone"),
    ],
)
def test_metadata_that_cannot_be_used(old, new, reason, sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "cifar10")
    (info,) = tmp_path.glob("cifar10/*/dataset_info.json")
    info.write_text(re.sub(old, new, info.read_text(), count=1))
    message = failure("cifar10", tmp_path)
    assert message.startswith(f"{tmp_path}/cifar10")
    assert "cannot be used" in message and reason in message and "--data-dir" in message
    info.unlink()
    assert "dataset_info.json or features.json is missing" in failure("cifar10", tmp_path)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bars(progress, tmp_path, monkeypatch, capfd):
    fake_archives("cifar10", tmp_path / "downloads/manual")
    register(monkeypatch, "cifar10", tmp_path / "downloads/manual")
    load("cifar10", tmp_path, progress=progress)
    out, err = capfd.readouterr()
    assert out == "" and (progress or err == "")
    for stage in ("Dl Completed", "Generating train examples", "Reading cifar10, test"):
        assert (stage in err) == progress


@pytest.mark.parametrize(
    ("name", "count", "last_class"),
    [("mnist", 60_000, "9"), ("cifar10", 50_000, "truck")],
)
@pytest.mark.slow
def test_real_data(name, count, last_class, real_data):
    if not (real_data / name).exists():
        pytest.skip(f"no {name} on disk")
    dataset = load(name, real_data, progress=False)
    assert dataset.classes[-1] == last_class
    for split, total in {"train": count, "test": 10_000}.items():
        images, labels = getattr(dataset, split)
        assert images.shape == (total, *shape(name))
        assert np.bincount(labels).min() > 0.08 * total
        source = stock(name, split, real_data)
        for i in (0, 1, total // 3, total - 1):
            np.testing.assert_array_equal(images[i], source[i]["image"])
            assert labels[i] == source[i]["label"]
    for moment in ("mean", "std"):
        measured = getattr(dataset.train[0], moment)((0, 1, 2), dtype=np.float64)
        np.testing.assert_allclose(getattr(dataset, moment), measured, atol=1e-3)


def encoded(size, mode, kind):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "mode", "kind", "message"),
    [
        ((32, 32), "RGB", "BMP", "cannot identify"),
        ((31, 32), "RGB", "PNG", r"\(32, 31, 'RGB'\), and the data set's are \(32, 32, 'RGB'\)"),
        ((1024, 3), "L", "PNG", r"\(3, 1024, 'L'\)"),  # as many bytes
        ((32, 32), "L", "PNG", r"\(32, 32, 'L'\)"),
        ((32, 32), "RGBA", "PNG", r"\(32, 32, 'RGBA'\)"),
        ((12_000, 12_000), "1", "PNG", r"\(12000, 12000, '1'\)"),  # 20 KB that would take 144 MB
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_is_what_the_data_set_declares(size, mode, kind, message):
    with pytest.raises((ValueError, OSError), match=message):
        decoded(encoded(size, mode, kind), (32, 32, 3))
    assert decoded(encoded((32, 32), "RGB", "PNG"), (32, 32, 3)).shape == (32, 32, 3)
    assert decoded(encoded((28, 28), "L", "PNG"), (28, 28, 1)).shape == (28, 28, 1)
