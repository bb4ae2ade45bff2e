"""Where `fit` takes its batches from."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd2m_jax._outputs import Outputs
from kd2m_jax.losses._checks import are_distributions
from kd2m_jax.training._body import Batch
from kd2m_jax.training._examples import (
    Arrays,
    as_arrays,
    check_classes,
    check_memory,
    check_rows,
    checked,
    dtype_of,
    examples,
    has_labels,
    stored_outputs,
)
from kd2m_jax.training._labels import are_class_numbers
from kd2m_jax.training._streams import are_arrays, first_batch, length, read_epoch

# What the transfer set's random numbers are folded with, beyond the number of any epoch or step.
OWN = 2**32 - 1


_TWO_SOURCES = (
    "data brings the teacher's outputs, and there are others or a transfer set: leave one out"
)


class Transfer(NamedTuple):
    """Inputs without labels on which student and teacher are compared, checked.

    Attributes:
      x: inputs, with one row per example.
      teacher: the teacher's outputs for them, computed before, or None.
      rows: how many there are.
      batch_size: how many a step sees, over all devices.
    """

    x: Any
    teacher: Outputs | None
    rows: int
    batch_size: int

    @classmethod
    def of(cls, given: Any, batch_size: int) -> "Transfer | None":
        """Check what `fit` was given; None for none."""
        if given is None:
            return None
        x, teacher = given, None
        if isinstance(given, tuple | list) and len(given) == 2:
            if not isinstance(given[1], Outputs | Mapping):
                raise ValueError(
                    "transfer is x, or (x, Outputs) with the teacher's outputs: it takes no labels"
                )
            x, teacher = given
        x, teacher = as_arrays("transfer", (x, teacher))
        check_memory("transfer", (x, teacher), jax.local_devices()[0])
        rows = check_rows("transfer", x)
        if batch_size > rows:
            raise ValueError(f"transfer_batch_size {batch_size} is larger than transfer ({rows})")
        if teacher is not None:
            teacher = stored_outputs("transfer", teacher, rows)
        return cls(x, teacher, rows, batch_size)

    def check_like(self, x: Any) -> None:
        """Raise ValueError unless the inputs are as those of the data: one batch has both."""
        own, others = (_rows_of(inputs) for inputs in (self.x, x))
        if own != others:
            raise ValueError(f"transfer: inputs must be as those of data, {others}, got {own}")


class Batches:
    """Arrays on the device in a fresh order an epoch, or somebody's iterable as it is.

    Attributes:
      classes: the number of classes that the networks tell apart; None until that is known.
      has_labels: whether any example has one, as far as that is known.
      all_labelled: whether it is known that all have a class number.
      has_outputs: whether the teacher's outputs come with the examples that are compared.
      sample: shapes of a batch.
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
        teacher: Outputs | None = None,
        transfer: Transfer | None = None,
        any_labels: bool = False,
    ):
        self._any_labels = any_labels  # whatever the caller's own task makes of them
        # Which of the devices are this process's, if not all.
        self._here = None if here is None or len(here) == devices else jnp.asarray(here)
        self._seed, self._devices, self._batch_size = seed, devices, batch_size
        self._per_class, self._place = per_class, place
        self._iterable = None
        self.classes: int | None = None
        self._transfer = transfer
        self._shuffled: tuple[int, Any] = (-1, None)
        if are_arrays(data):
            first = self._take_arrays(data, teacher)
        else:
            first = self._take_iterable(data, teacher)
            batch_size = len(first.labels)
        self.settings["transfer_batch_size"] = None if transfer is None else transfer.batch_size
        self.has_outputs = first.teacher is not None
        self.sample = Batch(*(_shapes(part, batch_size) for part in first))
        self._check_split(batch_size)
        if transfer is not None:
            self._check_split(transfer.batch_size)

    def _take_arrays(self, data: Any, teacher: Outputs | None) -> Batch:
        """Check arrays and put them onto the devices."""
        batch_size, per_class = self._batch_size, self._per_class
        check_memory("data", data, jax.local_devices()[0])
        all_of_it = examples("data", data, any_labels=self._any_labels)
        labels = all_of_it.labels
        if all_of_it.teacher is not None and (teacher is not None or self._transfer is not None):
            raise ValueError(_TWO_SOURCES)
        if teacher is not None:
            all_of_it = all_of_it._replace(teacher=stored_outputs("data", teacher, len(labels)))
        self.has_labels = self._any_labels or has_labels(labels)
        self.all_labelled = _all_numbered(labels)
        if batch_size > len(labels):
            raise ValueError(f"batch_size {batch_size} is larger than the data ({len(labels)})")
        if per_class is not None and not self.all_labelled:
            raise ValueError("per_class needs a class number for every example")
        self.steps_per_epoch = steps_per_epoch(labels, batch_size, per_class)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"per_class {per_class} leaves fewer than batch_size {batch_size} examples"
            )
        if self._transfer is not None:
            self._transfer.check_like(all_of_it.x)
            beside = {"transfer": self._transfer.x, "teacher": self._transfer.teacher}
            all_of_it = all_of_it._replace(**beside)
        self._arrays: Any = self._place(jax.tree.map(jnp.asarray, all_of_it))
        # What decides the order of the batches, beside the seed.
        self.settings: dict[str, Any] = {
            "batch_size": batch_size,
            "examples": len(labels),
            "per_class": per_class,
        }
        return all_of_it

    def _take_iterable(self, data: Any, teacher: Outputs | None) -> Batch:
        """Check an iterable and return its first batch."""
        if self._per_class is not None:
            raise ValueError("per_class orders arrays; an iterable brings its own batches")
        if teacher is not None:
            raise ValueError(
                "a teacher's outputs go with arrays: an iterable's batches bring their own, as "
                "(x, labels, outputs) or under 'teacher'"
            )
        self._iterable = data
        first, self._first = first_batch("data", data, any_labels=self._any_labels)
        self.steps_per_epoch = length(data)
        # What later batches have is not known.
        self.has_labels, self.all_labelled = self._any_labels or has_labels(first.labels), False
        self.settings = {"batches": self.steps_per_epoch}
        if first.teacher is not None and self._transfer is not None:
            raise ValueError(_TWO_SOURCES)
        if self._transfer is not None:
            self._transfer.check_like(first.x)
            beside = self._transfer.x, self._transfer.teacher
            self._placed = self._place(jax.tree.map(jnp.asarray, beside))
            first = first._replace(transfer=beside[0], teacher=beside[1])
        return first

    def expect(self, classes: int | None) -> None:
        """Raise ValueError, now or with a later batch, for labels that are none of the classes."""
        if self._any_labels or classes is None:
            return
        self.classes = classes
        if self._iterable is None and not are_distributions(self._arrays.labels):
            check_classes("data", self._arrays.labels, classes)
        elif self._iterable is None and self._arrays.labels.shape[1] != classes:
            raise ValueError(
                f"data: labels are distributions over {self._arrays.labels.shape[1]} classes, and "
                f"the student has {classes} logits"
            )

    @property
    def arrays(self) -> Any:
        """A `Batch` of all; None of an iterable."""
        return None if self._iterable is not None else self._arrays

    @property
    def stored(self) -> Any:
        """The teacher's outputs that were computed before, and the transfer set."""
        if self._iterable is None:
            return tuple(self._arrays[2:])
        return self._placed[::-1] if self._transfer is not None else None

    @property
    def in_memory(self) -> bool:
        """Whether these are arrays on the device."""
        return self._iterable is None

    def epoch(
        self,
        epoch: int,
        steps: int,
        skip: int = 0,
        done: int | None = None,
        most: int | None = None,
        waiting: Callable[[], None] = lambda: None,
    ):
        """Pairs of row numbers and the arrays they index.

        Row numbers are ``[steps, devices, n / devices]`` of the examples, and the same of the
        transfer set or None. The first ``skip`` steps of the epoch are passed over: a resumed run
        has done them. ``done`` is how many steps the run has done in all, which decides where in
        the transfer set it is; of an iterable no more than ``most`` batches are read, and
        ``waiting`` is called now and then while the next one is waited for.
        """
        done = skip if done is None else done
        if self._iterable is not None:
            yield from self._stream(epoch, skip, done, most, waiting)
            return
        order = self._order(epoch)
        total = len(order) // self._batch_size
        start = skip
        while start < total:
            stop = min((start // steps + 1) * steps, total)  # where calls end without a skip, too
            rows = order[start * self._batch_size : stop * self._batch_size]
            transfer = self._transfer_rows(done + start - skip, stop - start)
            yield (self._split(rows, stop - start), transfer), self._arrays
            start = stop

    def _stream(self, epoch: int, skip: int, done: int, most: int | None, waiting):
        """Give the batches of an iterable as `epoch` gives them."""
        read = read_epoch(
            "data", self._iterable, epoch, skip=skip, most=most, waiting=waiting, first=self._first
        )
        self._first = None
        with contextlib.closing(read):
            for number, (name, batch) in enumerate(read):
                own = checked(name, batch, self.classes, any_labels=self._any_labels)
                arrays = jax.tree.map(jnp.asarray, own)
                if self._transfer is not None:
                    x, teacher = self._placed
                    arrays = arrays._replace(transfer=x, teacher=teacher)
                elif (arrays.teacher is not None) != self.has_outputs:
                    raise ValueError(
                        f"{name}: some batches bring the teacher's outputs and others not"
                    )
                rows = self._split(jnp.arange(len(own.labels)), 1)
                yield (rows, self._transfer_rows(done + number, 1)), arrays

    def _transfer_rows(self, first: int, steps: int) -> jax.Array | None:
        """Return the transfer set's row numbers of these steps of the run; its epochs are its own.

        Step by step from one shuffle of it to the next, whatever the examples with labels do.
        """
        if self._transfer is None:
            return None
        size = self._transfer.batch_size
        per_epoch, rows = self._transfer.rows // size, []
        for step in range(first, first + steps):
            epoch, position = divmod(step, per_epoch)
            rows.append(self._transfer_order(epoch)[position * size : (position + 1) * size])
        return self._split(jnp.concatenate(rows), steps)

    def _transfer_order(self, epoch: int) -> jax.Array:
        if self._shuffled[0] != epoch:
            assert self._transfer is not None
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._seed), OWN), epoch)
            self._shuffled = epoch, jax.random.permutation(key, self._transfer.rows)
        return self._shuffled[1]

    def _order(self, epoch: int) -> jax.Array:
        """Return the epoch's row numbers: shuffled, or in runs of ``per_class`` of one class."""
        labels = self._arrays.labels
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
    if per_class is None:
        return len(labels) // batch_size
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    if (rare := counts < per_class).any():
        named = ", ".join(f"{c} ({n})" for c, n in zip(classes[rare], counts[rare], strict=True))
        raise ValueError(
            f"per_class {per_class} would never draw these classes, which have fewer examples: "
            f"{named[:200]}"
        )
    return int((counts - counts % per_class).sum()) // batch_size


def _all_numbered(labels: Any) -> bool:
    return are_class_numbers(labels) and bool((np.asarray(labels) >= 0).all())


def _rows_of(x: Any) -> str:
    """Say what a row of inputs is."""
    rows = jax.tree.map(lambda a: f"{dtype_of(a)}{list(np.shape(a)[1:])}", x)
    return str(rows)


def _shapes(part: Any, batch_size: int) -> Any:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((batch_size, *np.shape(a)[1:]), dtype_of(a)), part
    )


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
