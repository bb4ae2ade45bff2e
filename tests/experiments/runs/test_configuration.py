"""What decides a run's result: config.json to and fro, and the teacher's name in the cache."""

import dataclasses
import json

import pytest

from experiments import digits
from experiments.common.errors import UsageError
from experiments.data.load import load
from experiments.runs.build import build, solvers
from experiments.runs.configuration import ABSENT, RunConfig, configuration
from experiments.runs.folder import RunFolder
from experiments.runs.settings import Distillation, Run

# What this version's predecessors wrote, to the byte.
WRITTEN = """{
  "dataset": "digits",
  "data_sha256": "DATA",
  "train_examples": 1347,
  "preprocessing": "mean (4.884,), std (6.016,), crop 0, flip False",
  "metric": "kd",
  "coef": [
    "published"
  ],
  "task_coef": 0.1,
  "teacher": "resnet8",
  "student": "mlp-32-64",
  "stem": "cifar",
  "pretrained_teacher": null,
  "teacher_sha256": null,
  "pretrained_student": null,
  "student_sha256": null,
  "protocol": "digits",
  "optimizer": "SGD 0.1, momentum 0.9, cosine to 0",
  "epochs": 20,
  "batch_size": 128,
  "per_class": null,
  "precision": "f32",
  "seed": 0,
  "max_steps": null,
  "published": {
    "coef": 0.9,
    "task_coef": 0.1,
    "decay_from": 1.0
  },
  "parameters": {
    "teacher": 77754,
    "student": 4842
  }
}
"""


def settings(metric="cw2", coef="1e-3"):
    return dataclasses.replace(digits.DEFAULTS, distillation=Distillation(metric, coef))


def test_config_json_keeps_its_bytes(tmp_path):
    plan = build(settings("kd", "published"), load("digits"))
    with RunFolder(tmp_path).opened(plan.config, resume=False) as folder:
        text = (tmp_path / "config.json").read_text()
        assert text == WRITTEN.replace("DATA", plan.config.data_sha256)
        assert folder.config == plan.config  # and is read back


def test_weights_that_are_not_published_are_not_written():
    config = configuration(settings(), load("digits"))
    assert "published" not in config.to_json()
    assert config.to_json()["coef"] == [0.001]
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def old_folder(path, config, lacks):
    """Return the folder of a run that was made before some keys were written down."""
    path.mkdir()
    content = {key: value for key, value in config.to_json().items() if key not in lacks}
    (path / "config.json").write_text(json.dumps(content))
    return RunFolder(path)


def test_a_run_from_before_a_key_was_written_down_is_resumed(tmp_path):
    config = build(settings(), load("digits")).config
    lacks = [key for key in ABSENT if ABSENT[key] == getattr(config, key)]
    assert {"stem", "per_class", "pretrained_teacher"} <= set(lacks)
    folder = old_folder(tmp_path / "run", config, [*lacks, "train_examples"])
    with folder.opened(config, resume=True):
        assert folder.config == config
    assert not list(tmp_path.glob("run/previous-*"))


def test_an_absent_key_means_what_the_code_did_then(tmp_path):
    config = build(settings(), load("digits")).config
    folder = old_folder(tmp_path / "run", config, ["stem", "per_class"])
    now = dataclasses.replace(config, stem="imagenet", per_class=4)
    what = r"stem cifar -> imagenet, per_class None -> 4\)"
    with pytest.raises(UsageError, match=what), folder.opened(now, resume=True):
        pass


def test_a_run_goes_on_where_its_pictures_were_moved():
    """What they are is in data_sha256; any other change is one."""
    config = configuration(settings(), load("digits"))
    images = {"train": "photos", "test": None, "size": 64, "classes": ["a", "b"]}
    one, moved, other = (
        dataclasses.replace(config, images=images | change)
        for change in ({}, {"train": "/photos/", "test": "b"}, {"size": 32})
    )
    assert one.changes(moved) == {}
    assert list(one.changes(other)) == ["images"]


def of_run(metric, out, *, resume):
    run = Run(out=str(out), resume=resume)
    return build(dataclasses.replace(settings(metric, "1e-3"), run=run), load("digits"))


def test_a_run_goes_on_with_the_solver_that_it_began_with(tmp_path):
    """Before it was written down, w2, cw2 and jw2 took Sinkhorn where nothing was said."""
    begun = of_run("jw2+kd", tmp_path / "new", resume=False)
    assert begun.config.to_json()["solver"] == "auto"
    assert solvers(begun.metric) == {"jw2": "exact"}  # on a CPU
    old_folder(tmp_path / "old", begun.config, ["solver"])
    for metric in ("jw2+kd", "JW2+kd"):
        plan = of_run(metric, tmp_path / "old", resume=True)
        assert "solver" not in plan.config.to_json()
        assert solvers(plan.metric) == {"jw2": "sinkhorn"}
        with RunFolder(tmp_path / "old").opened(plan.config, resume=True) as folder:
            assert solvers(build(folder.config, load("digits")).metric) == solvers(plan.metric)
    assert of_run("jw2+kd", tmp_path / "old", resume=False).config == begun.config


def test_the_solver_of_a_metric_that_names_it_or_has_none(tmp_path):
    for metric in ("w2:solver=exact", "lohit", "kd", "none"):
        assert "solver" not in of_run(metric, tmp_path, resume=False).config.to_json()
    for metric, solver in (("w2:solver=exact", "exact"), ("lohit", "ipot"),
                           ("cw2:debiased=True", "sinkhorn")):  # fmt: skip
        assert solvers(of_run(metric, tmp_path, resume=False).metric) == {metric: solver}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"colour": 1}, "unknown colour"), ({"metric": None}, "missing metric")],
)
def test_what_is_not_the_configuration_of_a_run_is_refused(change, message, tmp_path):
    content = configuration(settings(), load("digits")).to_json()
    for key, value in change.items():
        content[key] = value
        if value is None:
            del content[key]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        _ = RunFolder(tmp_path).config


def test_teachers_are_told_apart_by_all_that_made_them():
    settings = dataclasses.replace(digits.DEFAULTS, run=Run())
    data = load("digits")
    ours = configuration(settings, data)
    name = ours.teacher_name
    others = [
        configuration(settings, dataclasses.replace(data, train=data.test)),
        *(
            configuration(settings, dataclasses.replace(data, **change))
            for change in ({"mean": (5.0,)}, {"std": (5.0,)}, {"crop_padding": 1}, {"flip": True})
        ),
        *(
            dataclasses.replace(ours, **change)
            for change in ({"optimizer": "SGD 0.2"}, {"seed": 1}, {"epochs": 21})
        ),
        *(
            dataclasses.replace(ours, **change)
            for change in ({"teacher_sha256": "0"}, {"precision": "bf16"})
        ),
    ]
    assert len({name, *(other.teacher_name for other in others)}) == 1 + len(others)
    same = dataclasses.replace(ours, metric="w2", coef=(1.0,), student="mlp-8")
    assert same.teacher_name == name
