"""A data set of one's own: a folder of pictures per class."""

import collections
import dataclasses
import os
from typing import Any

import numpy as np

from ..common.errors import DataError, UsageError
from .pictures import Pictures, Seen, look
from .specs import Dataset, sha256

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_KINDS = ", ".join(suffix[1:] for suffix in SUFFIXES)
_NAMED = 5  # of the files that cannot be read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folders:
    """Which pictures, and what becomes of them.

    Attributes:
      train: the folder with a folder per class; None where ``dataset`` is given.
      test: likewise; None: a part of ``train``.
      size: height and width that they are brought to.
      val_fraction: the part of each class that is tested on, where there is no ``test``.
      labels_per_class: how many keep their label; the rest become the transfer set. None: all.
      skip_unreadable: leave out what cannot be read.
      seed: decides which part is tested on and which labels are kept.
      dataset: "hf:NAME", a data set of Hugging Face instead of folders.
    """

    train: str | None = None
    test: str | None = None
    size: int = 64
    val_fraction: float = 0.2
    labels_per_class: int | None = None
    skip_unreadable: bool = False
    seed: int = 0
    dataset: str | None = None


def load_folders(folders: Folders, *, progress: bool = True) -> Dataset:
    """Read a data set of one's own; in memory where it fits, else a file at a time.

    Raises:
      UsageError: a folder that is none or holds none, classes that do not fit together, too few
        pictures.
      DataError: pictures that cannot be read.
    """
    classes, pictures, labels, is_test = _found(folders)
    keep = np.prod(pictures.shape) <= memory_for_pictures()
    if not keep and folders.labels_per_class is not None:
        raise UsageError(
            f"--labels-per-class keeps the pictures in memory, and these take "
            f"{np.prod(pictures.shape) / 2**30:.1f} GiB at --size={folders.size}"
        )
    seen = look(pictures, keep=bool(keep), title="Reading pictures", progress=progress)
    readable = _check_readable(pictures, seen, skip=folders.skip_unreadable)
    rng = np.random.default_rng(folders.seed)
    if not is_test.any():
        is_test = _part(rng, labels, readable, classes, folders.val_fraction)
    train, test = np.flatnonzero(readable & ~is_test), np.flatnonzero(readable & is_test)
    if not len(test):
        raise UsageError("no picture to test on is left")
    _check_classes(labels[train], classes)
    labelled, transfer = train, None
    if folders.labels_per_class is not None:
        labelled, transfer = _with_labels(rng, train, labels, classes, folders.labels_per_class)
    unlabelled = "" if transfer is None else f"{len(transfer):,} without a label, "
    print(
        f"{len(classes)} classes: {len(labelled):,} pictures to train on, {unlabelled}"
        f"{len(test):,} to test on"
    )
    images = pictures.only if seen.images is None else seen.images.__getitem__
    first, second = seen.sums[train].mean(0)
    mean = np.round(first, 3).tolist()
    std = np.round(np.sqrt(np.maximum(second - first**2, 1.0)), 3).tolist()  # of one colour: not 0
    return Dataset(
        name="images",
        classes=classes,
        train=(images(labelled), labels[labelled]),
        test=(images(test), labels[test]),
        mean=tuple(mean),
        std=tuple(std),
        crop_padding=folders.size // 8,
        flip=True,
        transfer=None if transfer is None else images(transfer),
        digest=_digest(seen, labels, [labelled, test, [] if transfer is None else transfer]),
        origin=dataclasses.asdict(folders) | {"classes": list(classes), "mean": mean, "std": std},
    )


def _found(folders: Folders) -> tuple[tuple[str, ...], Pictures, np.ndarray, np.ndarray]:
    """Return the classes, all pictures unread, their labels, and which are there to test on."""
    if folders.dataset is not None:
        from .hub import hub_pictures

        return hub_pictures(folders.dataset.removeprefix("hf:"), folders.size)
    classes, paths, labels = listed("--train", folders.train or "")
    test_paths, test_labels = [], []
    if folders.test is not None:
        _, test_paths, test_labels = listed("--test", folders.test, classes)
    labels = np.array([*labels, *test_labels], np.int32)
    pictures = Pictures([*paths, *test_paths], folders.size)
    return classes, pictures, labels, np.arange(len(labels)) >= len(paths)


