"""Distillation with your own model, teacher and data: fit()."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd2m_jax._batches import Arrays, Batches, steps_per_call
from kd2m_jax._evaluation import evaluators
from kd2m_jax._locks import CheckpointError as CheckpointError
from kd2m_jax._locks import Stopped as Stopped
from kd2m_jax._locks import locked, stop_requests
from kd2m_jax._log import Log
from kd2m_jax._log import NonFiniteLoss as NonFiniteLoss
from kd2m_jax._processes import asked_to_stop, held_by_first
from kd2m_jax.losses import Metric, MetricSum
from kd2m_jax.networks import DEVICES, Model, as_network, from_nnx
from kd2m_jax.step import Coef, TrainState, init_state, step_body

AnyMetric = Metric | MetricSum | str | None

# (x, keys) -> x: what happens to inputs inside the program; keys is None in evaluation.
Preprocess = Callable[[jax.Array, jax.Array | None], jax.Array]


class FitResult(NamedTuple):
    """What `fit` returns; of a population, a list of these.

    Attributes:
      student: the trained student: an NNX module, in evaluation mode, for an NNX module, the dict
        of variables for a Linen one, without the projector of `projected`; the pair
        ``(params, state)`` for a `Network` of your own. The last epoch's.
      best: the same, of the epoch with the best test accuracy (the last without ``eval_data``).
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

    student: Any
    best: Any
    history: list[dict]
    state: TrainState

    def __repr__(self) -> str:
        """A line: the arrays would fill screens."""
        tests = [r["test_accuracy"] for r in self.history if "test_accuracy" in r]
        last = f", last test_accuracy {tests[-1]:.3f}" if tests else ""
        return f"FitResult({type(self.student).__name__}, {len(self.history)} records{last})"


