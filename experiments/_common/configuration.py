"""What decides a run's result: its configuration, and the hashes of what it reads."""

import hashlib
import json

from experiments.common.errors import UsageError
from experiments.data.specs import Dataset, data_sha256, sha256
from experiments.runs.protocols import PROTOCOLS
from experiments.runs.settings import Settings, coefficients
from kd2m_jax._torch_weights import local_file
from kd2m_jax.losses._metrics import spelled

_TEACHERS = ("dataset", "data_sha256", "teacher", "stem", "pretrained_teacher", "teacher_sha256")
_TEACHERS += ("protocol", "optimizer", "epochs", "batch_size", "per_class", "precision", "seed")
_TEACHERS += ("max_steps", "preprocessing")


def teacher_name(config: dict) -> str:
    """A teacher's folder in the cache: its name and the hash of all that made it."""
    made_of = json.dumps({key: config[key] for key in _TEACHERS})
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    return f"{config['dataset']}-{config['teacher']}-{digest}"


def configuration(settings: Settings, dataset: Dataset) -> dict:
    """Everything that decides the result, flat, as config.json has it."""
    d, n, t = settings.distillation, settings.networks, settings.training
    protocol = PROTOCOLS[t.protocol]
    moments = f"mean {dataset.mean}, std {dataset.std}"
    return {
        "dataset": dataset.name,
        "data_sha256": data_sha256(dataset),
        "train_examples": len(dataset.train[0]),
        "preprocessing": f"{moments}, crop {dataset.crop_padding}, flip {dataset.flip}",
        "metric": spelled(d.metric),
        "coef": list(coefficients(d)),
        "task_coef": d.task_coef,
        "teacher": n.teacher,
        "student": n.student,
        "stem": n.stem,
        "pretrained_teacher": n.pretrained_teacher,
        "teacher_sha256": _file_sha256("teacher", n.pretrained_teacher),
        "pretrained_student": n.pretrained_student,
        "student_sha256": _file_sha256("student", n.pretrained_student),
        "protocol": t.protocol,
        "optimizer": protocol.summary,
        "epochs": t.epochs or protocol.epochs,
        "batch_size": t.batch_size or protocol.batch_size,
        "per_class": t.per_class,
        "precision": t.precision,
        "seed": t.seed,
        "max_steps": settings.run.max_steps,
    }


def _file_sha256(role: str, path: str | None) -> str | None:
    """Of torch weights, fetched first where they are on a hub."""
    if path is None:
        return None
    try:
        return sha256(local_file(path).read_bytes())
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(f"--pretrained-{role}: {error}") from error
