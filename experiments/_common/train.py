"""Teacher, student alone, distilled student: what every training main does."""

import contextlib
import functools
import inspect
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from experiments._common import report
from experiments._common.configuration import configuration, teacher_name
from experiments._common.folder import RunFolder
from experiments.common.errors import UsageError
from experiments.data.augment import preprocess
from experiments.data.load import load
from experiments.data.specs import Dataset
from experiments.runs.protocols import PROTOCOLS
from experiments.runs.settings import Run, Settings, check
from kd2m_jax import FitResult, Network, Outputs, fit, losses, models, projected
from kd2m_jax._batches import steps_per_epoch
from kd2m_jax._locks import locked
from kd2m_jax._processes import (
    after_first,
    by_first,
    gathered,
    held_by_first,
    is_first,
    start,
    watched,
)

LOG_EVERY = 10


def train_and_report(settings: Settings, dataset_name: str) -> None:
    """Run the three phases into a run folder and print its table."""
    check(settings)
    with started(settings.run):
        check_names(settings)
        dataset = after_first(lambda: load(dataset_name, settings.run.data_dir))
        path = distil(settings, dataset)
        print(f"\n{report.text_table(path)}\n\nReport: {path / 'report.md'}")


@contextlib.contextmanager
def started(run: Run):
    """With the other processes, if there are any; all but the first keep quiet."""
    if not run.distributed:
        yield
        return
    try:
        start(run.coordinator, run.num_processes, run.process_id)
    except ValueError as error:
        raise UsageError(
            "--distributed detects no Slurm, Open MPI or TPU pod here: give --coordinator, "
            "--num-processes and --process-id"
        ) from error
    with contextlib.ExitStack() as stack, watched():
        if not is_first():
            # Now, for JAX itself ends this process when the first one is gone.
            print(
                f"Process {jax.process_index()}: process 0 prints. Should the run break off, the "
                "same command in each, with --resume, continues it.",
                file=sys.stderr,
            )
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
        yield


def distil(settings: Settings, dataset: Dataset, alone: pathlib.Path | None = None) -> pathlib.Path:
    """Train teacher, student alone and distilled student; returns the run folder.

    ``alone`` is where the checkpoints of the student alone are kept, if not in the run folder: a
    table trains it once for all metrics.
    """
    config, teacher, student = configured(settings, dataset)
    _check_processes_agree(config)
    metric = _metric(config)
    _check_batch(config, dataset)
    distilled = student if metric is None else _with_projector(student, teacher, dataset, metric)
    out = settings.run.out or f"runs/{dataset.name}-{config['metric']}-{config['seed']}"
    opened = RunFolder.opened(out, config, resume=settings.run.resume)
    with held_by_first(opened) as folder:
        devices = [d.device_kind for d in jax.devices()]
        by_first(lambda: folder.write_environment(devices=devices, backend=jax.default_backend()))
        phase = functools.partial(run_phase, folder, config, dataset)
        cache = folder.path.parent / "teachers" / teacher_name(config)
        lock = locked(cache / ".training", waiting=print)  # several runs share a teacher
        with held_by_first(lock):
            trained = phase("teacher", teacher, cache).student
        phase("student", student, alone or folder.checkpoints / "student")
        if metric is not None:
            phase(
                "distilled",
                distilled,
                folder.checkpoints / "distilled",
                teacher=trained,
                metric=_with_class_cost(metric, trained, dataset),
                coef=coefficient(config, dataset),
                task_coef=config["task_coef"],
            )
        by_first(lambda: report.write(folder.path))
    return folder.path


def _check_processes_agree(config: dict) -> None:
    """Raise UsageError, in all processes, where one was started with other settings."""
    first, *others = map(json.loads, gathered(json.dumps(config)))
    for number, other in enumerate(others, 1):
        if changed := [k for k in first if first[k] != other[k]]:
            what = ", ".join(f"{k} {first[k]} in 0, {other[k]} in {number}" for k in changed)
            raise UsageError(f"processes 0 and {number} were started with other settings: {what}")


