"""The one place that puts a run together: networks, metric, coefficient, options of `fit`."""

import dataclasses
import inspect
import math
import pathlib
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from kd2m_jax import (
    EarlyStopping,
    Network,
    Outputs,
    WeightAverage,
    internal,
    losses,
    models,
    projected,
)

from ..common.errors import UsageError
from ..data.augment import preprocess
from ..data.specs import Dataset
from .configuration import RunConfig, configuration, solver_unsaid, terms_of
from .folder import ALONE
from .protocols import PROTOCOLS
from .settings import Settings

Metric = losses.Metric | losses.MetricSum
Coef = float | str | Callable[[jax.Array], jax.Array]


class Options(TypedDict):
    """The arguments of `kd2m_jax.fit` that are the same in every phase."""

    preprocess: Callable[..., Any]
    optimizer: optax.GradientTransformation
    epochs: int
    batch_size: int
    per_class: int | None
    seed: int
    max_steps: int | None
    progress: bool


class Matching(TypedDict, total=False):
    """The arguments of `kd2m_jax.fit` that distil; a phase without a teacher has none."""

    teacher: nnx.Module
    metric: Metric
    coef: Coef
    task_coef: float
    transfer: Any
    transfer_batch_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, put together and checked, of which nothing is trained yet.

    Attributes:
      config: what decides its result.
      dataset: the images that it trains and tests on.
      teacher: the teacher before training.
      student: the student before training.
      distilled: the same student, with a projector where the metric needs one.
      projectors: one sentence per projector.
      metric: what the distilled student is asked to match; None: there is none.
      coef: lambda, as `kd2m_jax.fit` takes it.
      steps_per_epoch: optimizer steps per pass over the training images.
    """

    config: RunConfig
    dataset: Dataset
    teacher: nnx.Module
    student: nnx.Module
    distilled: nnx.Module | Network
    projectors: tuple[str, ...]
    metric: Metric | None
    coef: Coef
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Return the optimizer steps of each phase."""
        return int(
            min(self.config.epochs * self.steps_per_epoch, self.config.max_steps or math.inf)
        )

    @property
    def options(self) -> Options:
        """Return the arguments of `kd2m_jax.fit` that are the same in every phase."""
        config = self.config
        given = config.options or {}
        rule = {k: v for k, v in given.items() if k in ("optimizer", "lr", "weight_decay")}
        protocol = PROTOCOLS[config.protocol]
        optimizer = protocol.optimizer(config.epochs, self.steps_per_epoch, **rule)
        soft = {k: v for k, v in given.items() if k in ("label_smoothing", "mixup")}
        return {
            "preprocess": preprocess(self.dataset, **soft),
            "optimizer": optimizer,
            "epochs": config.epochs,
            "batch_size": config.batch_size,
            "per_class": config.per_class,
            "seed": config.seed,
            "max_steps": config.max_steps,
            "progress": False,  # the experiments show bars of their own
        }

    @property
    def callbacks(self) -> list[Callable[[dict], Any]]:
        """Return the callbacks of `kd2m_jax.fit` that the flags ask for, new ones for a phase."""
        given = self.config.options or {}
        found: list[Callable[[dict], Any]] = []
        if "ema" in given:
            found.append(WeightAverage(given["ema"]))
        if "early_stop" in given:
            found.append(EarlyStopping(given["early_stop"]))
        return found

    def matching(self, teacher: nnx.Module) -> Matching:
        """Return the arguments of `kd2m_jax.fit` that distil from this trained teacher."""
        assert self.metric is not None, "a run of the student alone has nothing to match"
        found: Matching = {
            "teacher": teacher,
            "metric": with_class_cost(self.metric, teacher, self.dataset),
            "coef": self.coef,
            "task_coef": self.config.task_coef,
        }
        if (transfer := self.dataset.transfer) is not None:
            size = PROTOCOLS[self.config.protocol].batch_size
            found |= {"transfer": transfer, "transfer_batch_size": min(size, len(transfer))}
        return found


