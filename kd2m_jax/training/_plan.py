"""From the arguments of `fit` to a checked, frozen plan of its run."""

import dataclasses
import functools
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd2m_jax._locks import check_local
from kd2m_jax.adapters import DEVICES, Network, as_network
from kd2m_jax.callbacks import EarlyStopping, WeightAverage
from kd2m_jax.losses._metrics import as_outputs
from kd2m_jax.losses._resolve import for_cpu, resolve
from kd2m_jax.training._averages import in_full
from kd2m_jax.training._batches import OWN, Batches, Transfer, steps_per_call
from kd2m_jax.training._body import (
    Batch,
    Body,
    Coef,
    TaskLoss,
    TrainState,
    averaged_variables,
    step_body,
)
from kd2m_jax.training._evaluation import Task, evaluators
from kd2m_jax.training._examples import Arrays
from kd2m_jax.training._identity import Compared
from kd2m_jax.training._labels import Unlabelled, check_rule
from kd2m_jax.training._preprocess import Prepare, Preprocess
from kd2m_jax.training._programs import shared
from kd2m_jax.training._records import Record, Records
from kd2m_jax.training._scores import Score, named
from kd2m_jax.training._source import Source
from kd2m_jax.training._step import init_state, owned
from kd2m_jax.training._students import Students, Teacher, check_labels, check_rows_meet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A run of `fit`: what it trains, with which program, on what, and where it is kept.

    Attributes:
      networks: the students.
      is_population: whether they are a list, and not one.
      states: their states before the first step, on all devices.
      teacher_variables: the teacher's, on all devices, or None.
      program: ``(states, teacher_variables, rows, arrays) -> (states, metrics)``, some steps.
      batches: where batches come from.
      evaluate: for each student a function from its variables to its scores.
      kept: what is evaluated and returned of a state: the variables, or their average.
      records: for each student where its metrics go.
      why_not_finite: what is to be looked at where a test loss is not finite.
      settings: what a resumed run must have in common with the one that it continues.
      total: how many steps there are, if that is known.
    """

    networks: list[Network]
    is_population: bool
    states: list[TrainState]
    teacher_variables: Any
    program: Callable
    batches: Batches
    evaluate: list[Callable[[Any], Record]]
    kept: Callable[[TrainState], Any]
    records: list[Records]
    why_not_finite: str
    settings: dict
    total: int | None
    epochs: int
    max_steps: int | None
    log_every: int
    steps_per_call: int
    checkpoint_dir: str | os.PathLike | None
    save_every: float


def check_numbers(
    *,
    epochs: int,
    batch_size: int,
    log_every: int,
    max_steps: int | None,
    per_class: int | None,
    save_every: float,
    seed: int,
    transfer_batch_size: int,
) -> None:
    """Raise ValueError for a number that is out of range."""
    counts = {"epochs": epochs, "batch_size": batch_size, "log_every": log_every}
    counts["transfer_batch_size"] = transfer_batch_size
    for name, value in {**counts, "max_steps": 1 if max_steps is None else max_steps}.items():
        if not isinstance(value, int | np.integer):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    # JAX would take the last 32 bits of a larger one without a word.
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {seed!r}")
    if per_class is not None and (per_class < 1 or batch_size % per_class):
        raise ValueError(f"per_class must divide batch_size {batch_size}, got {per_class}")
    if not isinstance(save_every, int | float | np.number) or not save_every >= 0:
        raise ValueError(f"save_every must be >= 0 seconds, got {save_every}")


def make_plan(
    students: Students,
    data: Arrays | Iterable[Arrays],
    *,
    teacher: Teacher,
    teacher_variables: Any,
    transfer: Any,
    transfer_batch_size: int,
    unlabelled: Unlabelled,
    task_coef: Coef,
    task_loss: TaskLoss | None,
    optimizer: optax.GradientTransformation | None,
    epochs: int,
    batch_size: int,
    per_class: int | None,
    eval_data: Arrays | Iterable[Arrays] | None,
    metrics: Sequence[Score],
    preprocess: Preprocess | None,
    callbacks: Sequence[Callable[[Record], object]],
    log_every: int,
    checkpoint_dir: str | os.PathLike | None,
    save_every: float,
    seed: int,
    max_steps: int | None,
    devices: Sequence[Any] | None,
) -> Plan:
    """Check the arguments of `fit`, put what stays on the devices there, and make the program."""
    check_local(checkpoint_dir)
    devices = list(devices or jax.devices())
    here = [i for i, d in enumerate(devices) if d.process_index == jax.process_index()]
    prepare = Prepare.of(preprocess)
    given = Transfer.of(transfer, transfer_batch_size)
    # Everything on every device once, rather than at each call; of this process's, because that
    # is what pmap takes.
    mesh = Mesh(np.array(devices)[here], (DEVICES,))
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
    networks = [as_network(student) for student in students.models]
    callbacks = [callbacks] if callable(callbacks) else callbacks
    for callback in callbacks:
        if isinstance(callback, EarlyStopping):
            if eval_data is None:
                raise ValueError("EarlyStopping looks at scores of eval_data, and there is none")
            callback.begin("test_accuracy" if task_loss is None else "test_loss")
    source = Source.of(teacher, teacher_variables, given, students.metrics, callbacks, place)
    own_task = task_loss is not None
    scores = named(metrics, has_data=eval_data is not None, own_task=own_task)
    batches = Batches(
        data,
        batch_size,
        seed,
        len(devices),
        per_class,
        place,
        here,
        source.stored,
        given,
        any_labels=own_task,
    )
    if source.is_given and batches.has_outputs:
        raise ValueError("data brings the teacher's outputs, and there is a teacher: leave one out")
    has_teacher = source.is_given or batches.has_outputs
    students.check_teacher(has_teacher)
    if not has_teacher and not batches.has_labels:
        raise ValueError("nothing to learn from: no example has a label, and there is no teacher")
    if not batches.has_labels:
        students = students.without_labels()
    total = _total_steps(batches, epochs, max_steps)
    if optimizer is not None and not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be one of optax, optax.adam(1e-3), got {optimizer!r}")
    chosen = optimizer or _default_optimizer(total)
    bodies = _bodies(
        networks,
        students,
        source.network,
        chosen,
        task_coef,
        devices,
        unlabelled=unlabelled,
        task_loss=task_loss,
        all_labelled=batches.all_labelled and not prepare.changes_labels,
        **source.options,
    )
    shapes_of = jax.make_jaxpr(lambda x, labels: prepare(x, labels, None)[0], return_shape=True)
    preparation, sample = shapes_of(batches.sample.x, batches.sample.labels)
    sample = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sample)
    key = jax.random.key(seed)
    states = [init_state(network, chosen, sample, key=key) for network in networks]
    if source.average is not None:
        states = [state._replace(average=owned(in_full(state.variables))) for state in states]
    states = place(states)
    traced = [_traced(n, s.variables, sample) for n, s in zip(networks, states, strict=True)]
    outputs = [_outputs(out, needs_logits=not own_task) for _, out in traced]
    classes = min((o.logits.shape[-1] for o in outputs if o.logits is not None), default=None)
    batches.expect(classes)
    rule = check_rule(unlabelled)
    if has_teacher and rule is None:
        rule = source.default_rule(batches.sample.teacher)
    check_labels(students.metrics, source.gone, rule, classes, has_transfer=given is not None)
    if task_loss is not None:
        for out in outputs:
            check_rows_meet(task_loss, out, batches.sample.labels)
    compared = Compared(
        metrics=students.metrics,
        coefs=students.coefs,
        task_coef=task_coef,
        task_loss=task_loss,
        sample_labels=batches.sample.labels,
        teacher=source.variables,
        data=None if batches.arrays is None else tuple(batches.arrays[:2]),
        stored=batches.stored,
        optimizer=optimizer,
        params=states[0].params,
        outputs=lambda: (outputs[0], _taught(source, outputs[0], batches, sample)),
        others={"seed": seed, "unlabelled": rule, **source.settings, **batches.settings},
    )
    task = Task(
        classes=None if own_task else classes,
        task_loss=task_loss,
        scores=scores,
        teacher=source.network,
        teacher_variables=source.variables,
    )
    return Plan(
        networks=networks,
        is_population=students.is_population,
        states=states,
        teacher_variables=source.variables,
        program=shared(_mapped, bodies, prepare, tuple(devices)),
        batches=batches,
        evaluate=evaluators(networks, eval_data, prepare, mesh, task),
        kept=averaged_variables
        if isinstance(source.average, WeightAverage)
        else operator.attrgetter("variables"),
        records=_records(students, callbacks, has_teacher, own_task, total),
        why_not_finite="task_loss of one example alone" if own_task else "inputs of eval_data",
        settings={} if checkpoint_dir is None else compared.described(),
        total=total,
        epochs=epochs,
        max_steps=max_steps,
        log_every=log_every,
        steps_per_call=1
        if max_steps
        else steps_per_call(
            devices[here[0]],
            batches,
            log_every,
            lambda: _alone(preparation, traced, source, sample),
        ),
        checkpoint_dir=checkpoint_dir,
        save_every=save_every,
    )


def _bodies(
    networks, students: Students, teacher, optimizer, task_coef: Coef, devices, **options: Any
) -> list[Body]:
    here = for_cpu if all(device.platform == "cpu" for device in devices) else resolve
    return [
        step_body(
            network,
            teacher,
            optimizer,
            metric=here(metric),
            coef=coef,
            task_coef=task_coef,
            axis=DEVICES,
            **options,
        )
        for network, metric, coef in zip(networks, students.metrics, students.coefs, strict=True)
    ]


def _records(
    students: Students, callbacks, has_teacher: bool, own_task: bool, total: int | None
) -> list[Records]:
    return [
        Records(
            callbacks,
            has_teacher=has_teacher,
            total=total,
            student=i if students.is_population else None,
            own_task=own_task,
        )
        for i in range(len(students.models))
    ]


def _default_optimizer(total: int | None) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(1e-3, total) if total else 1e-3)


def _traced(network: Network | None, variables: Any, sample: Any) -> tuple[Any, Any]:
    """Return a network's program for a batch, and the shapes of what it gives."""
    assert network is not None

    def call(params, state, x):
        return network.apply(params, state, x, train=False, rng=None)[0]

    return jax.make_jaxpr(call, return_shape=True)(*variables, sample)