def run_phase(
    folder: RunFolder,
    config: dict,
    dataset: Dataset,
    name: str,
    network: nnx.Module | Network,
    checkpoint_dir: pathlib.Path,
    **distillation,
) -> FitResult:
    """Train one network, with a progress bar, into the run folder."""
    per_epoch = _steps_per_epoch(config, dataset)
    steps = min(config["epochs"] * per_epoch, config["max_steps"] or math.inf)
    images = int(steps) * config["batch_size"]
    with tqdm(
        desc=report.TITLES[name],
        total=images,
        unit=" images",
        unit_scale=True,
        leave=None,  # under a table's bar this one goes when it is done
        disable=not is_first(),
    ) as bar:
        progress = Progress(bar, config["batch_size"])
        result = fit(
            network,
            dataset.train,
            eval_data=dataset.test,
            preprocess=preprocess(dataset),
            optimizer=PROTOCOLS[config["protocol"]].optimizer(config["epochs"], per_epoch),
            epochs=config["epochs"],
            batch_size=config["batch_size"],
            per_class=config["per_class"],
            seed=config["seed"],
            max_steps=config["max_steps"],
            log_every=LOG_EVERY,
            callbacks=[folder.phase(name), progress] if is_first() else [],
            checkpoint_dir=checkpoint_dir,
            **distillation,
        )
    if speed := progress.images_per_second():
        folder.write_speed(name, speed)
    return result


def _steps_per_epoch(config: dict, dataset: Dataset) -> int:
    return steps_per_epoch(dataset.train[1], config["batch_size"], config["per_class"])


def coefficient(config: dict, dataset: Dataset) -> float | str | Callable:
    """Lambda as `kd2m_jax.fit` takes it."""
    if config["coef"] == ["published"]:
        # Like the optimizer's schedule over all epochs, whether max_steps cuts them or not.
        total = config["epochs"] * _steps_per_epoch(config, dataset)
        return losses.published(config["metric"], total)[0]
    # A sum of metrics has its terms' weights inside.
    return config["coef"][0] if len(config["coef"]) == 1 else 1.0


class Progress:
    """Moves a bar; what an interrupted run had done counts as done, not as speed."""

    def __init__(self, bar: tqdm, batch_size: int):
        self._bar, self._batch_size = bar, batch_size
        self._scores, self._marks = {}, []

    def __call__(self, record: dict) -> None:
        """A callback of `kd2m_jax.fit`."""
        bar, images = self._bar, record["step"] * self._batch_size
        self._scores["loss"] = f"{record['loss']:.3f}"
        if "test_accuracy" in record:
            self._scores["test"] = f"{100 * record['test_accuracy']:.1f}%"
        bar.set_postfix(self._scores, refresh=False)
        if record.get("replayed"):
            bar.initial = bar.n = images
            return
        bar.update(images - bar.n)
        self._marks.append((time.perf_counter(), images))

    def images_per_second(self) -> float | None:
        """From the first record, so without compilation, to the last; evaluations included."""
        if len(self._marks) < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start)


def _metric(config: dict) -> losses.Metric | losses.MetricSum | None:
    if config["metric"] == "none":
        return None
    metric = losses.get_metric(config["metric"])
    if isinstance(metric, losses.MetricSum) and len(config["coef"]) > 1:
        return losses.metric_sum(metric.metrics, config["coef"])
    return metric  # auto weighs a sum as one


def check_names(settings: Settings) -> None:
    """Raise UsageError for a metric or network that does not exist, before any data is read."""
    try:
        if settings.distillation.metric != "none":
            losses.get_metric(settings.distillation.metric)
            if settings.distillation.coef == "published":
                losses.published(settings.distillation.metric, 1)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    for role in ("teacher", "student"):
        name = getattr(settings.networks, role)

        def build(name=name):  # its structure alone, on an image of any size
            return models.build(name, num_classes=10, image_shape=(32, 32, 3), rngs=nnx.Rngs(0))

        try:
            nnx.eval_shape(build)
        except ValueError as error:
            raise UsageError(f"--{role}: {error}") from error


def _network(role: str, dataset: Dataset, config: dict) -> nnx.Module:
    """A network by its name, with random or pretrained weights."""
    dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[config["precision"]]
    network = models.build(
        config[role],
        num_classes=len(dataset.classes),
        image_shape=dataset.train[0].shape[1:],
        rngs=nnx.Rngs(config["seed"]),
        stem=config["stem"],
        dtype=dtype,
    )
    path = config[f"pretrained_{role}"]
    if path is None:
        return network
    try:
        return models.load_torch_weights(network, path, replace_head=True)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(f"--pretrained-{role}: {error}") from error