def build(settings: Settings | RunConfig, dataset: Dataset) -> Plan:
    """Put a run together from its flags, or from an earlier run's configuration.

    Raises:
      UsageError: for pretrained weights or a metric that do not suit the networks.
    """
    config = configuration(settings, dataset) if isinstance(settings, Settings) else settings
    metric = _metric(config)
    teacher, student = (network(role, dataset, config) for role in ("teacher", "student"))
    parameters = {"teacher": _parameters(teacher), "student": _parameters(student)}
    distilled, projectors = student, ()
    if metric is not None:
        distilled, projectors = with_projector(student, teacher, dataset, metric)
    try:
        per_epoch = internal.steps_per_epoch(dataset.train[1], config.batch_size, config.per_class)
    except ValueError as error:
        raise UsageError(f"--per-class: {error}") from error
    return Plan(
        config=dataclasses.replace(config, parameters=parameters),
        dataset=dataset,
        teacher=teacher,
        student=student,
        distilled=distilled,
        projectors=projectors,
        metric=metric,
        coef=0.0 if metric is None else _coefficient(config, per_epoch),
        steps_per_epoch=per_epoch,
    )


def check_names(settings: Settings) -> None:
    """Raise UsageError for a metric or network that does not exist, before any data is read."""
    try:
        if settings.distillation.metric != ALONE:
            losses.get_metric(settings.distillation.metric)
            if settings.distillation.coef == "published":
                losses.published(settings.distillation.metric, 1)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    for role in ("teacher", "student"):
        name = getattr(settings.networks, role)

        def structure(name=name):  # on an image of any size
            return models.build(name, num_classes=10, image_shape=(32, 32, 3), rngs=nnx.Rngs(0))

        try:
            nnx.eval_shape(structure)
        except ValueError as error:
            raise UsageError(f"--{role}: {error}") from error
        weights = getattr(settings.networks, f"pretrained_{role}")
        if weights and not weights.startswith("hf:") and not pathlib.Path(weights).is_file():
            raise UsageError(f"--pretrained-{role}: there is no file {weights}")


def _metric(config: RunConfig) -> Metric | None:
    if config.metric == ALONE:
        return None
    given = losses.get_metric(config.metric)
    terms = [_with_solver(term, config.solver) for term in terms_of(given)]
    if not isinstance(given, losses.MetricSum):
        return terms[0]
    # auto weighs a sum as one.
    weights = [float(weight) for weight in config.coef] if len(config.coef) > 1 else given.weights
    return losses.metric_sum(terms, weights)


def _with_solver(term: losses.Metric, solver: str) -> losses.Metric:
    """Give a metric the solver of its run, where it names none; its records keep their names."""
    if not solver_unsaid(term):
        return term
    options = {**dict(term.options), "solver": internal.Unsaid(solver)}
    return dataclasses.replace(term, options=tuple(sorted(options.items())))


def solvers(metric: Metric | None) -> dict[str, str]:
    """Return, for env.json, the solver that runs here for each term that has one."""
    found = {}
    for term in terms_of(metric):
        options = dict(term.options)
        if options.get("solver") == "auto":  # a batch has as many of both
            exact = jax.default_backend() == "cpu" and not options.get("debiased")
            options["solver"] = "exact" if exact else "sinkhorn"
        if "solver" in options:
            found[term.written] = options["solver"]
    return found


def _coefficient(config: RunConfig, per_epoch: int) -> Coef:
    """Return lambda as `kd2m_jax.fit` takes it."""
    if config.coef == ("published",):
        # Like the optimizer's schedule over all epochs, whether max_steps cuts them or not.
        return losses.published(config.metric, config.epochs * per_epoch)[0]
    # A sum of metrics has its terms' weights inside.
    return config.coef[0] if len(config.coef) == 1 else 1.0