def _taught(source: Source, student: Any, batches: Batches, sample: Any) -> Any:
    """Return the shapes of the teacher's outputs for a batch."""
    if source.network is not None:
        return _outputs(_traced(source.network, source.variables, sample)[1])
    if source.gone is not None:
        n = source.rows or len(jax.tree.leaves(sample)[0])
        draw = lambda key: source.variables.draw(key, n)[0]  # noqa: E731
        return jax.eval_shape(draw, jax.random.key(0))
    return student if source.is_own_average else batches.sample.teacher


# Parameters times examples of a step that may take a tenth of a second on a CPU (estimated):
# several of them would keep Ctrl-C and a save waiting.
_HEAVY = 5e8


def _alone(prepared: Any, students, source: Source, sample: Any) -> bool:
    """Tell whether steps are better made one by one on a CPU: heavy ones, and where one convolves.

    A convolution's backward pass inside a loop runs 20 to 50 times slower there (measured: 47 ms
    per step alone, 1,600 ms in ``lax.scan``).
    """
    programs = [prepared, *(program for program, _ in students)]
    size = sum(np.prod(v.aval.shape) for program in programs[1:] for v in program.jaxpr.invars)
    if source.network is not None:
        programs.append(_traced(source.network, source.variables, sample)[0])
    convolves = any("conv_general_dilated" in str(program) for program in programs)
    return convolves or size * jax.tree.leaves(sample)[0].shape[0] > _HEAVY


