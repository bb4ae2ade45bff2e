"""Distillation with your own model, teacher and data: fit()."""

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypedDict, TypeVar, Unpack, overload

import optax
from flax import linen as nn
from flax import nnx

from kd2m_jax.adapters import Model, Network, Tree
from kd2m_jax.training._body import Coef, TaskLoss, TrainState
from kd2m_jax.training._examples import Arrays
from kd2m_jax.training._labels import Unlabelled
from kd2m_jax.training._parallel import without_mesh
from kd2m_jax.training._plan import check_numbers, make_plan
from kd2m_jax.training._preprocess import Preprocess
from kd2m_jax.training._progress import shown
from kd2m_jax.training._records import Record
from kd2m_jax.training._scores import Score
from kd2m_jax.training._session import session
from kd2m_jax.training._students import AnyMetric, Students, Teacher

M = TypeVar("M")  # what comes back as a student
N = TypeVar("N", bound=nnx.Module)


class FitResult(NamedTuple, Generic[M]):
    """What `fit` returns; of a population, a list of these.

    Attributes:
      student: the trained student: an NNX module, in evaluation mode, for an NNX module, the dict
        of variables for a Linen one, without the projector of `projected`; the pair
        ``(params, state)`` for a `Network` of your own. The last epoch's.
      best: the same, of the epoch with the best test accuracy or, with a ``task_loss``, the lowest
        test loss (the last without ``eval_data``).
      history: the records that the callbacks got, oldest first.
      state: the final `TrainState`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from kd2m_jax import models
      >>> net = models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(0))
      >>> x, labels = jnp.ones((8, 4)), jnp.zeros(8, int)
      >>> result = fit(net, (x, labels), epochs=1, batch_size=8)
      >>> result.student(x).features.shape, result.history[-1]["step"]
      ((8, 8), 1)
    """

    student: M
    best: M
    history: list[Record]
    state: TrainState

    def __repr__(self) -> str:
        """Return one line, because the arrays would fill screens."""
        tests = [r["test_accuracy"] for r in self.history if "test_accuracy" in r]
        last = f", last test_accuracy {tests[-1]:.3f}" if tests else ""
        return f"FitResult({type(self.student).__name__}, {len(self.history)} records{last})"


class _Options(TypedDict, total=False):
    """The arguments of `fit` whose types do not decide what it returns."""

    teacher: Teacher
    teacher_variables: object
    transfer: object
    transfer_batch_size: int
    unlabelled: Unlabelled
    task_coef: Coef
    task_loss: TaskLoss | None
    optimizer: optax.GradientTransformation | None
    epochs: int
    batch_size: int
    per_class: int | None
    eval_data: Arrays | Iterable[Arrays] | None
    metrics: Sequence[Score]
    preprocess: Preprocess | None
    callbacks: Sequence[Callable[[Record], object]]
    log_every: int
    checkpoint_dir: str | os.PathLike | None
    save_every: float
    progress: bool | None
    seed: int
    max_steps: int | None
    devices: Sequence[object] | None


