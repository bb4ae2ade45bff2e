"""From the arguments of `fit` to a checked, frozen plan of its run."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd2m_jax._locks import check_local
from kd2m_jax._outputs import Outputs
from kd2m_jax.adapters import DEVICES, Model, Network, as_network
from kd2m_jax.losses import ClassStatistics
from kd2m_jax.losses._metrics import as_outputs
from kd2m_jax.teachers import Bank, EmaTeacher, Memory
from kd2m_jax.training._batches import OWN, Batches, Transfer, steps_per_call
from kd2m_jax.training._body import Batch, Body, Coef, TrainState, in_full, step_body
from kd2m_jax.training._evaluation import evaluators
from kd2m_jax.training._examples import Arrays
from kd2m_jax.training._identity import Compared
from kd2m_jax.training._labels import Unlabelled, check_rule
from kd2m_jax.training._preprocess import Prepare, Preprocess
from kd2m_jax.training._programs import shared
from kd2m_jax.training._records import Record, Records
from kd2m_jax.training._step import init_state, owned
from kd2m_jax.training._students import Students, Teacher, check_labels, check_memory_suits


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
      records: for each student where its metrics go.
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
    records: list[Records]
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
    optimizer: optax.GradientTransformation | None,
    epochs: int,
    batch_size: int,
    per_class: int | None,
    eval_data: Arrays | None,
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
    stored = teacher if isinstance(teacher, Outputs) else None
    teacher = None if isinstance(teacher, Outputs) else teacher
    given = Transfer.of(transfer, transfer_batch_size)
    if given is not None and (stored is not None or (teacher is not None and given.teacher)):
        raise ValueError(
            "transfer brings the teacher's outputs for its own inputs, as (x, Outputs), and there "
            "is another teacher: which one is meant?"
        )
    if teacher is None and stored is None:  # before anything is copied
        known = given is not None and given.teacher is not None
        if given is not None and not known:
            raise ValueError("transfer needs a teacher, or its outputs: transfer=(x, Outputs)")
    # Everything on every device once, rather than at each call; of this process's, because that
    # is what pmap takes.
    mesh = Mesh(np.array(devices)[here], (DEVICES,))
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
    networks = [as_network(student) for student in students.models]
    decay = teacher.decay if isinstance(teacher, EmaTeacher) else None
    gone = teacher if isinstance(teacher, Bank | ClassStatistics) else None
    rows = gone.rows if isinstance(gone, Bank) else None
    if gone is not None:
        check_memory_suits(students.metrics, gone)
    model = None if isinstance(teacher, EmaTeacher | Bank | ClassStatistics) else teacher
    frozen = None if model is None else as_network(model)
    if teacher_variables is not None and model is None:
        raise ValueError("teacher_variables are those of a network, and the teacher is none")
    if model is not None:
        teacher_variables = place(variables_of(model, teacher_variables))
    elif gone is not None:
        teacher_variables = place(Memory.of(gone))
    batches = Batches(data, batch_size, seed, len(devices), per_class, place, here, stored, given)
    if teacher is not None and batches.has_outputs:
        raise ValueError("data brings the teacher's outputs, and there is a teacher: leave one out")
    has_teacher = teacher is not None or batches.has_outputs
    students.check_teacher(has_teacher)
    if not has_teacher and not batches.has_labels:
        raise ValueError("nothing to learn from: no example has a label, and there is no teacher")
    if not batches.has_labels:
        students = students.without_labels()
    total = _total_steps(batches, epochs, max_steps)
    chosen = optimizer or _default_optimizer(total)
    bodies = _bodies(
        networks,
        students,
        frozen,
        chosen,
        task_coef,
        unlabelled=unlabelled,
        all_labelled=batches.all_labelled and not prepare.changes_labels,
        decay=decay,
        remembers=gone is not None,
        rows=rows,
    )
    shapes_of = jax.make_jaxpr(lambda x, labels: prepare(x, labels, None)[0], return_shape=True)
    preparation, sample = shapes_of(batches.sample.x, batches.sample.labels)
    sample = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sample)
    sample_rows = len(jax.tree.leaves(sample)[0])
    key = jax.random.key(seed)
    states = [init_state(network, chosen, sample, key=key) for network in networks]
    if decay is not None:
        states = [state._replace(average=owned(in_full(state.variables))) for state in states]
    states = place(states)
    traced = [_traced(n, s.variables, sample) for n, s in zip(networks, states, strict=True)]
    outputs = [_outputs(out) for _, out in traced]
    classes = min(out.logits.shape[-1] for out in outputs)
    batches.expect(classes)
    rule = check_rule(unlabelled)
    predicts = frozen is not None or decay is not None
    if batches.sample.teacher is not None:
        predicts = batches.sample.teacher.logits is not None
    if has_teacher and rule is None:
        rule = "teacher" if predicts and gone is None else "balanced"
    check_labels(students.metrics, gone, rule, classes, has_transfer=given is not None)
    compared = Compared(
        metrics=students.metrics,
        coefs=students.coefs,
        task_coef=task_coef,
        teacher=None if frozen is None and gone is None else teacher_variables,
        data=None if batches.arrays is None else tuple(batches.arrays[:2]),
        stored=batches.stored,
        optimizer=optimizer,
        params=states[0].params,
        outputs=lambda: (
            outputs[0],
            _outputs(_traced(frozen, teacher_variables, sample)[1])
            if frozen is not None
            else outputs[0]
            if decay is not None
            else batches.sample.teacher
            if gone is None
            else _drawn(teacher_variables, rows or sample_rows),
        ),
        others={
            "seed": seed,
            "decay": decay,
            "rows": rows,
            "unlabelled": rule,
            **batches.settings,
        },
    )
    return Plan(
        networks=networks,
        is_population=students.is_population,
        states=states,
        teacher_variables=teacher_variables,
        program=shared(_mapped, bodies, prepare, tuple(devices)),
        batches=batches,
        evaluate=evaluators(networks, eval_data, prepare, mesh, classes),
        records=_records(students, callbacks, has_teacher=has_teacher, total=total),
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
            lambda: _alone(preparation, traced, frozen, teacher_variables, sample),
        ),
        checkpoint_dir=checkpoint_dir,
        save_every=save_every,
    )


def _bodies(
    networks, students: Students, teacher, optimizer, task_coef: Coef, **options: Any
) -> list[Body]:
    return [
        step_body(
            network,
            teacher,
            optimizer,
            metric=metric,
            coef=coef,
            task_coef=task_coef,
            axis=DEVICES,
            **options,
        )
        for network, metric, coef in zip(networks, students.metrics, students.coefs, strict=True)
    ]


def _records(students: Students, callbacks, *, has_teacher: bool, total) -> list[Records]:
    return [
        Records(
            callbacks,
            has_teacher=has_teacher,
            total=total,
            student=i if students.is_population else None,
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


def _drawn(memory: Memory, n: int) -> Any:
    """Return the shapes of n rows that a step would draw."""
    return jax.eval_shape(lambda key: memory.draw(key, n)[0], jax.random.key(0))


# Parameters times examples of a step that may take a tenth of a second on a CPU (estimated):
# several of them would keep Ctrl-C and a save waiting.
_HEAVY = 5e8


def _alone(prepared: Any, students, teacher, variables: Any, sample: Any) -> bool:
    """Tell whether steps are better made one by one on a CPU: heavy ones, and where one convolves.

    A convolution's backward pass inside a loop runs 20 to 50 times slower there (measured: 47 ms
    per step alone, 1,600 ms in ``lax.scan``).
    """
    programs = [prepared, *(program for program, _ in students)]
    size = sum(np.prod(v.aval.shape) for program in programs[1:] for v in program.jaxpr.invars)
    if teacher is not None:
        programs.append(_traced(teacher, variables, sample)[0])
    convolves = any("conv_general_dilated" in str(program) for program in programs)
    return convolves or size * jax.tree.leaves(sample)[0].shape[0] > _HEAVY


def _outputs(given: Any) -> Any:
    """Return a network's outputs, which must have logits."""
    out = as_outputs("student", given)
    if out.logits is None:
        raise TypeError("the student returns no logits, which its cross-entropy needs")
    return out


def variables_of(model: Model, variables: Any) -> Any:
    """Return ``(params, state)`` of a trained model."""
    if isinstance(variables, Mapping) and "params" in variables:
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}
    if variables is not None:
        return variables
    own = as_network(model).variables
    if own is not None:
        return own
    raise ValueError(
        "the trained variables are needed (teacher_variables of fit): only an NNX module, or a "
        "network made with them, brings its own"
    )


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
