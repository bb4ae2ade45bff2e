"""From the arguments of `fit` to a checked, frozen plan of its run."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd2m_jax._locks import check_local
from kd2m_jax.adapters import DEVICES, Model, Network, as_network, from_nnx
from kd2m_jax.losses import Metric, MetricSum
from kd2m_jax.losses._metrics import as_outputs
from kd2m_jax.training._batches import Batches, steps_per_call
from kd2m_jax.training._evaluation import evaluators
from kd2m_jax.training._examples import Arrays
from kd2m_jax.training._identity import Compared
from kd2m_jax.training._programs import shared
from kd2m_jax.training._records import Record, Records
from kd2m_jax.training._step import Body, Coef, TrainState, init_state, step_body

AnyMetric: TypeAlias = Metric | MetricSum | str | None

# (x, keys) -> x: what happens to inputs inside the program; keys is None in evaluation.
Preprocess: TypeAlias = Callable[[jax.Array, jax.Array | None], jax.Array]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Students:
    """The students of one program: lists of one length.

    Attributes:
      models: what the caller trains.
      metrics: what each compares with the teacher.
      coefs: the weight of that.
      is_population: whether the caller gave a list.
    """

    models: list[Model]
    metrics: list[AnyMetric]
    coefs: list[Coef | str]
    is_population: bool

    @classmethod
    def of(cls, student, metric, coef, *, has_teacher: bool) -> "Students":
        """Repeat single values for every student; ValueError where lists or teacher do not fit."""
        several = (list, tuple)  # exactly: a Network is a NamedTuple
        lengths = {len(g) for g in (student, metric, coef) if type(g) in several}
        if type(metric) in several and type(coef) in several and type(student) not in several:
            _say_what_lists_mean()
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError("lists of students, metrics and coefs differ in length or are empty")
        (count,) = lengths or {1}
        models, metrics, coefs = (
            list(g) if type(g) in several else [g] * count for g in (student, metric, coef)
        )
        without = {metric is None or metric == "none" for metric in metrics}
        if len(without) > 1:
            raise ValueError(
                "metric none among others: the students of a population all have the teacher, or "
                "none has; coef 0 leaves a metric without effect"
            )
        if without == {has_teacher}:
            missing = "metric" if has_teacher else "teacher"
            raise ValueError(
                f"a teacher and a metric to compare with it come together, and {missing} is missing"
            )
        return cls(models=models, metrics=metrics, coefs=coefs, is_population=bool(lengths))


@functools.cache  # once
def _say_what_lists_mean() -> None:
    logging.getLogger(__name__).warning(
        "a list of metrics and a list of coefs train one student for each pair, as a population; "
        "one student on the weighted sum of the metrics: losses.metric_sum(metrics, weights)"
    )


def check_numbers(
    *,
    epochs: int,
    batch_size: int,
    log_every: int,
    max_steps: int | None,
    per_class: int | None,
    save_every: float,
    seed: int,
) -> None:
    """Raise ValueError for a number that is out of range."""
    counts = {"epochs": epochs, "batch_size": batch_size, "log_every": log_every}
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
    teacher: Model | None,
    teacher_variables: Any,
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
    preprocess = preprocess or _unchanged
    # Everything on every device once, rather than at each call; of this process's, because that
    # is what pmap takes.
    mesh = Mesh(np.array(devices)[here], (DEVICES,))
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
    networks = [as_network(student) for student in students.models]
    frozen = None if teacher is None else as_network(teacher)
    if teacher is not None:
        teacher_variables = place(variables_of(teacher, teacher_variables))
    batches = Batches(data, batch_size, seed, len(devices), per_class, place, here)
    total = _total_steps(batches, epochs, max_steps)
    chosen = optimizer or _default_optimizer(total)
    bodies = _bodies(networks, students, frozen, chosen, task_coef)
    prepare = jax.make_jaxpr(lambda x: preprocess(x, None), return_shape=True)
    prepared, sample = prepare(batches.sample)
    sample = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sample)
    key = jax.random.key(seed)
    states = place([init_state(network, chosen, sample, key=key) for network in networks])
    traced = [_traced(n, s.variables, sample) for n, s in zip(networks, states, strict=True)]
    outputs = [_outputs(out) for _, out in traced]
    classes = min(out.logits.shape[-1] for out in outputs)
    batches.expect(classes)
    compared = Compared(
        metrics=students.metrics,
        coefs=students.coefs,
        task_coef=task_coef,
        teacher=None if teacher is None else teacher_variables,
        data=batches.arrays,
        optimizer=optimizer,
        params=states[0].params,
        outputs=lambda: (outputs[0], _outputs(_traced(frozen, teacher_variables, sample)[1])),
        others={"seed": seed, **batches.settings},
    )
    return Plan(
        networks=networks,
        is_population=students.is_population,
        states=states,
        teacher_variables=teacher_variables,
        program=shared(_mapped, bodies, preprocess, tuple(devices)),
        batches=batches,
        evaluate=evaluators(networks, eval_data, preprocess, mesh, classes),
        records=_records(students, callbacks, has_teacher=teacher is not None, total=total),
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
            lambda: _alone(prepared, traced, frozen, teacher_variables, sample),
        ),
        checkpoint_dir=checkpoint_dir,
        save_every=save_every,
    )


def _bodies(networks, students: Students, teacher, optimizer, task_coef: Coef) -> list[Body]:
    return [
        step_body(
            network, teacher, optimizer, metric=metric, coef=coef, task_coef=task_coef, axis=DEVICES
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


def _unchanged(x, keys):
    return x


def variables_of(model: Model, variables: Any) -> Any:
    """Return ``(params, state)`` of a trained model."""
    if isinstance(variables, Mapping) and "params" in variables:
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}
    if variables is not None:
        return variables
    if isinstance(model, nnx.Module):
        return from_nnx(model).init(None, None)
    raise ValueError(
        "teacher_variables is needed: only an NNX module brings its own trained variables"
    )


def _mapped(bodies: Sequence[Body], preprocess: Preprocess, devices: Sequence[Any]):
    """Map steps over the devices. They take their batches from arrays that lie there."""

    def one(states, teacher_variables, rows, arrays):
        state = states[0]  # all have the same key and step
        x, labels = jax.tree.map(lambda a: a[rows], arrays)
        # One key per example, so that augmentation does not depend on the number of devices. The
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
