"""The command line of the training mains: flags with defaults, and one line for a mistake."""

import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import tyro

from kd2m_jax.internal import set_compiler_flags

T = TypeVar("T")


class UsageError(ValueError):
    """Something that a user can mistake: shown as one line, exit status 2."""


def _optional(kind: str, default: str):
    """A flag that may be left out, and what then stands in for it."""
    return tyro.conf.arg(metavar=kind, help_behavior_hint=f"(default: {default})")


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What the student is asked to match, and how strongly."""

    metric: Annotated[
        str,
        tyro.conf.arg(
            help="w2, cw2, jw2, gaussian-w2, kd, ... (README), or none; with options: "
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


@dataclasses.dataclass(frozen=True)
class Networks:
    """Who teaches whom."""

    teacher: str = "resnet34"
    """resnet8/20/56/8x4/32x4/18/34/50, mlp-64-32."""
    student: str = "resnet18"
    """A network of the same names."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """3x3, or 7x7 and pooling."""
    pretrained_teacher: Annotated[str | None, _optional("PTH", "random")] = None
    """.safetensors, .pth, hf:timm/resnet34.tv_in1k."""
    pretrained_student: Annotated[str | None, _optional("PTH", "random")] = None
    """The same for the student."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How all three networks are trained."""

    protocol: str = "kd2m"
    """digits, kd2m (paper), crd (longer)."""
    epochs: Annotated[int | None, _optional("INT", "digits 20, kd2m 15, crd 240")] = None
    """Passes over the data."""
    batch_size: Annotated[int | None, _optional("INT", "digits, kd2m 128; crd 64")] = None
    """Examples a step, on all devices."""
    per_class: Annotated[int | None, _optional("INT", "any")] = None
    """Examples of a class that come together."""
    precision: Literal["f32", "bf16"] = "f32"
    """Losses stay float32."""
    seed: int = 0
    """Of weights, order and augmentation."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Where data comes from and results go."""

    data_dir: Annotated[str | None, _optional("DIR", "~/tensorflow_datasets")] = None
    """Data, fetched if missing."""
    out: Annotated[str | None, _optional("DIR", "runs/<dataset>-<metric>-<seed>")] = None
    """The run folder."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue what is in --out."""
    max_steps: Annotated[int | None, _optional("INT", "no limit")] = None
    """Cut each phase, to try."""
    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One run by several processes."""
    coordinator: Annotated[str | None, _optional("HOST:PORT", "detected")] = None
    """Where process 0 listens."""
    num_processes: Annotated[int | None, _optional("INT", "detected")] = None
    """How many there are."""
    process_id: Annotated[int | None, _optional("INT", "detected")] = None
    """Which this is, from 0."""


# Shown in the first box, with --help; without its docstring, as the others, so that all fits a
# screen.
_FIRST = tyro.conf.arg(name="", help="")
_BOX = tyro.conf.arg(help="")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that a training main takes."""

    distillation: Annotated[tyro.conf.OmitArgPrefixes[Distillation], _FIRST] = Distillation()
    networks: Annotated[tyro.conf.OmitArgPrefixes[Networks], _BOX] = Networks()
    training: Annotated[tyro.conf.OmitArgPrefixes[Training], _BOX] = Training()
    run: Annotated[tyro.conf.OmitArgPrefixes[Run], _BOX] = Run()


@dataclasses.dataclass(frozen=True)
class CifarSettings(Settings):
    """`Settings`, and which of the two CIFARs."""

    dataset: Annotated[
        Literal["cifar10", "cifar100"],
        tyro.conf.arg(help="cifar10 or cifar100.", metavar="NAME"),
    ] = "cifar10"


def main(settings: T, run: Callable[[T], object], *, module: str, description: str | None) -> None:
    """Read the command line over these defaults and run; a mistake is one line and status 2."""
    settings = tyro.cli(
        type(settings),
        args=[_expanded(argument) for argument in sys.argv[1:]],
        default=settings,
        prog=f"python -m {module}",
        description=_summary(description or ""),
    )
    _keep_compiled_programs()
    set_compiler_flags()
    from experiments._common.data import DataError
    from kd2m_jax import CheckpointError, NonFiniteLoss, Stopped
    from kd2m_jax.training._processes import ProcessLost

    if isinstance(settings, Settings):
        again = "the same command with --resume continues"
    else:  # a table takes up what is there without being asked, a study of one run keeps nothing
        again = f"the same command {'starts again' if hasattr(settings, 'run') else 'continues'}"
    try:
        run(settings)
    except (UsageError, DataError, CheckpointError) as error:
        sys.exit(_fail(error, 2))
    except Stopped as stopped:
        sys.exit(_fail(f"stopped and saved; {again}", stopped.code))
    except NonFiniteLoss as error:
        advice = "try a smaller --coef, or a --protocol with a smaller learning rate"
        sys.exit(_fail(f"{error}; {advice}", 1))
    except ProcessLost as lost:
        _fail(f"{lost}; the same command with --resume continues", 1)
        os._exit(1)  # the ordinary end waits for all processes
    except KeyboardInterrupt:
        sys.exit(_fail(f"stopped; {again}", 130))


def _summary(doc: str) -> str:
    """The first paragraph of a main's docstring, and its first command."""
    summary, _, rest = doc.partition("\n\n")
    return f"{summary}\n    {rest.strip().splitlines()[0]}" if rest else summary


def _expanded(argument: str) -> str:
    """``--flag=~/x`` with the user's home, which a shell expands only after a blank."""
    flag, equals, value = argument.partition("=")
    return flag + equals + os.path.expanduser(value)


def _keep_compiled_programs() -> None:
    """Tell JAX, before it is imported, to keep XLA's programs in the user's cache."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "kd2m_jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _fail(message: object, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def coefficients(distillation: Distillation) -> tuple[float | str, ...]:
    """The numbers in --coef, "auto:RATIO" or "published"."""
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
    from experiments._common.protocols import PROTOCOLS
    from kd2m_jax.losses._checks import did_you_mean

    d, t, r = settings.distillation, settings.training, settings.run
    if t.seed < 0:
        raise UsageError(f"--seed must be at least 0, got {t.seed}")
    for flag, values in (("--coef", coefficients(d)), ("--task-coef", (d.task_coef,))):
        for value in values:
            if not isinstance(value, str) and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{flag} must be a number >= 0, got {value}")
    if d.coef.startswith("auto") and d.task_coef == 0:
        raise UsageError("--coef=auto follows the cross-entropy, and --task-coef is 0")
    if d.coef == "published" and d.task_coef != 1:
        raise UsageError("--coef=published brings its own weight of the labels: no --task-coef")
    terms = d.metric.count("+") + 1
    if len(coefficients(d)) != terms and not isinstance(coefficients(d)[0], str):
        raise UsageError(f"--coef needs {terms} numbers for --metric={d.metric}, got {d.coef}")
    if t.protocol not in PROTOCOLS:
        raise UsageError(f"unknown protocol {t.protocol!r}: {did_you_mean(t.protocol, PROTOCOLS)}")
    for flag, value in (
        ("--epochs", t.epochs),
        ("--batch-size", t.batch_size),
        ("--per-class", t.per_class),
        ("--max-steps", r.max_steps),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, got {value}")
    _check_processes(r)


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