def fit(
    student: Model | list[Model],
    data: Arrays | Iterable[Arrays],
    *,
    teacher: Model | None = None,
    teacher_variables: Any = None,
    metric: AnyMetric | list[AnyMetric] = None,
    coef: Coef | str | list[Coef | str] = 1.0,
    task_coef: Coef = 1.0,
    optimizer: optax.GradientTransformation | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    per_class: int | None = None,
    eval_data: Arrays | None = None,
    preprocess: Preprocess | None = None,
    callbacks: Sequence[Callable[[dict], None]] = (),
    log_every: int = 50,
    checkpoint_dir: str | os.PathLike | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Any:
    """Train a student, or several in one program, alone or against a frozen teacher.

    Arrays live on the device for the whole run: they are shuffled there once an epoch, and each
    step gathers its batch and applies ``preprocess`` in the same program. The step runs under
    pmap over all devices. After ``jax.distributed.initialize`` these are the devices of all
    processes: each calls ``fit`` with the same arguments, computes its part of each batch and of
    the evaluation, and returns the same result; the first one alone reads and writes checkpoints.

    A population: where ``student``, ``metric`` or ``coef`` are lists, as many students as they are
    long (each with the one that is no list) see the same batches in one program, which computes
    the teacher once for all of them. Each ends as it would alone.

    Args:
      student: a Flax NNX module, a Flax Linen module or a `Network`; left as it is. Its call
        returns `Outputs` or ``(features, logits)``.
      data: ``(x, labels)`` arrays (``x [n, ...]`` of any dtype, labels ``[n]`` integers), or an
        iterable of such batches that can be iterated once an epoch. One that never ends is one
        endless epoch: give ``max_steps``. Without a ``len`` the default learning rate is constant,
        unless ``max_steps`` says where it ends.
      teacher: the frozen network, or None.
      teacher_variables: ``(params, state)`` of the teacher, or a Linen module's variables dict;
        an NNX module brings its own.
      metric: a name from ``losses.METRICS`` or a `losses.Metric`; None for cross-entropy alone.
      coef: >= 0, lambda, a number or an optax schedule of the step; or "auto:RATIO", which keeps
        its part of the gradient at RATIO times the cross-entropy's (see `make_train_step`).
      task_coef: >= 0, the weight of the cross-entropy.
      optimizer: an optax optimizer; Adam with a cosine from 1e-3 to 0 by default.
      epochs: passes over the data.
      batch_size: global, over all devices; of arrays. An epoch drops the incomplete last batch.
      per_class: build batches of arrays from runs of so many examples of one class, so that a
        conditional metric has more than one to look at; it must divide the batch size. None
        shuffles freely. Examples that do not fill a run sit an epoch out.
      eval_data: ``(x, labels)`` arrays to evaluate on after each epoch.
      preprocess: ``(x, keys) -> x``, traced into the program: ``keys [n]`` is one PRNG key an
        example in training (augmentation), None in evaluation.
      callbacks: called with each record: a dict with ``step``, ``epoch``, ``steps`` (total, None
        if unknown), ``loss``, ``task_loss`` (nats), ``train_accuracy``, with a teacher
        ``distillation_loss`` and ``coef`` (means since the last record), and at the end of an
        epoch with eval_data ``test_loss`` and ``test_accuracy`` (over all examples); of a
        population also with ``student``, its number from 0. The records of a resumed run are
        handed over again, first, with ``replayed: True``.
      log_every: steps from one record to the next.
      checkpoint_dir: where to keep the last and the best checkpoint, written after each epoch and
        on SIGTERM; a run that finds one there continues from it, in the middle of an epoch if
        need be, to the same result to the bit (CPU, same devices).
      seed: decides initialisation (of Linen students, of a population's all alike: an NNX module
        brings its own), order, augmentation and dropout.
      max_steps: stop after so many steps, for smoke runs.
      devices: the devices to run on; all of them, of all processes, by default.

    Returns:
      A `FitResult`; where something is a list, a list of them.

    Raises:
      ValueError: lists of unequal lengths, epochs or batch_size below 1, a batch larger than the
        data or not divisible by the number of devices, labels of arrays below 0, data that is one
        array, a teacher without a metric or the reverse;
        CheckpointError, which is one, for a checkpoint of another network or made with another
        seed, batch size, number of examples, metric or coef, and for a folder that cannot be
        written or is in use by another process.
      TypeError: a model that is none of the three kinds.
      NonFiniteLoss: the loss became NaN or infinite; names the step.
      Stopped: with a checkpoint folder, on SIGTERM: the step is finished and saved first. A
        SystemExit of status 143, so a program that does not catch it ends there.

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
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("log_every", log_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if per_class is not None and (per_class < 1 or batch_size % per_class):
        raise ValueError(f"per_class must divide batch_size {batch_size}, got {per_class}")
    (students, metrics_of, coefs), alone = _population(student, metric, coef)
    without = {metric is None or metric == "none" for metric in metrics_of}
    if len(without) > 1:
        raise ValueError(
            "metric none among others: the students of a population all have the teacher, or none "
            "has; coef 0 leaves a metric without effect"
        )
    if without != {teacher is None}:
        missing = "metric" if teacher is not None else "teacher"
        raise ValueError(
            f"a teacher and a metric to compare with it come together, and {missing} is missing"
        )
    devices = list(devices or jax.devices())
    here = [i for i, d in enumerate(devices) if d.process_index == jax.process_index()]
    preprocess = preprocess or (lambda x, keys: x)
    # Everything on every device once, rather than at each call; of this process's, for that is
    # what pmap takes.
    mesh = Mesh(np.array(devices)[here], (DEVICES,))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(tree):
        return jax.device_put(tree, everywhere)

    networks = [as_network(student) for student in students]
    if teacher is not None:
        teacher_variables = place(variables_of(teacher, teacher_variables))
    batches = Batches(data, batch_size, seed, len(devices), per_class, place, here)
    settings = _settings(batches, seed, metrics_of, coefs)
    total = _total_steps(batches, epochs, max_steps)
    if optimizer is None:
        schedule = optax.cosine_decay_schedule(1e-3, total) if total else 1e-3
        optimizer = optax.adam(schedule)
    teacher = None if teacher is None else as_network(teacher)
    bodies = [
        step_body(
            network, teacher, optimizer, metric=metric, coef=coef, task_coef=task_coef, axis=DEVICES
        )
        for network, metric, coef in zip(networks, metrics_of, coefs, strict=True)
    ]
    step = _mapped(bodies, preprocess, devices)
    per_call = 1 if max_steps else steps_per_call(devices[here[0]], batches)
    sample = jax.eval_shape(lambda x: preprocess(x, None), batches.sample)
    sample = jnp.zeros(sample.shape, sample.dtype)
    key = jax.random.key(seed)
    states = place([init_state(network, optimizer, sample, key=key) for network in networks])
    evaluate = evaluators(students, networks, eval_data, preprocess, mesh)
    whose = [""] if alone else [f" of student {i}" for i in range(len(networks))]
    logs = [
        Log(
            callbacks if alone else [_numbered(c, i) for c in callbacks],
            teacher is not None,
            total,
            whose[i],
        )
        for i in range(len(networks))
    ]

    checkpoints, epoch, position, forgotten = None, 0, 0, False
    best_variables = [state.variables for state in states]
    with contextlib.ExitStack() as stack:
        stopping = lambda: False  # noqa: E731
        if checkpoint_dir is not None:
            from kd2m_jax._checkpoints import Checkpoints, check_same  # orbax takes a second

            lock = locked(pathlib.Path(checkpoint_dir) / ".lock")
            stack.enter_context(held_by_first(lock))
            # JAX listens for SIGTERM where there are several processes, so that they agree.
            several = jax.process_count() > 1
            stopping = asked_to_stop if several else stack.enter_context(stop_requests())
            checkpoints = stack.enter_context(contextlib.closing(Checkpoints(checkpoint_dir)))
            if found := checkpoints.restore(states):
                states, saved = found
                check_same(saved["settings"], settings, checkpoint_dir)
                epoch, position = saved["epoch"], saved["position"]
                for log, old in zip(logs, saved["logs"], strict=True):
                    log.replay(old)
                # Of an epoch that this run has yet to do it holds what that will give again.
                found = checkpoints.restore(best_variables, best=True)
                best_variables = found[0] if found else [state.variables for state in states]
                forgotten = found is None
        done = int(states[0].step)
        tests = [[r["test_accuracy"] for r in log.history if "test_accuracy" in r] for log in logs]
        if forgotten and any(tests):
            logging.getLogger(__name__).warning(
                "the best checkpoint in %s is lost: the best from step %d on is kept instead",
                checkpoint_dir,
                done,
            )
        best = [-1.0 if forgotten else max(of_one, default=-1.0) for of_one in tests]

        def save(improved):
            if checkpoints:
                where = {
                    "epoch": epoch,
                    "position": position,
                    "settings": settings,
                    "logs": [log.state() for log in logs],
                }
                checkpoints.save(done, states, where, best=best_variables if improved else None)

        while epoch < epochs and (max_steps is None or done < max_steps):
            whole = True
            for rows, arrays in batches.epoch(epoch, per_call, skip=position):
                whole = max_steps is None or done < max_steps
                if not whole:
                    break
                states, metrics = step(states, teacher_variables, rows, arrays)
                done, position = done + len(rows), position + len(rows)
                for log, values in zip(logs, metrics, strict=True):
                    # Of the calls before, while this one runs; an epoch's last steps wait for its
                    # evaluation.
                    if log.waiting >= log_every:
                        log.emit({})
                    log.add(done, epoch + 1, values)
                if stopping():
                    for log in logs:
                        log.settle()  # a loss that is not finite is not saved
                    save(False)
                    raise Stopped(143)
            improved = False
            for i, (state, log) in enumerate(zip(states, logs, strict=True)):
                scores = evaluate[i](state.variables)
                if not all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(state.params)):
                    log.settle()  # a loss that was not finite before says more
                    raise NonFiniteLoss(
                        f"the parameters{whose[i]} are not finite after step {done}"
                    )
                log.emit(scores)
                if not scores or scores["test_accuracy"] > best[i]:
                    improved = True
                    best[i] = scores.get("test_accuracy", best[i])
                    # The next step donates the state.
                    best_variables[i] = jax.tree.map(jnp.array, state.variables)
            if whole:
                epoch, position = epoch + 1, 0
            save(improved)
        if stopping():
            raise Stopped(143)
    results = [
        FitResult(network.export(*state.variables), network.export(*best), log.history, state)
        for network, state, best, log in zip(networks, states, best_variables, logs, strict=True)
    ]
    return results[0] if alone else results


def _population(*given) -> tuple[list[list], bool]:
    """Each as a list, all as long as those that are, and whether none was."""
    lengths = {len(g) for g in given if isinstance(g, list)}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError("lists of students, metrics and coefs differ in length or are empty")
    (count,) = lengths or {1}
    return [g if isinstance(g, list) else [g] * count for g in given], not lengths


def _numbered(callback, number: int):
    return lambda record: callback(record | {"student": number})


def _settings(batches: Batches, seed: int, metrics, coefs) -> dict:
    """What a resumed run keeps, but for networks and optimizer, whose arrays tell them apart."""
    settings = {"seed": seed, **batches.settings}
    settings["metric"] = [str(getattr(m, "label", m)).replace("_", "-") for m in metrics]
    if not any(map(callable, coefs)):  # a schedule cannot be compared
        settings["coef"] = [c if isinstance(c, str) else float(c) for c in coefs]
    return settings


def variables_of(model: Model, variables: Any) -> Any:
    """``(params, state)`` of a trained model."""
    if isinstance(variables, dict) and "params" in variables:
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}
    if variables is not None:
        return variables
    if isinstance(model, nnx.Module):
        return from_nnx(model).init(None, None)
    raise ValueError(
        "teacher_variables is needed: only an NNX module brings its own trained variables"
    )


def _mapped(bodies, preprocess: Preprocess, devices):
    """Steps under pmap, which take their batches from arrays that are on the device."""

    def one(states, teacher_variables, rows, arrays):
        state = states[0]  # all have the same key and step
        x, labels = (a[rows] for a in arrays)
        # One key an example, so that augmentation does not depend on the number of devices. The
        # step itself draws from the keys 0 and 1 that split() makes of the same one.
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
        batch = (preprocess(x, keys), labels)
        # Each computes the teacher on the same batch; XLA sees that and does it once.
        done = [
            body(state, teacher_variables, batch)
            for body, state in zip(bodies, states, strict=True)
        ]
        return [state for state, _ in done], [metrics for _, metrics in done]

    def several(states, teacher_variables, rows, arrays):
        if len(rows) == 1:  # without the loop: see steps_per_call
            states, metrics = one(states, teacher_variables, rows[0], arrays)
            return states, jax.tree.map(lambda m: m[None], metrics)
        return jax.lax.scan(lambda s, r: one(s, teacher_variables, r, arrays), states, rows)

    return jax.pmap(
        several,
        axis_name=DEVICES,
        in_axes=(None, None, 1, None),
        out_axes=None,
        devices=devices,
        donate_argnums=0,
    )


def _total_steps(batches: Batches, epochs: int, max_steps: int | None) -> int | None:
    if batches.steps_per_epoch is None:
        return max_steps
    steps = batches.steps_per_epoch * epochs
    return steps if max_steps is None else min(steps, max_steps)
