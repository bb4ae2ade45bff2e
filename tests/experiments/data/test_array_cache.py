"""The cache of decoded arrays: when it is used, and when it must not be."""

import logging
import os
import pathlib

import numpy as np
import pytest
from archives import fake_archives, register

from experiments.data import array_cache
from experiments.data import load as loading
from experiments.data.array_cache import cached


class Data:
    """A folder of two files, and how often they were decoded."""

    def __init__(self, root):
        self.folder, self.decoded = root / "1.0.0", 0
        self.folder.mkdir(parents=True)
        self.write(b"first")
        (self.folder / "more").write_bytes(b"more")

    def write(self, content, at=0):
        (self.folder / "file").write_bytes(content)
        os.utime(self.folder / "file", ns=(at, at))

    def decode(self):
        self.decoded += 1
        content = np.frombuffer((self.folder / "file").read_bytes(), np.uint8)
        return [np.tile(content, 2_000).reshape(-1, 5, 1), np.arange(3, dtype=np.int32)]

    def read(self):
        """Return how many times this reading decoded; what it read must be right."""
        before, found = self.decoded, cached(self.folder, self.decode)
        decoded = self.decoded - before
        for array, expected in zip(found, self.decode(), strict=True):
            np.testing.assert_array_equal(array, expected, strict=True)
        return decoded

    @property
    def beside(self):
        return sorted(path.name for path in self.folder.parent.iterdir())


CACHE = ".1.0.0.arrays.npz"


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path / "mnist")


def test_decoded_once(data):
    assert [data.read(), data.read(), data.read()] == [1, 0, 0]
    assert data.beside == [CACHE, "1.0.0"]


def test_other_files_are_decoded_again(data):
    data.read()
    data.write(b"other", at=1)  # as long as before
    assert [data.read(), data.read()] == [1, 0]
    data.write(b"longer than before", at=1)
    assert [data.read(), data.read()] == [1, 0]
    (data.folder / "third").write_bytes(b"")
    assert [data.read(), data.read()] == [1, 0]
    (data.folder / "third").unlink()
    assert [data.read(), data.read()] == [1, 0]


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "one bit of an image": lambda p: flip(p, p.stat().st_size // 2),
    "one bit of the labels": lambda p: flip(p, p.read_bytes().rindex(b"\x02\0\0\0PK")),
    "one bit of the list of files": lambda p: flip(p, p.stat().st_size - 20),
    "truncated": lambda p: os.truncate(p, p.stat().st_size // 2),
    "empty": lambda p: os.truncate(p, 0),
    "no zip": lambda p: p.write_bytes(b"nothing of the kind"),
    "an array alone": lambda p: np.save(p.open("wb"), np.arange(3)),
    "pickled": lambda p: np.savez(p, files=np.array([{}], object)),
}


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_noticed_and_made_again(damage, data, caplog):
    data.read()
    whole = (data.folder.parent / CACHE).read_bytes()
    DAMAGE[damage](data.folder.parent / CACHE)
    with caplog.at_level(logging.WARNING):
        assert [data.read(), data.read()] == [1, 0]
    (record,) = caplog.records
    assert f"{CACHE} cannot be used (" in record.getMessage()
    assert (data.folder.parent / CACHE).read_bytes() == whole


def test_a_read_only_folder_is_left_alone(data):
    data.folder.parent.chmod(0o555)
    try:
        assert [data.read(), data.read()] == [1, 1]
        assert data.beside == ["1.0.0"]
    finally:
        data.folder.parent.chmod(0o755)


def test_a_full_disk_leaves_nothing_behind(data, monkeypatch):
    def write_a_part(file, **arrays):
        file.write(b"PK")
        raise OSError("No space left on device")

    monkeypatch.setattr(array_cache.np, "savez", write_a_part)
    assert [data.read(), data.read()] == [1, 1]
    assert data.beside == ["1.0.0"]


def test_files_that_change_while_they_are_decoded_are_not_kept(data):
    def decode():
        data.write(b"newer", at=1)
        return [np.zeros(1)]

    cached(data.folder, decode)
    assert data.beside == ["1.0.0"]


def test_a_data_set_is_decoded_at_its_first_load_alone(tmp_path, monkeypatch):
    fake_archives("cifar100", tmp_path / "downloads/manual")
    register(monkeypatch, "cifar100", tmp_path / "downloads/manual")
    first = loading.load("cifar100", tmp_path, progress=False)
    monkeypatch.setattr(loading, "_decode", None)
    second = loading.load("cifar100", tmp_path, progress=False)
    assert second.classes == first.classes
    for split in ("train", "test"):
        for one, other in zip(getattr(first, split), getattr(second, split), strict=True):
            np.testing.assert_array_equal(one, other, strict=True)


@pytest.fixture
def beside_programs(tmp_path, monkeypatch):
    """Let compiled programs be kept in a folder that is not there yet."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "a" / "programs"))
    return tmp_path / "a" / "programs" / "digits.npz"


def test_digits_are_split_at_the_first_load_alone(beside_programs, monkeypatch):
    first = loading.load("digits")
    split = loading._split_digits
    monkeypatch.setattr(loading, "_split_digits", None)  # nor is scikit-learn imported
    second = loading.load("digits")
    assert second.classes == first.classes
    for part in ("train", "test"):
        for one, other in zip(getattr(first, part), getattr(second, part), strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
    # Another version of scikit-learn may split otherwise.
    versions = loading.importlib.metadata
    monkeypatch.setattr(versions, "version", lambda name: "0.1")
    monkeypatch.setattr(loading, "_split_digits", lambda: [a[:5] for a in split()])
    assert len(loading.load("digits").train[0]) == 5


@pytest.mark.parametrize("where", ["", "gs://bucket/programs", "/proc/none", "closed"])
def test_digits_where_nothing_can_be_kept(where, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stat = pathlib.Path.stat

    def closed(path, **options):  # as if: for root no folder is
        if str(path) == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    if where == "closed":
        monkeypatch.setattr(pathlib.Path, "stat", closed)
        monkeypatch.setattr(loading.os, "makedirs", lambda *_, **options: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", where)
    assert len(loading.load("digits").train[0]) == 1347
    assert list(tmp_path.iterdir()) == []


def test_digits_are_not_kept_where_programs_are_not(beside_programs, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    loading.load("digits")
    assert not beside_programs.exists()
