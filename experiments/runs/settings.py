"""The flags of a training main, and what is checked of them before anything is loaded."""

import dataclasses
import math
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro

from ..common.cli import Flags, optional
from ..common.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What the student is asked to match, and how strongly."""

    metric: Annotated[
        str,
        tyro.conf.arg(
            help="w2, cw2, jw2, gaussian-w2, kd, ... (docs/metrics.md), or none; with options: "
            "jw2:beta=0.5; a sum: kd+cw2; of the logits: w2@logits."
        ),
    ] = "cw2"
    coef: Annotated[
        str,
        tyro.conf.arg(
            help="Lambda >= 0, in nats per unit of the metric; of a sum: 0.9,1e-3. auto:0.1 "
            "keeps its gradient at 0.1 of the rest."
        ),
    ] = "1e-4"
    task_coef: float = 1.0
    """Weight of the cross-entropy, >= 0."""
    solver_of: Annotated[dict[str, str], tyro.conf.Fixed, tyro.conf.Suppress] = dataclasses.field(
        default_factory=dict
    )
    """No flag: the solver of a metric that leaves it unsaid, from --config."""


@dataclasses.dataclass(frozen=True)
class Networks:
    """Who teaches whom."""

    teacher: str = "resnet34"
    """resnet8 to 101, wrn-40-2, vgg8, vit-tiny, mlp-64-32, ..."""
    student: str = "resnet18"
    """One of the same names."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layer 3x3 or 7x7."""
    pretrained_teacher: Annotated[str | None, optional("PTH", "random")] = None
    """.safetensors, .pth or hf:timm/NAME."""
    pretrained_student: Annotated[str | None, optional("PTH", "random")] = None
    """The same for the student."""


# Flags of a training that config.json has under one key, where any is given.
OPTIONS = ("optimizer", "lr", "weight_decay", "label_smoothing", "mixup", "ema", "early_stop")


# A key that an old config.json lacks means what the code did when that file was written.
ABSENT = {
    "train_examples": None,  # not recorded; data_sha256 covers it
    "preprocessing": None,  # unknown, so such a run is not resumed
    "data_sha256": None,  # likewise
    "optimizer": None,  # likewise
    "stem": "cifar",
    "pretrained_teacher": None,
    "teacher_sha256": None,
    "pretrained_student": None,
    "student_sha256": None,
    "per_class": None,
    "published": None,
    "solver": "sinkhorn",
    "images": None,
    "options": None,
}


@dataclasses.dataclass(frozen=True)
class Training:
    """How all three networks are trained."""

    protocol: Literal["digits", "kd2m", "crd"] = "kd2m"
    """kd2m is the paper's, crd the longest."""
    epochs: Annotated[int | None, optional("INT", "digits 20, kd2m 15, crd 240")] = None
    """Passes over data."""
    batch_size: Annotated[int | None, optional("INT", "digits, kd2m 128; crd 64")] = None
    """Examples per step."""
    per_class: Annotated[int | None, optional("INT", "any")] = None
    """Examples per class in a row."""
    precision: Literal["f32", "bf16"] = "f32"
    """Losses stay float32."""
    seed: int = 0
    """Seed for weights, data order, augmentation."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """With the protocol's schedule."""
    lr: Annotated[float | None, optional("FLOAT", "the protocol's")] = None
    """Learning rate at the start."""
    weight_decay: Annotated[float | None, optional("FLOAT", "the protocol's")] = None
    """Of all parameters, >= 0."""
    label_smoothing: float = 0.0
    """Share of a label spread over all classes."""
    mixup: float = 0.0
    """Alpha > 0: mix images and labels in pairs."""
    ema: float = 0.0
    """Average the weights; decay, say 0.999."""
    early_stop: Annotated[int | None, optional("EPOCHS", "never")] = None
    """So long without a better test accuracy."""

    @property
    def options(self) -> dict[str, Any]:
        """Return the flags below the seed that differ from their defaults."""
        own = [f for f in dataclasses.fields(self) if f.name in OPTIONS]
        return {f.name: v for f in own if (v := getattr(self, f.name)) != f.default}


@dataclasses.dataclass(frozen=True)
class Run:
    """Where data comes from and results go."""

    data_dir: Annotated[str | None, optional("DIR", "~/tensorflow_datasets")] = None
    """Data, fetched if missing."""
    out: Annotated[str | None, optional("DIR", "runs/<dataset>-<metric>-<seed>")] = None
    """The run folder."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue what is in --out."""
    config: Annotated[str | None, optional("FILE", "none")] = None
    """Flags from a run's config.json."""
    max_steps: Annotated[int | None, optional("INT", "no limit")] = None
    """Cut each phase, for a trial."""
    save_every: float = 60.0
    """Seconds between checkpoints."""
    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One run by several processes."""
    coordinator: Annotated[str | None, optional("HOST:PORT", "detected")] = None
    """Process 0's address."""
    num_processes: Annotated[int | None, optional("INT", "detected")] = None
    """Number of processes."""
    process_id: Annotated[int | None, optional("INT", "detected")] = None
    """This process's, from 0."""


