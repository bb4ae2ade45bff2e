"""What decides a run's result: the content of its config.json."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import pathlib
from typing import Any

from kd2m_jax import internal

from ..common import files
from ..common.errors import UsageError
from ..data.specs import Dataset, data_sha256, sha256
from .settings import ABSENT, Settings, coefficients

# The fields that make a teacher; the hash of their values names its folder in the cache.
_MAKES_TEACHER = (
    "dataset", "data_sha256", "teacher", "stem", "pretrained_teacher", "teacher_sha256", "protocol",
    "optimizer", "epochs", "batch_size", "per_class", "precision", "seed", "max_steps",
    "preprocessing",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's result, in the order in which config.json has it.

    Attributes:
      data_sha256: hash of all images and labels.
      train_examples: how many training images there are; None where an old file does not say.
      preprocessing: normalisation and augmentation, in words.
      metric: as `losses.get_metric` reads it, or "none".
      coef: one lambda per term of the metric, or "auto:RATIO" or "published".
      task_coef: weight of the cross-entropy.
      stem, pretrained_teacher, pretrained_student: as in `settings.Networks`.
      teacher_sha256, student_sha256: hashes of the files of pretrained weights.
      optimizer: the protocol's summary.
      solver: what w2, cw2 and jw2 take where ``metric`` does not say.
      published: the published weights of a metric whose coef is "published".
      images: where images of one's own come from, and their classes; None of a known data set.
      options: the flags of `settings.OPTIONS` that were given; None of a run without any.
      parameters: how many parameters "teacher" and "student" have; empty until they are built.

    The other fields are the flags of the same names.
    """

    dataset: str
    data_sha256: str | None
    train_examples: int | None
    preprocessing: str | None
    metric: str
    coef: tuple[float | str, ...]
    task_coef: float
    teacher: str
    student: str
    stem: str
    pretrained_teacher: str | None
    teacher_sha256: str | None
    pretrained_student: str | None
    student_sha256: str | None
    protocol: str
    optimizer: str | None
    epochs: int
    batch_size: int
    per_class: int | None
    precision: str
    seed: int
    max_steps: int | None
    solver: str = "sinkhorn"
    published: dict[str, Any] | None = None
    images: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    parameters: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "RunConfig":
        """Read the content of a config.json, of this version or an older one.

        Raises:
          ValueError: for keys that no version wrote, or that every version wrote and that lack.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        values = ABSENT | content
        unknown, missing = values.keys() - set(names), set(names) - values.keys()
        if unknown or missing:
            what = [f"{word} {', '.join(sorted(keys))}" for word, keys in
                    (("unknown", unknown), ("missing", missing)) if keys]  # fmt: skip
            raise ValueError(f"not the configuration of a run: {'; '.join(what)}")
        return cls(**values | {"coef": tuple(values["coef"])})

    def to_json(self) -> dict[str, Any]:
        """Return the content of config.json; what says nothing is left out."""
        content = dataclasses.asdict(self) | {"coef": list(self.coef)}
        for key in ("published", "solver", "images", "options"):
            if content[key] == ABSENT[key]:
                del content[key]
        return content

    def changes(self, other: "RunConfig") -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ, each with the value here and in the other."""
        mine, others = self._decisive(), other._decisive()
        both = {key: (mine.get(key), others.get(key)) for key in {**mine, **others}}
        return {key: values for key, values in both.items() if values[0] != values[1]}

    def _decisive(self) -> dict[str, Any]:
        """Return the content without where images are: what they are is in data_sha256."""
        content = self.to_json()
        if self.images is not None:
            where = ("train", "test")
            content["images"] = {k: v for k, v in self.images.items() if k not in where}
        return content

    @property
    def makes_teacher(self) -> dict[str, Any]:
        """Return the settings that make the teacher."""
        options = {"options": self.options} if self.options else {}
        return {key: getattr(self, key) for key in _MAKES_TEACHER} | options

    @property
    def teacher_name(self) -> str:
        """Name the teacher's folder in the cache: its network and the hash of all that makes it."""
        values = json.dumps(self.makes_teacher)
        digest = hashlib.sha256(values.encode()).hexdigest()[:12]
        return f"{self.dataset}-{self.teacher}-{digest}"