def _parameters(network: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


def _check_batch(config: dict, dataset: Dataset) -> None:
    size, devices = config["batch_size"], jax.device_count()
    if size > len(dataset.train[0]):
        raise UsageError(
            f"--batch-size {size} is larger than the training set ({len(dataset.train[0])} images)"
        )
    if config["per_class"] and size % config["per_class"]:
        raise UsageError(f"--per-class {config['per_class']} does not divide --batch-size {size}")
    if run := config["per_class"]:
        filled = sum(count // run * run for count in np.bincount(dataset.train[1]))
        if filled < size:
            raise UsageError(
                f"--per-class {run} leaves {filled} images, fewer than --batch-size {size}"
            )
    if size % devices:
        raise UsageError(f"--batch-size {size} does not split evenly over {devices} devices")


def _with_projector(student: nnx.Module | Network, teacher: nnx.Module, dataset: Dataset, metric):
    """The student, with a projector where what the metric compares has unequal sizes."""
    x = jnp.zeros((1, *dataset.train[0].shape[1:]))
    mine, theirs = (nnx.eval_shape(lambda m: m(x), m) for m in (student, teacher))
    dim, channels, what = None, None, []
    for term in metric.metrics if isinstance(metric, losses.MetricSum) else (metric,):
        size = theirs.features.shape[-1]
        if term.projector == "features" and mine.features.shape[-1] != size:
            dim = size
        if term.projector == "maps":
            if not (mine.maps and theirs.maps):
                raise UsageError(
                    f"{term.name} compares convolutional maps, which an MLP does not have"
                )
            channels = theirs.maps[-1].shape[-1]
    if dim:
        what.append(f"{mine.features.shape[-1]} features to the teacher's {dim}")
    if channels:
        what.append(f"last map to the teacher's {channels} channels")
    if what:
        student = network = projected(student, dim, channels=channels)
        variables = network.init(jax.random.key(0), x)
        mine, _ = jax.eval_shape(lambda x: network.apply(*variables, x, train=False), x)
    _try_out(metric, mine, theirs)
    for each in what:
        print(f"A projector from the student's {each} is trained with it, and left out afterwards.")
    return student


def _with_class_cost(metric, teacher: nnx.Module, dataset: Dataset):
    """A metric that takes costs between classes, with those of the trained teacher's features."""
    if isinstance(metric, losses.MetricSum):
        terms = [_with_class_cost(term, teacher, dataset) for term in metric.metrics]
        return losses.metric_sum(terms, metric.weights)
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
    return losses.get_metric(metric.written, class_cost=cost)


def _try_out(metric, student: Outputs, teacher: Outputs) -> None:
    """Raise UsageError now for a metric that these networks do not suit."""
    labels = jnp.zeros(1, int)
    try:
        jax.eval_shape(lambda s, t: metric(s, t, labels, key=jax.random.key(0)), student, teacher)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--metric={metric.label}: {error}") from error


def configured(settings: Settings, dataset: Dataset) -> tuple[dict, nnx.Module, nnx.Module]:
    """What `distil` puts into config.json, and the teacher and student that it starts from."""
    config = configuration(settings, dataset)
    metric = _metric(config)
    known = losses.METRICS[metric.name].published if isinstance(metric, losses.Metric) else None
    if known and config["coef"] == ["published"]:
        config |= {"published": known._asdict(), "task_coef": known.task_coef}
    teacher, student = (_network(role, dataset, config) for role in ("teacher", "student"))
    config["parameters"] = {"teacher": _parameters(teacher), "student": _parameters(student)}
    return config, teacher, student


def fit_options(config: dict, dataset: Dataset) -> dict[str, Any]:
    """What a configuration means to `fit`, whatever the phase."""
    per_epoch = steps_per_epoch(dataset.train[1], config["batch_size"], config["per_class"])
    return {
        "preprocess": preprocess(dataset),
        "optimizer": PROTOCOLS[config["protocol"]].optimizer(config["epochs"], per_epoch),
        "epochs": config["epochs"],
        "batch_size": config["batch_size"],
        "per_class": config["per_class"],
        "seed": config["seed"],
        "max_steps": config["max_steps"],
    }