def network(role: str, dataset: Dataset, config: RunConfig) -> nnx.Module:
    """Build a network by its name, with random or pretrained weights."""
    dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[config.precision]
    built = models.build(
        getattr(config, role),
        num_classes=len(dataset.classes),
        image_shape=dataset.train[0].shape[1:],
        rngs=nnx.Rngs(config.seed),
        stem=config.stem,
        dtype=dtype,
    )
    path = getattr(config, f"pretrained_{role}")
    if path is None:
        return built
    try:
        return models.load_torch_weights(built, path, replace_head=True)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(f"--pretrained-{role}: {error}") from error


def _parameters(network: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


def with_projector(
    student: nnx.Module, teacher: nnx.Module, dataset: Dataset, metric: Metric
) -> tuple[nnx.Module | Network, tuple[str, ...]]:
    """Give the student a projector where what the metric compares has unequal sizes.

    Returns:
      The student, and one sentence per projector.
    """
    x = jnp.zeros((1, *dataset.train[0].shape[1:]))
    of_student, of_teacher = (nnx.eval_shape(lambda m: m(x), m) for m in (student, teacher))
    dim, channels, sizes = None, None, []
    for term in terms_of(metric):
        size = of_teacher.features.shape[-1]
        if term.projector == "features" and of_student.features.shape[-1] != size:
            dim = size
        if term.projector == "maps":
            if not (of_student.maps and of_teacher.maps):
                raise UsageError(
                    f"{term.name} compares convolutional maps, which an MLP does not have"
                )
            channels = of_teacher.maps[-1].shape[-1]
    if dim:
        sizes.append(f"{of_student.features.shape[-1]} features to the teacher's {dim}")
    if channels:
        sizes.append(f"last map to the teacher's {channels} channels")
    network = student
    if sizes:
        network = with_projection = projected(student, dim, channels=channels)
        variables = with_projection.init(jax.random.key(0), x)
        of_student, _ = jax.eval_shape(
            lambda x: with_projection.apply(*variables, x, train=False), x
        )
    _try_out(metric, of_student, of_teacher)
    return network, tuple(
        f"A projector from the student's {size} is trained with it, and left out afterwards."
        for size in sizes
    )


def _try_out(metric: Metric, student: Outputs, teacher: Outputs) -> None:
    """Raise UsageError now for a metric that these networks do not suit."""
    labels = jnp.zeros(1, int)
    call: Any = internal.for_cpu(metric)  # which is less to trace, and refuses the same
    try:
        jax.eval_shape(lambda s, t: call(s, t, labels, key=jax.random.key(0)), student, teacher)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--metric={metric.label}: {error}") from error


def with_class_cost(metric: Metric, teacher: nnx.Module, dataset: Dataset) -> Metric:
    """Give a metric that takes costs between classes those of the trained teacher's features."""
    if isinstance(metric, losses.MetricSum):
        terms = [_with_class_cost(term, teacher, dataset) for term in metric.metrics]
        return losses.metric_sum(terms, metric.weights)
    return _with_class_cost(metric, teacher, dataset)


def _with_class_cost(metric: losses.Metric, teacher: nnx.Module, dataset: Dataset) -> losses.Metric:
    if "class_cost" not in inspect.signature(losses.METRICS[metric.name].function).parameters:
        return metric
    images, labels = dataset.train
    prepare = preprocess(dataset)
    features_of = nnx.jit(lambda net, x: net(prepare(x, None)).features)
    features = [features_of(teacher, images[i : i + 500]) for i in range(0, len(images), 500)]
    try:
        cost = losses.class_cost_matrix(
            jnp.concatenate(features), labels, num_classes=len(dataset.classes)
        )
    except ValueError as error:
        raise UsageError(f"--metric={metric.label}: {error}") from error
    found = losses.get_metric(metric.written, class_cost=cost)
    assert isinstance(found, losses.Metric)  # one name, no sum
    return found