def listed(
    flag: str, folder: str, classes: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Return the classes, and the pictures with their class, in the order of their names."""
    try:
        inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UsageError(f"{flag}={folder} cannot be read: {error.strerror}") from error
    inside = [name for name in inside if not name.startswith(".")]
    others: collections.Counter[str] = collections.Counter()
    found = {name: _pictures_in(os.path.join(folder, name), others) for name in inside}
    empty = [name for name, paths in found.items() if not paths]
    found = {name: paths for name, paths in found.items() if paths}
    if len(found) < 2 and classes is None:
        loose = any(name.lower().endswith(SUFFIXES) for name in os.listdir(folder))
        count = f"pictures in only one folder, {next(iter(found))}" if found else "no pictures"
        why = "pictures, but not in folders" if loose and not found else count
        if others and not found:
            why += f", but {_counted(others)}"
        raise UsageError(
            f"{flag}={folder} holds {why}: it takes a folder per class, of two classes or more, "
            f"with {_KINDS} files in it"
        )
    if {name.lower() for name in found} <= {"train", "test", "val", "valid", "validation"}:
        raise UsageError(
            f"{flag}={folder} holds {' and '.join(found)}, which are no classes: "
            f"--train={os.path.join(folder, 'train')} --test={os.path.join(folder, 'test')}"
        )
    if not found:
        raise UsageError(f"{flag}={folder} holds no folders of pictures")
    if others:
        print(f"{flag}={folder}: left out {_counted(others)}: it takes {_KINDS}")
    if empty:
        print(f"{flag}={folder}: no picture in {', '.join(empty[:_NAMED])}: no class")
    classes = classes or tuple(found)
    if unknown := [name for name in found if name not in classes]:
        raise UsageError(
            f"{flag}={folder} has classes that --train has not: {', '.join(unknown[:_NAMED])}"
        )
    paths = [path for name in found for path in found[name]]
    labels = [classes.index(name) for name in found for _ in found[name]]
    return classes, paths, labels


def _pictures_in(folder: str, others: collections.Counter[str]) -> list[str]:
    """Return the picture files in a folder and below it; count the others by their endings."""
    paths, seen = [], set()
    for above, below, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(above)) in seen:  # a link back: without end
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            if name.lower().endswith(SUFFIXES):
                paths.append(os.path.join(above, name))
            else:
                others[os.path.splitext(name)[1].lower() or "no ending"] += 1
    return paths


def _counted(others: collections.Counter[str]) -> str:
    """Say how many files of which other kinds there are."""
    kinds = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(_NAMED))
    total = others.total()
    return f"{total:,} file{'s' * (total > 1)} of other kinds ({kinds})"


def _check_readable(pictures: Pictures, seen: Seen, *, skip: bool) -> np.ndarray:
    """Return which can be read; DataError where some cannot and are not to be skipped."""
    readable = np.ones(len(pictures), bool)
    readable[list(seen.errors)] = False
    if not seen.errors:
        return readable
    count, total = len(seen.errors), len(pictures)
    named = [f"  {pictures.paths[i]} ({seen.errors[i][:120]})" for i in list(seen.errors)[:_NAMED]]
    if count > _NAMED:
        named.append(f"  and {count - _NAMED} more")
    what = f"{count} of {total:,} pictures cannot be read"
    if not skip:
        raise DataError("\n".join([f"{what}:", *named, "Remove them, or give --skip-unreadable."]))
    print("\n".join([f"{what} and left out:", *named]))
    return readable


def _part(rng, labels: np.ndarray, readable: np.ndarray, classes, fraction: float) -> np.ndarray:
    """Choose a part of each class to test on: one at least, and one at least is left."""
    chosen = np.zeros(len(labels), bool)
    for number, name in enumerate(classes):
        rows = np.flatnonzero(readable & (labels == number))
        if len(rows) < 2:
            raise UsageError(
                f"class {name} has only {len(rows)} picture: to train on one and test on another "
                "it takes two, or a folder --test"
            )
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        chosen[rng.permutation(rows)[:count]] = True
    return chosen


def _check_classes(labels: np.ndarray, classes) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    if (counts == 0).any():
        missing = ", ".join(name for name, n in zip(classes, counts, strict=True) if not n)
        raise UsageError(f"no picture to train on is left of class {missing}")


def _with_labels(rng, train: np.ndarray, labels: np.ndarray, classes, count: int) -> Any:
    """Return the rows that keep their labels, and the others."""
    kept = []
    for number, name in enumerate(classes):
        rows = train[labels[train] == number]
        if len(rows) < count:
            raise UsageError(
                f"--labels-per-class={count}: class {name} has {len(rows)} to train on"
            )
        kept.append(rng.permutation(rows)[:count])
    labelled = np.sort(np.concatenate(kept))
    transfer = np.setdiff1d(train, labelled)
    if not len(transfer):
        raise UsageError(f"--labels-per-class={count} leaves no picture without a label")
    return labelled, transfer


def _digest(seen: Seen, labels: np.ndarray, parts: list[Any]) -> str:
    """Hash all pictures and the labels that are used, in the order in which they are."""
    *known, unlabelled = [list(part) for part in parts]
    images = ["".join(seen.digests[i] for i in part) for part in (*known, unlabelled)]
    numbers = [labels[part].tobytes() for part in known]
    return sha256(*(text.encode() for text in images), *numbers)


def memory_for_pictures() -> int:
    """Return how many bytes of pictures are kept in memory: a quarter of the least there is."""
    import jax

    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    known = [limit for limit in limits if limit]
    return min(known) // 4 if known else 2**30