@dataclasses.dataclass(frozen=True)
class OwnDataRun(Run):
    """`Run` of a main whose data is not tensorflow-datasets'."""

    data_dir: Annotated[str | None, tyro.conf.Suppress] = None
    """No flag: it has no meaning there."""


# --help shows it in the first box. No box has its docstring, so that all fits on a screen.
_FIRST = tyro.conf.arg(name="", help="")
_BOX = tyro.conf.arg(help="")


@dataclasses.dataclass(frozen=True)
class Settings(Flags):
    """Everything that a training main takes."""

    after_stop: ClassVar[str] = "the same command with --resume continues"

    distillation: Annotated[tyro.conf.OmitArgPrefixes[Distillation], _FIRST] = Distillation()
    networks: Annotated[tyro.conf.OmitArgPrefixes[Networks], _BOX] = Networks()
    training: Annotated[tyro.conf.OmitArgPrefixes[Training], _BOX] = Training()
    run: Annotated[tyro.conf.OmitArgPrefixes[Run], _BOX] = Run()

    def configured(self, content: dict[str, Any]) -> Self:
        """Return the flags with what a run's config.json has."""
        return from_config(self, content)


@dataclasses.dataclass(frozen=True)
class CifarSettings(Settings):
    """`Settings`, and which of the two CIFARs."""

    dataset: Annotated[
        Literal["cifar10", "cifar100"],
        tyro.conf.arg(help="cifar10 or cifar100.", metavar="NAME"),
    ] = "cifar10"


@dataclasses.dataclass(frozen=True)
class DigitsSettings(Settings):
    """`Settings` of data that comes with scikit-learn."""

    run: Annotated[tyro.conf.OmitArgPrefixes[OwnDataRun], _BOX] = OwnDataRun()


