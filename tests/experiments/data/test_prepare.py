"""Preparing data sets: downloads, damaged archives, interruptions."""

import concurrent.futures
import contextlib
import functools
import http.server
import os
import shutil
import socket
import threading
import time
import types

import pytest
import requests
import tensorflow_datasets as tfds
from archives import SOURCES, fake_archives, register
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
