"""The data layer: preparation, reading, and what it says when either fails."""

import concurrent.futures
import contextlib
import functools
import http.server
import os
import pathlib
import re
import shutil
import socket
import threading
import time
import types

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from archives import COUNTS, SOURCES, fake_archives, register, shape
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.download import downloader

from experiments.common.errors import DataError
from experiments.data import prepare
from experiments.data.load import load
from kd2m_jax.internal import locked


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


@pytest.fixture
def server(tmp_path):
    """Serve `tmp_path/"www"`; yield its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(ConnectionError):  # the first request is not read to its end
                super().do_GET()

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.05,)).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


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


def test_downloads(tmp_path, monkeypatch, server):
    splits = fake_archives("mnist", tmp_path / "www")
    register(monkeypatch, "mnist", tmp_path / "www", server)
    read = load("mnist", tmp_path / "data", progress=False).test
    assert as_set(*read) == as_set(*splits["test"])


def test_bad_downloads(tmp_path, monkeypatch, server):
    fake_archives("cifar10", tmp_path / "www")
    register(monkeypatch, "cifar10", tmp_path / "www", server)
    archive = tmp_path / "www/cifar-10-binary.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-100])
    for _ in range(2):  # what was downloaded is not taken for good the second time
        assert f"/{archive.name}, has wrong checksum" in failure("cifar10", tmp_path / "data")
    archive.unlink()  # an HTTP error, as from a proxy, is no reason to try for minutes
    assert "cannot be downloaded (HTTPError)" in failure("cifar10", tmp_path / "data")


@pytest.mark.parametrize("name", SOURCES)
def test_damaged_archive_is_named(name, tmp_path, monkeypatch):
    manual = tmp_path / "downloads/manual"
    fake_archives(name, manual)
    register(monkeypatch, name, manual)
    archive = min(manual.iterdir())
    os.truncate(archive, archive.stat().st_size // 2)
    assert f"{archive}, has wrong checksum" in failure(name, tmp_path)
    register(monkeypatch, name, manual)  # as if damaged later: tfds verifies a download once
    assert f"{archive} cannot be used" in failure(name, tmp_path)
    assert not list((tmp_path / SOURCES[name]).rglob("*.json"))


def test_killed_preparation_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    """Copies what is on disk while the second split is written: a kill leaves that."""
    manual, killed, original = tmp_path / "downloads/manual", tmp_path / "killed", prepare.Image
    splits = fake_archives("mnist", manual)
    register(monkeypatch, "mnist", manual)

    def fromarray(image):
        if not killed.exists() and list(tmp_path.glob("mnist/*/mnist-train*")):
            shutil.copytree(tmp_path / "mnist", killed / "mnist")
        return original.fromarray(image)

    monkeypatch.setattr(prepare, "Image", types.SimpleNamespace(fromarray=fromarray))
    load("mnist", tmp_path, progress=False)
    assert list(killed.rglob("mnist-train.array_record*"))
    assert "cannot be downloaded" in failure("mnist", killed)
    shutil.copytree(manual, killed / "downloads/manual")
    assert as_set(*load("mnist", killed, progress=False).train) == as_set(*splits["train"])


def test_one_prepares_while_another_waits(tmp_path, monkeypatch, capfd):
    """What is there once the other has finished is not prepared again: the archives are gone."""
    splits = fake_archives("mnist", tmp_path / "other/downloads/manual")
    register(monkeypatch, "mnist", tmp_path / "other/downloads/manual")
    load("mnist", tmp_path / "other", progress=False)
    shutil.rmtree(tmp_path / "other/downloads")
    capfd.readouterr()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with locked(tmp_path / "mnist/.lock"):
            loading, said = pool.submit(load, "mnist", tmp_path), ""
            end = time.monotonic() + 60
            while "is in use by another process" not in said:
                assert not loading.done() and time.monotonic() < end, said
                time.sleep(0.01)
                said += capfd.readouterr().err
            for version in (tmp_path / "other/mnist").glob("[0-9]*"):
                version.rename(tmp_path / "mnist" / version.name)
        assert as_set(*loading.result().train) == as_set(*splits["train"])


def test_offline_fails_fast_and_says_what_to_do(tmp_path, monkeypatch):
    manual = tmp_path / "downloads/manual"
    fake_archives("svhn", manual)
    register(monkeypatch, "svhn", manual)
    (manual / "test_32x32.mat").unlink()
    start = time.monotonic()
    message = failure("svhn", tmp_path)
    assert time.monotonic() - start < 30
    assert f"svhn_cropped is not in {tmp_path}" in message
    assert f"python -m experiments.svhn --data-dir={tmp_path} --max-steps=1\n" in message
    assert f"put test_32x32.mat into {manual}" in message
    assert "with --data-dir" in message and "python -m experiments.digits" in message


def test_a_network_that_swallows_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PATIENCE", 0.2)
    monkeypatch.setattr(requests, "get", lambda *_, **__: time.sleep(60))
    start = time.monotonic()
    assert "cannot be downloaded" in failure("mnist", tmp_path)
    assert time.monotonic() - start < 30


def test_no_download_is_left_trying(tmp_path, monkeypatch):
    """One failure is enough; those still in the queue must not keep Python from ending."""

    def refuse(*args, **kwargs):
        time.sleep(0.2)
        raise requests.ConnectionError

    tried = []
    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr(downloader, "_open_with_requests", lambda url, **kwargs: tried.append(url))
    configure(monkeypatch, override_max_simultaneous_downloads=1)
    assert "cannot be downloaded" in failure("mnist", tmp_path)
    queue = downloader.get_downloader(max_simultaneous_downloads=1)._executor
    queue.submit(lambda: None).result(timeout=30)  # behind the others
    assert tried == []


def test_a_download_that_breaks_off_is_not_tried_for_minutes():
    assert downloader.MAX_RETRIES == 1


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file, and cannot be written" in failure("mnist", tmp_path / "file")


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
    [("mnist", 60_000, "9"), pytest.param("cifar10", 50_000, "truck", marks=pytest.mark.slow)],
)
def test_real_data(name, count, last_class):
    shared = pathlib.Path(__file__).parents[2] / "../shared/data/tfds"
    root = pathlib.Path(os.environ.get("KD2M_DATA_DIR", shared))
    if not list((root / name).glob("*/dataset_info.json")):
        pytest.skip(f"no {name} on disk")
    dataset = load(name, root, progress=False)
    assert dataset.classes[-1] == last_class
    for split, total in {"train": count, "test": 10_000}.items():
        images, labels = getattr(dataset, split)
        assert images.shape == (total, *shape(name))
        assert np.bincount(labels).min() > 0.08 * total
        source = stock(name, split, root)
        for i in (0, 1, total // 3, total - 1):
            np.testing.assert_array_equal(images[i], source[i]["image"])
            assert labels[i] == source[i]["label"]
    for moment in ("mean", "std"):
        measured = getattr(dataset.train[0], moment)((0, 1, 2), dtype=np.float64)
        np.testing.assert_allclose(getattr(dataset, moment), measured, atol=1e-3)