@dataclasses.dataclass(frozen=True)
class ImagesSettings(Settings):
    """`Settings`, and which pictures."""

    run: Annotated[tyro.conf.OmitArgPrefixes[OwnDataRun], _BOX] = OwnDataRun()

    train: Annotated[str | None, optional("DIR", "none")] = None
    """A folder with a folder per class."""
    dataset: Annotated[str | None, optional("hf:NAME", "none")] = None
    """Of Hugging Face, instead of --train."""
    test: Annotated[str | None, optional("DIR", "a part of --train")] = None
    """Likewise, to test on."""
    val_fraction: float = 0.2
    """That part of each class."""
    size: int = 64
    """Height and width in pixels."""
    labels_per_class: Annotated[int | None, optional("INT", "all")] = None
    """Keep so many; the rest have none."""
    skip_unreadable: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave damaged files out."""


SettingsT = TypeVar("SettingsT", bound=Settings)


def from_config(settings: SettingsT, content: dict[str, Any]) -> SettingsT:
    """Return settings with what a run's config.json has.

    Raises:
      UsageError: for a file of another main, and for one that is not as a run wrote it.
    """
    images = content.get("images")
    other = isinstance(settings, CifarSettings) and "cifar" not in str(content.get("dataset"))
    if other or (images is None) == isinstance(settings, ImagesSettings):
        raise UsageError("it is of a run on other data than this command's")
    given: dict[str, Any] = ABSENT | content
    given = {k: v for k, v in given.items() if k not in ("images", "options", "optimizer")}
    for more in (content.get("options") or {}, images or {}):
        if not isinstance(more, dict):
            raise UsageError(f"it has {more!r} where it should have names and values")
        given |= {k: v for k, v in more.items() if k != "seed"}
    if images:
        given = {"dataset": None} | {
            k: v for k, v in given.items() if k != "dataset" or k in images
        }
    coef = given.get("coef")
    if isinstance(coef, list):
        given["coef"] = ",".join(repr(c) if isinstance(c, float) else str(c) for c in coef)
    given["solver_of"] = {str(given.get("metric")): given.pop("solver")}

    def taken(group: Any) -> Any:
        found, hints = {}, get_type_hints(type(group))
        for name in (field.name for field in dataclasses.fields(group)):
            if dataclasses.is_dataclass(value := getattr(group, name)):
                found[name] = taken(value)
            elif name in given:
                if not _fits(given[name], hints[name]):
                    raise UsageError(f"its {name} cannot be {given[name]!r}")
                found[name] = given[name]
            elif not isinstance(group, Run) and name not in OPTIONS:
                raise UsageError(f"it is not the configuration of a run: it lacks {name}")
        return dataclasses.replace(group, **found)

    return taken(settings)


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value of JSON is one of a flag's."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


def coefficients(distillation: Distillation) -> tuple[float | str, ...]:
    """Return the numbers in --coef, or "auto:RATIO" or "published"."""
    coef = distillation.coef
    if coef == "published":
        return (coef,)
    if coef.startswith("auto"):
        from kd2m_jax.internal import auto_ratio  # loads JAX

        try:
            return (f"auto:{auto_ratio(coef):g}",)
        except ValueError as error:
            raise UsageError(f"--coef: {error}") from error
    try:
        return tuple(float(number) for number in coef.split(","))
    except ValueError:
        raise UsageError(f"--coef must be numbers >= 0, got {coef!r}") from None


def check(settings: Settings) -> None:
    """Raise UsageError for what is wrong with the flags, before anything is loaded or made."""
    from kd2m_jax.internal import terms

    d, t, r = settings.distillation, settings.training, settings.run
    if isinstance(r, OwnDataRun) and r.data_dir is not None:
        raise UsageError("--data-dir has no meaning here")
    if not 0 <= t.seed < 2**32:
        raise UsageError(f"--seed must be at least 0 and below 2^32, got {t.seed}")
    for flag, values in (("--coef", coefficients(d)), ("--task-coef", (d.task_coef,))):
        for value in values:
            if not isinstance(value, str) and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{flag} must be a number >= 0, got {value}")
    if d.coef.startswith("auto") and d.task_coef == 0:
        raise UsageError("--coef=auto follows the cross-entropy, and --task-coef is 0")
    if d.coef == "published" and d.task_coef != 1:
        raise UsageError("--coef=published brings its own weight of the labels: no --task-coef")
    count = len(terms(d.metric))
    if len(coefficients(d)) != count and not isinstance(coefficients(d)[0], str):
        raise UsageError(f"--coef needs {count} numbers for --metric={d.metric}, got {d.coef}")
    _check_options(settings)
    for flag, value in (
        ("--epochs", t.epochs),
        ("--batch-size", t.batch_size),
        ("--per-class", t.per_class),
        ("--max-steps", r.max_steps),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, got {value}")
    if isinstance(settings, ImagesSettings):
        _check_images(settings)
    if not r.save_every >= 0:
        raise UsageError(f"--save-every must be >= 0 seconds, got {r.save_every:g}")
    _check_processes(r)


def _check_options(settings: Settings) -> None:
    t = settings.training
    if t.lr is not None and not (t.lr > 0 and math.isfinite(t.lr)):
        raise UsageError(f"--lr must be above 0, got {t.lr}")
    for flag, value, low, high in (
        ("--weight-decay", t.weight_decay, 0, math.inf),
        ("--label-smoothing", t.label_smoothing, 0, 1),
        ("--mixup", t.mixup, 0, math.inf),
        ("--ema", t.ema, 0, 1),
    ):
        if value is not None and not (low <= value < high and math.isfinite(value)):
            below = "" if high == math.inf else f" and below {high}"
            raise UsageError(f"{flag} must be at least {low}{below}, got {value}")
    if t.early_stop is not None and t.early_stop < 1:
        raise UsageError(f"--early-stop must be at least 1, got {t.early_stop}")
    if (t.mixup or t.label_smoothing) and getattr(settings, "labels_per_class", None):
        raise UsageError(
            "--mixup and --label-smoothing change labels, and with --labels-per-class most "
            "pictures have none: leave them out"
        )


def _check_images(images: ImagesSettings) -> None:
    if images.train is None and images.dataset is None:
        raise UsageError("--train is needed: a folder with a folder of pictures per class")
    if images.dataset is not None and (images.train or images.test):
        raise UsageError("--dataset and --train or --test are two sources: give one")
    if images.dataset is not None and not images.dataset.removeprefix("hf:"):
        raise UsageError("--dataset=hf:NAME needs the name")
    if images.dataset is not None and not images.dataset.startswith("hf:"):
        raise UsageError(f"--dataset must be hf:NAME, got {images.dataset}")
    if not 8 <= images.size <= 1024:
        raise UsageError(f"--size must be from 8 to 1024 pixels, got {images.size}")
    if not 0 < images.val_fraction < 1:
        raise UsageError(f"--val-fraction must be between 0 and 1, got {images.val_fraction}")
    if images.labels_per_class is not None and images.labels_per_class < 1:
        raise UsageError(f"--labels-per-class must be at least 1, got {images.labels_per_class}")


def _check_processes(run: Run) -> None:
    count, number = run.num_processes, run.process_id
    given = [value is not None for value in (run.coordinator, count, number)]
    if any(given) and not (run.distributed and all(given)):
        raise UsageError(
            "--coordinator, --num-processes and --process-id come together, with --distributed"
        )
    if count is not None and number is not None and not 0 <= number < count:
        raise UsageError(f"--process-id must be from 0 to {count - 1}, got {number}")
    if run.coordinator and not run.coordinator.rpartition(":")[2].isdigit():
        raise UsageError(f"--coordinator must be HOST:PORT, got {run.coordinator}")
