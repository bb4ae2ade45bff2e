"""Small archives in the official layouts of the four data sets, full of random images."""

import gzip
import io
import tarfile

import numpy as np
import scipy.io
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

SOURCES = {"cifar10": "cifar10", "cifar100": "cifar100", "svhn": "svhn_cropped", "mnist": "mnist"}
COUNTS = {"train": 50, "test": 20}


def shape(name):
    return (28, 28, 1) if name == "mnist" else (32, 32, 3)


def fake_cifar(folder, splits, count):
    content = {}
    for split, (images, fine) in splits.items():
        labels = [fine] if count == 10 else [fine // 5, fine]
        content[split] = np.c_[*labels, images.transpose(0, 3, 1, 2).reshape(len(fine), -1)]
    names = "".join(f"class{i}\n" for i in range(count)) + "\n"
    if count == 10:
        files = {f"data_batch_{i + 1}.bin": content["train"][10 * i :][:10] for i in range(5)}
        files |= {"test_batch.bin": content["test"], "batches.meta.txt": names}
    else:
        files = {"train.bin": content["train"], "test.bin": content["test"]}
        coarse = "".join(f"coarse{i}\n" for i in range(20))
        files |= {"fine_label_names.txt": names, "coarse_label_names.txt": coarse}
    prefix = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}[count]
    with tarfile.open(folder / f"cifar-{count}-binary.tar.gz", "w:gz") as tar:
        for file, value in files.items():
            value = value.encode() if isinstance(value, str) else value.tobytes()
            member = tarfile.TarInfo(f"{prefix}/{file}")
            member.size = len(value)
            tar.addfile(member, io.BytesIO(value))


def fake_archives(name, folder):
    """Write random images in the official layout; return {split: (images, labels)}."""
    folder.mkdir(parents=True)
    rng, classes = np.random.default_rng(0), 100 if name == "cifar100" else 10
    splits = {}
    for split, count in COUNTS.items():
        images = rng.integers(0, 256, (count, *shape(name)), np.uint8)
        splits[split] = images, rng.permutation(np.arange(count, dtype=np.uint8) % classes)
    if name.startswith("cifar"):
        fake_cifar(folder, splits, classes)
    for split, (images, labels) in splits.items():
        if name == "svhn":
            y = np.where(labels, labels, 10)[:, None]
            content = {"X": images.transpose(1, 2, 3, 0), "y": y}
            scipy.io.savemat(folder / f"{split}_32x32.mat", content, do_compression=True)
        if name == "mnist":
            for kind, values in ("images-idx3", images[..., 0]), ("labels-idx1", labels):
                header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
                archive = f"{'train' if split == 'train' else 't10k'}-{kind}-ubyte.gz"
                (folder / archive).write_bytes(gzip.compress(header + values.tobytes()))
    return splits


def register(monkeypatch, name, folder, url=None):
    """Lets the official builder expect the archives in `folder`, at their own address or `url`."""
    official = tfds.builder_cls(SOURCES[name])
    infos = {}
    for address, info in official.url_infos.items():
        if (folder / info.filename).exists():
            here = f"{url}/{info.filename}" if url else address
            infos[here] = checksums.compute_url_info(folder / info.filename)
    monkeypatch.setattr(official, "url_infos", infos)
