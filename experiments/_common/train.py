"""Teacher, student alone, distilled student: what every training main does."""

import functools
import hashlib
import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from experiments._common import report
from experiments._common.augment import preprocess
from experiments._common.cli import Distillation, Settings, UsageError, check, coefficients
from experiments._common.data import Dataset, load
from experiments._common.folder import RunFolder
from experiments._common.protocols import PROTOCOLS
from kd2m_jax import FitResult, Network, Outputs, fit, losses, models, projected

LOG_EVERY = 10


def train_and_report(settings: Settings, dataset_name: str) -> None:
    """Run the three phases into a run folder and print its table."""
    check(settings)
    _check_networks(settings)
    metric = _metric(settings.distillation)
    dataset = load(dataset_name, settings.run.data_dir)
    config = configuration(settings, dataset)
    teacher, student = (_network(role, dataset, config) for role in ("teacher", "student"))
    config["parameters"] = {"teacher": _parameters(teacher), "student": _parameters(student)}
    _check_batch(config, dataset)
    distilled = student if metric is None else _with_projector(student, teacher, dataset, metric)
    out = settings.run.out or f"runs/{dataset_name}-{config['metric']}-{config['seed']}"
    folder = RunFolder(out, config, resume=settings.run.resume)
    folder.write_environment(
        devices=[d.device_kind for d in jax.local_devices()], backend=jax.default_backend()
    )
    phase = functools.partial(run_phase, folder, config, dataset)

    teacher_id = {k: v for k, v in config.items() if k not in _NOT_THE_TEACHERS}
    digest = hashlib.sha256(json.dumps(teacher_id, sort_keys=True).encode()).hexdigest()[:12]
    cache = folder.path.parent / "teachers" / f"{dataset_name}-{config['teacher']}-{digest}"
    teacher = phase("teacher", teacher, cache).student
    phase("student", student, folder.checkpoints / "student")
    if metric is not None:
        phase(
            "distilled",
            distilled,
            folder.checkpoints / "distilled",
            teacher=teacher,
            metric=metric,
            # A sum of metrics has its terms' weights inside.
            coef=1.0 if "+" in config["metric"] else config["coef"][0],
            task_coef=config["task_coef"],
        )
    report.write(folder.path)
    print(f"\n{report.text_table(folder.path)}\n\nReport: {folder.path / 'report.md'}")


_NOT_THE_TEACHERS = ("metric", "coef", "task_coef", "student", "pretrained_student", "parameters")


def configuration(settings: Settings, dataset: Dataset) -> dict:
    """Everything that decides the result, flat, as config.json has it."""
    d, n, t = settings.distillation, settings.networks, settings.training
    protocol = PROTOCOLS[t.protocol]
    return {
        "dataset": dataset.name,
        "metric": d.metric.replace("_", "-").lower(),
        "coef": list(coefficients(d)),
        "task_coef": d.task_coef,
        "teacher": n.teacher,
        "student": n.student,
        "stem": n.stem,
        "pretrained_teacher": n.pretrained_teacher,
        "pretrained_student": n.pretrained_student,
        "protocol": t.protocol,
        "epochs": t.epochs or protocol.epochs,
        "batch_size": t.batch_size or protocol.batch_size,
        "per_class": t.per_class,
        "precision": t.precision,
        "seed": t.seed,
        "max_steps": settings.run.max_steps,
    }


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
    # With per_class an epoch is a few steps shorter, for examples that do not fill a run.
    steps_per_epoch = len(dataset.train[0]) // config["batch_size"]
    optimizer = PROTOCOLS[config["protocol"]].optimizer(config["epochs"], steps_per_epoch)
    with tqdm(desc=report.TITLES[name], unit=" images", unit_scale=True) as bar:
        return fit(
            network,
            dataset.train,
            eval_data=dataset.test,
            preprocess=preprocess(dataset),
            optimizer=optimizer,
            epochs=config["epochs"],
            batch_size=config["batch_size"],
            per_class=config["per_class"],
            seed=config["seed"],
            max_steps=config["max_steps"],
            log_every=LOG_EVERY,
            callbacks=[folder.phase(name), _progress(bar, config["batch_size"])],
            checkpoint_dir=checkpoint_dir,
            **distillation,
        )


def _progress(bar: tqdm, batch_size: int):
    scores = {}

    def update(record: dict) -> None:
        bar.total = record["steps"] * batch_size
        scores.update(loss=f"{record['loss']:.3f}")
        if "test_accuracy" in record:
            scores.update(test=f"{100 * record['test_accuracy']:.1f}%")
        bar.set_postfix(scores, refresh=False)
        bar.update(record["step"] * batch_size - bar.n)

    return update


def _metric(distillation: Distillation) -> losses.Metric | losses.MetricSum | None:
    if distillation.metric == "none":
        return None
    try:
        metric = losses.get_metric(distillation.metric)
        if isinstance(metric, losses.MetricSum):
            return losses.metric_sum(metric.metrics, coefficients(distillation))
        return metric
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_networks(settings: Settings) -> None:
    """Raise UsageError for a network that does not exist, before any data is read."""
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
    size, devices = config["batch_size"], jax.local_device_count()
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


def _with_projector(student: nnx.Module, teacher: nnx.Module, dataset: Dataset, metric):
    """The student, with a projector where what the metric compares has unequal sizes."""
    x = jnp.zeros((1, *dataset.train[0].shape[1:]))
    mine, theirs = (nnx.eval_shape(lambda m: m(x), m) for m in (student, teacher))
    terms = metric.metrics if isinstance(metric, losses.MetricSum) else (metric,)
    dim = channels = None
    for term in terms:
        takes = inspect.signature(losses.METRICS[term.name].function).parameters
        # Gromov-Wasserstein compares distances within each space, so sizes may differ.
        if "z_s" in takes and term.on == "features" and term.name != "gw2":
            size = theirs.features.shape[-1]
            dim = size if mine.features.shape[-1] != size else None
        if term.name == "wkd-f":  # its projector is part of the method, also at equal sizes
            if not (mine.maps and theirs.maps):
                raise UsageError("wkd-f compares convolutional maps, which an MLP does not have")
            channels = theirs.maps[-1].shape[-1]
    if dim is None and channels is None:
        _try_out(metric, mine, theirs)
        return student
    if dim:
        what = f"{mine.features.shape[-1]} features to the teacher's {dim}"
    else:
        what = f"last map to the teacher's {channels} channels"
    print(f"A projector from the student's {what} is trained with it, and left out afterwards.")
    return projected(student, dim, channels=channels)


def _try_out(metric, student: Outputs, teacher: Outputs) -> None:
    """Raise UsageError now for a metric that these networks do not suit."""
    labels = jnp.zeros(1, int)
    try:
        jax.eval_shape(lambda s, t: metric(s, t, labels, key=jax.random.key(0)), student, teacher)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--metric={metric.label}: {error}") from error