def configuration(settings: Settings, dataset: Dataset) -> RunConfig:
    """Return everything that decides the result of a run with these flags."""
    from .protocols import PROTOCOLS  # loads JAX

    d, n, t = settings.distillation, settings.networks, settings.training
    protocol, coef = PROTOCOLS[t.protocol], coefficients(d)
    moments = f"mean {dataset.mean}, std {dataset.std}"
    published = _published(d.metric) if coef == ("published",) else None
    return RunConfig(
        dataset=dataset.name,
        data_sha256=data_sha256(dataset),
        train_examples=len(dataset.train[0]),
        preprocessing=f"{moments}, crop {dataset.crop_padding}, flip {dataset.flip}",
        metric=internal.spelled(d.metric),
        coef=coef,
        task_coef=published["task_coef"] if published else d.task_coef,
        solver=_solver(settings, dataset),
        teacher=n.teacher,
        student=n.student,
        stem=n.stem,
        pretrained_teacher=n.pretrained_teacher,
        teacher_sha256=_file_sha256("teacher", n.pretrained_teacher),
        pretrained_student=n.pretrained_student,
        student_sha256=_file_sha256("student", n.pretrained_student),
        protocol=t.protocol,
        optimizer=protocol.summary,
        epochs=t.epochs or protocol.epochs,
        batch_size=t.batch_size or _batch_size(protocol.batch_size, dataset),
        per_class=t.per_class,
        precision=t.precision,
        seed=t.seed,
        max_steps=settings.run.max_steps,
        published=published,
        images=dataset.origin,
        options=t.options or None,
    )


def _batch_size(usual: int, dataset: Dataset) -> int:
    """Return a protocol's batch size; of few images of one's own a smaller power of two.

    So that an epoch has eight steps, of 16 images at least where there are as many.
    """
    count = len(dataset.train[0])
    if dataset.origin is None or count == 0:
        return usual
    return min(usual, 2 ** int(math.log2(max(count // 8, min(count, 16)))))


def run_path(settings: Settings, dataset: Dataset) -> pathlib.Path:
    """Return the run folder: the one that is named, or one named after what is run."""
    name = f"{dataset.name}-{internal.spelled(settings.distillation.metric)}"
    return pathlib.Path(settings.run.out or f"runs/{name}-{settings.training.seed}")


def _solver(settings: Settings, dataset: Dataset) -> str:
    """Return the solver where the metric does not say: a run's that goes on or is repeated."""
    from kd2m_jax import losses  # loads JAX

    metric = settings.distillation.metric
    if metric == "none" or not any(map(solver_unsaid, terms_of(losses.get_metric(metric)))):
        return ABSENT["solver"]
    if settings.run.resume:
        with contextlib.suppress(OSError, ValueError):  # no such run, or damaged
            content = files.read_object(run_path(settings, dataset) / "config.json")
            return content.get("solver", ABSENT["solver"])
    of_config = {
        internal.spelled(name): solver for name, solver in settings.distillation.solver_of.items()
    }
    return of_config.get(internal.spelled(metric), internal.DEFAULT_SOLVER)


def terms_of(metric: Any) -> tuple[Any, ...]:
    """Return the terms of a `losses.MetricSum`, or the one metric; of none, nothing."""
    return getattr(metric, "metrics", (metric,)) if metric else ()


def solver_unsaid(term: Any) -> bool:
    """Tell whether a metric that is no sum has solvers and leaves the choice to the default."""
    from kd2m_jax import losses  # loads JAX

    parameters = inspect.signature(losses.METRICS[term.name].function).parameters
    return "solver" in parameters and "solver" not in dict(term.options)


def _published(metric: str) -> dict[str, Any] | None:
    """Return a metric's published weights, None where it has none."""
    from kd2m_jax import losses  # loads JAX

    if metric == "none":
        return None
    parsed = losses.get_metric(metric)
    known = losses.METRICS[parsed.name].published if isinstance(parsed, losses.Metric) else None
    return known._asdict() if known else None


def _file_sha256(role: str, path: str | None) -> str | None:
    """Hash a file of torch weights, fetched first where it is on a hub."""
    if path is None:
        return None
    try:
        return sha256(internal.local_file(path).read_bytes())
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(f"--pretrained-{role}: {error}") from error