@overload
def fit(
    student: N,
    data: Arrays | Iterable[Arrays],
    *,
    metric: AnyMetric = None,
    coef: Coef | str = 1.0,
    **options: Unpack[_Options],
) -> FitResult[N]: ...
@overload
def fit(
    student: nn.Module,
    data: Arrays | Iterable[Arrays],
    *,
    metric: AnyMetric = None,
    coef: Coef | str = 1.0,
    **options: Unpack[_Options],
) -> FitResult[dict[str, Tree]]: ...
@overload
def fit(
    student: Network,
    data: Arrays | Iterable[Arrays],
    *,
    metric: AnyMetric = None,
    coef: Coef | str = 1.0,
    **options: Unpack[_Options],
) -> FitResult[Tree]: ...
@overload
def fit(
    student: Sequence[Model],
    data: Arrays | Iterable[Arrays],
    *,
    metric: AnyMetric | Sequence[AnyMetric] = None,
    coef: Coef | str | Sequence[Coef | str] = 1.0,
    **options: Unpack[_Options],
) -> list[FitResult[Tree]]: ...
@overload
def fit(
    student: Model,
    data: Arrays | Iterable[Arrays],
    *,
    metric: Sequence[AnyMetric],
    coef: Coef | str | Sequence[Coef | str] = 1.0,
    **options: Unpack[_Options],
) -> list[FitResult[Tree]]: ...
@overload
def fit(
    student: Model,
    data: Arrays | Iterable[Arrays],
    *,
    metric: AnyMetric = None,
    coef: Sequence[Coef | str],
    **options: Unpack[_Options],
) -> list[FitResult[Tree]]: ...
def fit(
    student: Model | Sequence[Model],
    data: Arrays | Iterable[Arrays],
    *,
    teacher: Teacher = None,
    teacher_variables: object = None,
    transfer: object = None,
    transfer_batch_size: int = 128,
    unlabelled: Unlabelled = None,
    metric: AnyMetric | Sequence[AnyMetric] = None,
    coef: Coef | str | Sequence[Coef | str] = 1.0,
    task_coef: Coef = 1.0,
    task_loss: TaskLoss | None = None,
    optimizer: optax.GradientTransformation | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    per_class: int | None = None,
    eval_data: Arrays | Iterable[Arrays] | None = None,
    metrics: Sequence[Score] = (),
    preprocess: Preprocess | None = None,
    callbacks: Sequence[Callable[[Record], object]] = (),
    log_every: int = 50,
    checkpoint_dir: str | os.PathLike | None = None,
    save_every: float = 60.0,
    progress: bool | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    devices: Sequence[object] | None = None,
) -> FitResult[Tree] | list[FitResult[Tree]]:
    """Train a student, or several in one program, alone or against a frozen teacher.

    Arrays live on the device for the whole run: they are shuffled there once an epoch, and each
    step gathers its batch and applies ``preprocess`` in the same program. The step runs under
    pmap over all devices. After ``jax.distributed.initialize`` these are the devices of all
    processes: each calls ``fit`` with the same arguments, computes its part of each batch and of
    the evaluation, and returns the same result; the first one alone reads and writes checkpoints.

    A population: where ``student``, ``metric`` or ``coef`` are lists, as many students as they are
    long (each with the one that is no list) see the same batches in one program, which computes
    the teacher once for all of them. Each ends as it would alone.

    The arguments, by what they are about: who is trained on what (``student``, ``data``,
    ``per_class``, ``batch_size``, ``epochs``, ``max_steps``, ``preprocess``), against whom
    (``teacher``, ``teacher_variables``, ``transfer``, ``transfer_batch_size``), what is minimised
    (``metric``, ``coef``, ``task_coef``, ``task_loss``, ``unlabelled``, ``optimizer``), what is
    seen of it (``eval_data``, ``metrics``, ``callbacks``, ``log_every``, ``progress``) and where
    it runs and is kept (``checkpoint_dir``, ``save_every``, ``seed``, ``devices``).

    Args:
      student: a Flax NNX module, a Flax Linen module or a `Network`; left as it is. Its call
        returns `Outputs` or ``(features, logits)``.
      data: ``(x, labels)`` arrays, or an iterable of such batches that can be iterated once an
        epoch. ``x`` is an array ``[n, ...]`` of any dtype or a pytree of such, as the network
        takes it; labels are ``[n]`` integers from 0 on, below the number of logits, and -1 for an
        example without a label, which the cross-entropy leaves out. Or they are ``[n, k]``
        floating, distributions over the classes (smoothed, say), or None for no labels at all. A
        dict of ``image`` (or ``x``) and ``label`` (or ``labels``, ``y``) is taken for the tuple,
        and may have the teacher's outputs under ``teacher``, as may a tuple in third place.
        Whatever NumPy reads is an array: torch's tensors, lists of numbers. An iterable is read
        ahead by another thread, up to three batches, and may use its buffers again; a grain
        MapDataset is shuffled anew each epoch, and one with a ``set_epoch(epoch)`` is told which
        comes. One that never ends is one endless epoch: give
        ``max_steps``. Without a ``len`` the default learning rate is constant, unless
        ``max_steps`` says where it ends.
      teacher: the frozen network; or its `Outputs` for the training arrays, row by row, computed
        before (`kd2m_jax.outputs` does that); or `ema_teacher`, the student's own average; or, of
        a teacher that is gone, a `Bank` of features or `ClassStatistics`, for metrics that need no
        pairs (statistics have no logits); or None. Outputs are those of the images as they are
        stored: with random augmentation the student sees others.
      teacher_variables: ``(params, state)`` of the teacher, or a Linen module's variables dict;
        an NNX module and a `Network` that was made with them bring their own.
      transfer: more inputs, without labels, for the distance alone: each step draws
        ``batch_size`` examples of the data for the cross-entropy and ``transfer_batch_size`` of
        these for the metric, which then sees no others, and passes both through the student
        together. The teacher sees the transfer rows alone. Arrays as ``x`` of the data, or
        ``(x, Outputs)`` with the teacher's outputs for them. An epoch is one of the data; the
        transfer set is shuffled anew whenever it has been seen.
      transfer_batch_size: global, over all devices.
      unlabelled: the class that a conditional metric takes for an example without a label:
        "teacher" (what the teacher predicts), "drop" (the example is left out), "own" (what the
        student predicts), "balanced" (the same after Sinkhorn balancing of the batch's unlabelled
        examples to equal shares of the classes) or ``("balanced", shares)``. None is "teacher"
        where the teacher has logits for the same images, else "balanced".
      metric: a name from ``losses.METRICS``, a `losses.Metric`, one of the losses
        (``losses.cw2``), or a function ``(student: Outputs, teacher: Outputs, labels) -> scalar``
        of your own, which gets ``key`` and ``labels_t`` if it names them; None for cross-entropy
        alone.
      coef: >= 0, lambda, a number or an optax schedule of the step; or "auto:RATIO", which keeps
        its part of the gradient at RATIO times the cross-entropy's (see `make_train_step`). That
        vanishes once a few labels are learnt, and lambda with it: beside a transfer set give a
        number. Without any label it is 1. With a right label for every image, distances between
        features want less than the default: 1e-3 or "auto:0.1" (docs/which_lambda.md).
      task_coef: >= 0, the weight of the cross-entropy.
      task_loss: ``(Outputs, labels) -> a scalar or [n]`` in place of the cross-entropy, for
        regression or several labels at once, say: labels are then whatever it takes, with one row
        per example (``[n]`` integers are classes to a conditional metric, others are none). There
        is no accuracy then, and ``test_loss`` is the mean of the loss of each example alone,
        which must be finite; a ``preprocess`` of three arguments prepares those labels too.
      optimizer: an optax optimizer; Adam with a cosine from 1e-3 to 0 by default.
      epochs: passes over the data.
      batch_size: global, over all devices; of arrays. An epoch drops the incomplete last batch.
      per_class: build batches of arrays from runs of so many examples of one class, so that a
        conditional metric has more than one to look at; it must divide the batch size. None
        shuffles freely. Examples that do not fill a run sit an epoch out; a class with fewer
        than that is refused.
      eval_data: what to evaluate on after each epoch: arrays or an iterable of batches that
        ends, as ``data``, with labels (-1 does not count).
      metrics: more scores of eval_data: "top-5", "ece" (expected calibration error, 15 bins),
        "agreement" (how often the student's class is the teacher's; of a network, or of eval_data
        that brings outputs), "accuracy" (beside a ``task_loss``), or functions ``(Outputs, labels)
        -> number`` of your own over all examples, NumPy arrays, which are kept for that. Each is
        ``test_NAME`` in the records.
      preprocess: ``(x, keys) -> x``, traced into the program: ``keys [n]`` is one PRNG key per
        example in training (augmentation), None in evaluation. Or ``(x, labels, keys) -> (x,
        labels)``, which may mix examples and make distributions of their labels (mixup, cutmix). A
        row of zeros is no label. It sees one device's part of the batch, and leaves the transfer
        set alone, while the first form is applied to that, too.
      callbacks: called with a copy of each record: a dict with ``step``, ``epoch``, ``steps``
        (total, None if unknown), ``loss``, ``task_loss`` (nats), ``train_accuracy`` (of examples
        with a label; left out where there are none), with a
        teacher ``distillation_loss`` and ``coef`` (means since the last record), at the end of an
        epoch with eval_data ``test_loss`` and ``test_accuracy`` (over all examples); of a
        population also with ``student``, its number from 0. The records of a resumed run are
        handed over again, first, with ``replayed: True``. One that returns "stop" ends the run
        with its result: at the end of an epoch there, within one after the call of the program
        that was under way. `EarlyStopping` does that. `WeightAverage` averages the weights.
      log_every: steps from one record to the next.
      checkpoint_dir: where to keep the last and the best checkpoint. A run that finds one there
        continues from it, in the middle of an epoch if need be, to the same result to the bit
        (CPU, same devices). Of an iterable it draws and discards the epoch's batches that are
        used already, and no earlier epoch's: that holds for one whose batches do not depend on how
        often it was iterated before (``set_epoch`` tells it the epoch). A run with another metric,
        option, weight, coef, teacher, optimizer, seed or other arrays is refused; ``eval_data``,
        ``preprocess`` and an iterable's batches are not compared. More ``epochs`` or
        ``max_steps`` continue it, with a line that says that the default learning rate follows
        their number; an optimizer of your own is the same only with the same schedule.
      save_every: seconds, >= 0. The run is saved after a call of the program when the last save
        is older than that, within an epoch too; 0 saves after every call. It is also saved at the
        end, on SIGTERM, on Ctrl-C, and when data or a callback raises. It decides no result.
      progress: whether to show a bar with throughput, losses, test accuracy and time left. None
        shows it in a terminal or a notebook.
      seed: from 0 to 2**32 - 1, decides initialisation (of Linen students, of a population's
        all alike: an NNX module brings its own), order, augmentation and dropout.
      max_steps: stop after so many steps, for smoke runs.
      devices: the devices to run on; all of them, of all processes, by default.

    Returns:
      A `FitResult`; where something is a list, a list of them.

    Raises:
      ValueError: lists of unequal lengths, epochs, batch_size or max_steps below 1, a negative
        save_every, a batch larger than the data or not divisible by the number of devices, data,
        batches or eval_data that are not what they should be (the message says which, and what
        is wrong), a class too small for per_class, arrays that the device cannot hold, a teacher
        without a metric or the reverse, neither labels nor a teacher, a transfer set without
        one, an unknown ``unlabelled``, a metric that a bank or statistics cannot serve, a score
        that is none or that lacks the teacher's outputs, two averages of the weights;
        CheckpointError, which is one, for a checkpoint of another
        network or another run, for a folder that cannot be written, is in use by another process
        or is the address of a bucket, and for a save that fails.
      TypeError: a model that is none of the three kinds, or returns no logits; labels that are not
        integers; an optimizer that is none of optax, a ``task_loss`` that is no function.
      NonFiniteLoss: the loss became NaN or infinite; names the step.
      Stopped: with a checkpoint folder, on SIGTERM: the step, or up to 20 short ones that are one
        call, is finished and saved first. A SystemExit of status 143, so a program that does not
        catch it ends there. Ctrl-C does the same and raises KeyboardInterrupt; a second one does
        not wait for the step.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from kd2m_jax import fit, models
      >>> x = jax.random.normal(jax.random.key(0), (64, 4))
      >>> labels = (x[:, 0] > 0).astype(int)
      >>> teacher = fit(models.MLP((32,), 2, in_features=4, rngs=nnx.Rngs(0)), (x, labels),
      ...               epochs=2, batch_size=32).student
      >>> result = fit(models.MLP((32,), 2, in_features=4, rngs=nnx.Rngs(1)), (x, labels),
      ...              teacher=teacher, metric="cw2", coef=0.1, epochs=2, batch_size=32)
      >>> result.history[-1]["step"], type(result.student).__name__
      (4, 'MLP')
    """
    check_numbers(
        epochs=epochs,
        batch_size=batch_size,
        log_every=log_every,
        max_steps=max_steps,
        per_class=per_class,
        save_every=save_every,
        seed=seed,
        transfer_batch_size=transfer_batch_size,
    )
    # NumPy's numbers are as good, but no JSON.
    epochs, batch_size, seed = int(epochs), int(batch_size), int(seed)
    per_class, max_steps = (None if n is None else int(n) for n in (per_class, max_steps))
    with without_mesh():
        students = Students.of(student, metric, coef)
        plan = make_plan(
            students,
            data,
            teacher=teacher,
            teacher_variables=teacher_variables,
            transfer=transfer,
            transfer_batch_size=int(transfer_batch_size),
            unlabelled=unlabelled,
            task_coef=task_coef,
            task_loss=task_loss,
            optimizer=optimizer,
            epochs=epochs,
            batch_size=batch_size,
            per_class=per_class,
            eval_data=eval_data,
            metrics=metrics,
            preprocess=preprocess,
            callbacks=callbacks,
            log_every=log_every,
            checkpoint_dir=checkpoint_dir,
            save_every=save_every,
            seed=seed,
            max_steps=max_steps,
            devices=devices,
        )
        with shown(plan, progress), session(plan) as run:
            while run.epoch < epochs and not run.stopped_short:
                whole = True
                with contextlib.closing(plan.batches.epoch(**run.place)) as calls:
                    for rows, arrays in calls:
                        whole = not run.stopped_short
                        if not whole:
                            break
                        run.run(rows, arrays)
                run.end_epoch(whole=whole)
    results = [
        FitResult(network.export(*last), network.export(*best), log.history, state)
        for network, last, best, log, state in zip(
            plan.networks, run.variables, run.best, plan.records, run.states, strict=True
        )
    ]
    return results if plan.is_population else results[0]