def _outputs(given: Any, *, needs_logits: bool = True) -> Any:
    """Return a network's outputs, which must have logits for a cross-entropy."""
    out = as_outputs("student", given)
    if out.logits is None and needs_logits:
        raise TypeError("the student returns no logits, which its cross-entropy needs")
    return out


def _mapped(bodies: Sequence[Body], prepare: Prepare, devices: Sequence[Any]):
    """Map steps over the devices. They take their batches from arrays that lie there."""

    def one(states, teacher_variables, rows, arrays):
        state = states[0]  # all have the same key and step
        rows, transfer_rows = rows
        x, labels = jax.tree.map(lambda a: a[rows], (arrays.x, arrays.labels))
        compared = rows if transfer_rows is None else transfer_rows
        teacher, transfer = jax.tree.map(lambda a: a[compared], (arrays.teacher, arrays.transfer))
        # One key per example, so that augmentation does not depend on the number of devices. The
        # step itself draws from the keys 0 and 1 that split() makes of the same one.
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
        x, labels = prepare(x, labels, keys)
        if transfer is not None:
            key = jax.random.fold_in(key, OWN)  # a row of it may have the number of another
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, transfer_rows)
            transfer, _ = prepare(transfer, None, keys)
        batch = Batch(x, labels, teacher, transfer)
        # Each computes the teacher on the same batch; XLA sees that and does it once.
        done = [
            body(state, teacher_variables, batch)
            for body, state in zip(bodies, states, strict=True)
        ]
        return [state for state, _ in done], [metrics for _, metrics in done]

    def several(states, teacher_variables, rows, arrays):
        if len(rows[0]) == 1:  # without the loop: see steps_per_call
            first = jax.tree.map(lambda r: r[0], rows)
            states, metrics = one(states, teacher_variables, first, arrays)
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
