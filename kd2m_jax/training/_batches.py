"""Where `fit` takes its batches from."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd2m_jax.training._examples import (
    Arrays,
    check_classes,
    check_memory,
    dtype_of,
    examples,
    on_device,
)


class Batches:
    """Arrays on the device in a fresh order an epoch, or somebody's iterable as it is.

    Attributes:
      classes: the number of classes that the networks tell apart; None until that is known.
    """

    def __init__(
        self,
        data: Arrays | Iterable[Arrays],
        batch_size: int,
        seed: int,
        devices: int,
        per_class: int | None = None,
        place: Callable[[Any], Any] = lambda tree: tree,
        here: list[int] | None = None,
    ):
        # Which of the devices are this process's, if not all.
        self._here = None if here is None or len(here) == devices else jnp.asarray(here)
        self._seed, self._devices, self._batch_size = seed, devices, batch_size
        self._per_class = per_class
        self._iterable = None
        self.classes: int | None = None
        if _are_arrays(data):
            check_memory("data", data, jax.local_devices()[0])
            x, labels = examples("data", data)
            if batch_size > len(labels):
                raise ValueError(f"batch_size {batch_size} is larger than the data ({len(labels)})")
            self.steps_per_epoch = steps_per_epoch(labels, batch_size, per_class)
            if self.steps_per_epoch == 0:
                raise ValueError(
                    f"per_class {per_class} leaves fewer than batch_size {batch_size} examples"
                )
            self._arrays = place(jax.tree.map(jnp.asarray, (x, labels)))
            # What decides the order of the batches, beside the seed.
            self.settings = {
                "batch_size": batch_size,
                "examples": len(labels),
                "per_class": per_class,
            }
        else:
            if hasattr(data, "shape"):
                raise ValueError(
                    "data must be (x, labels) or an iterable of such batches, got one array"
                )
            self._iterable = data
            if per_class is not None:
                raise ValueError("per_class orders arrays; an iterable brings its own batches")
            self.steps_per_epoch = len(data) if isinstance(data, Sized) else None
            x, labels = _first_batch(data)
            batch_size = len(labels)
            self.settings = {"batches": self.steps_per_epoch}
        self.sample = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((batch_size, *np.shape(a)[1:]), dtype_of(a)), x
        )
        self._check_split(batch_size)

    def expect(self, classes: int) -> None:
        """Raise ValueError, now or with a later batch, for labels that are none of the classes."""
        self.classes = classes
        if self._iterable is None:
            check_classes("data", self._arrays[1], classes)

    @property
    def arrays(self) -> Any:
        """The arrays ``(x, labels)``; None of an iterable."""
        return None if self._iterable is not None else self._arrays

    @property
    def in_memory(self) -> bool:
        """Whether these are arrays on the device."""
        return self._iterable is None

    def epoch(self, epoch: int, steps: int, skip: int = 0):
        """Pairs of row numbers ``[steps, devices, n / devices]`` and the arrays they index.

        The first ``skip`` steps of the epoch are passed over: a resumed run has done them.
        """
        if self._iterable is not None:
            empty = skip == 0
            drawn = itertools.islice(iter(self._iterable), skip, None)
            for number, batch in enumerate(drawn, skip + 1):
                empty = False
                x, labels = examples(f"batch {number}", batch, self.classes)
                arrays = jax.tree.map(on_device, (x, labels))
                yield self._split(jnp.arange(len(labels)), 1), arrays
            if empty:
                raise ValueError(
                    f"data gave no batch in epoch {epoch + 1}: can it be iterated again?"
                )
            return
        order = self._order(epoch)
        total = len(order) // self._batch_size
        start = skip
        while start < total:
            stop = min((start // steps + 1) * steps, total)  # where calls end without a skip, too
            rows = order[start * self._batch_size : stop * self._batch_size]
            yield self._split(rows, stop - start), self._arrays
            start = stop

    def _order(self, epoch: int) -> jax.Array:
        """Return the epoch's row numbers: shuffled, or in runs of ``per_class`` of one class."""
        labels = self._arrays[1]
        if self._per_class is None:
            key = jax.random.fold_in(jax.random.key(self._seed), epoch)
            return jax.random.permutation(key, len(labels))
        # Cut each class, shuffled, into runs of that length and shuffle the runs.
        rng = np.random.default_rng((self._seed, epoch))
        shuffled = rng.permutation(len(labels))
        by_class = [shuffled[np.asarray(labels)[shuffled] == c] for c in np.unique(labels)]
        runs = [
            rows[: len(rows) // self._per_class * self._per_class].reshape(-1, self._per_class)
            for rows in by_class
        ]
        return jnp.asarray(rng.permutation(np.concatenate(runs)).reshape(-1))

    def _split(self, rows: jax.Array, steps: int) -> jax.Array:
        self._check_split(len(rows) // steps)
        rows = rows.reshape(steps, self._devices, -1)
        return rows if self._here is None else rows[:, self._here]

    def _check_split(self, size: int) -> None:
        if size % self._devices:
            raise ValueError(
                f"a batch of {size} does not split evenly over {self._devices} devices"
            )


def steps_per_epoch(labels, batch_size: int, per_class: int | None) -> int:
    """How many whole batches an epoch of arrays has, with ``per_class`` of whole runs.

    ValueError for a class of which there is no whole run: it would never be drawn.
    """
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    size = per_class or 1
    if per_class and (rare := counts < per_class).any():
        named = ", ".join(f"{c} ({n})" for c, n in zip(classes[rare], counts[rare], strict=True))
        raise ValueError(
            f"per_class {per_class} would never draw these classes, which have fewer examples: "
            f"{named[:200]}"
        )
    return int((counts - counts % size).sum()) // batch_size


def _are_arrays(data: Any) -> bool:
    """Tell arrays from an iterable of batches: a pair or a dict with an array in it."""
    if isinstance(data, Mapping):
        return True
    pair = isinstance(data, tuple) and len(data) == 2
    return pair and any(hasattr(part, "shape") for part in data)


def _first_batch(data: Any) -> tuple[Any, Any]:
    """Return the first batch; ValueError where it is not ``(x, labels)``."""
    first = next(iter(data), None)
    if first is None:
        raise ValueError("data gave no batch")
    if iter(data) is data:
        raise ValueError(
            "data is a generator, which can be read only once: pass something that can "
            "be iterated anew each epoch (a list of batches, a grain loader), or arrays"
        )
    if isinstance(data, list) and len(data) == 2 and hasattr(first, "shape"):
        raise ValueError("data is a list of two arrays: pass them as a tuple (x, labels)")
    return examples("batch 1", first)


def steps_per_call(device, batches: Batches, log_every: int, alone: Callable[[], bool]) -> int:
    """How many steps one call of the program makes.

    On an accelerator enough to hide its dispatch: a divisor of the epoch, so that one program
    does, or where there is none 20 and a shorter last call. On the CPU a divisor of ``log_every``,
    so that records are those of single steps: 0.87 of their CPU time for the MNIST pair. But one
    where they are better made ``alone`` (`_plan`).
    """
    steps = batches.steps_per_epoch
    if not batches.in_memory or steps is None:
        return 1
    if device.platform != "cpu":
        return max((k for k in range(10, 21) if steps % k == 0), default=min(steps, 20))
    most = min(steps, max(k for k in range(1, 21) if log_every % k == 0))
    return 1 if most == 1 or alone() else most
