"""What the shell says of a command line that cannot be: one sentence that names the flag."""

import dataclasses

import pytest
import tyro

from experiments import digits, images, mnist, table
from experiments.common.mistakes import mistake
from experiments.evaluate import Evaluate
from experiments.predict import Predict

NEEDS_RUN = Evaluate(run=tyro.MISSING)
PREDICTS = Predict(pictures=tyro.MISSING, run=tyro.MISSING)


@pytest.mark.parametrize(
    ("defaults", "arguments", "expected"),
    [
        (digits.DEFAULTS, "--metrc=w2", "there is no flag --metrc: did you mean --metric?"),
        (digits.DEFAULTS, "--no-resume", "there is no flag --no-resume: did you mean --resume?"),
        (digits.DEFAULTS, "-x", "there is no flag -x"),
        (digits.DEFAULTS, "--solver-of w2 exact", "there is no flag --solver-of"),
        (digits.DEFAULTS, "--data-dir=a", "--data-dir has no meaning here"),
        (digits.DEFAULTS, "w2", "'w2' is no flag: flags begin with --"),
        (digits.DEFAULTS, "--lr", "--lr needs a value"),
        (digits.DEFAULTS, "--lr --resume", "--lr needs a value"),
        (digits.DEFAULTS, "--protocol", "--protocol needs a value: one of digits, kd2m, crd"),
        (digits.DEFAULTS, "--protocol=crdd", "--protocol cannot be 'crdd': did you mean crd?"),
        (digits.DEFAULTS, "--stem=x", "--stem cannot be 'x': one of cifar, imagenet"),
        (digits.DEFAULTS, "--lr=fast", "--lr must be a number, got 'fast'"),
        (digits.DEFAULTS, "--epochs 1.5", "--epochs must be a whole number, got '1.5'"),
        (digits.DEFAULTS, "--batch_size=x", "--batch-size must be a whole number, got 'x'"),
        (digits.DEFAULTS, "--resume=yes", "--resume takes no value, got 'yes'"),
        (images.DEFAULTS, "--skip-unreadable a", "'a' is no flag: flags begin with --"),
        (table.Table(), "--metrics w2 --seeds", "--seeds needs a value"),
        (NEEDS_RUN, "", "--run is needed; --help says what it is"),
        (NEEDS_RUN, "--run=a --config=b", "there is no flag --config"),
        (PREDICTS, "a.png", "--run is needed; --help says what it is"),
    ],
)
def test_a_mistake_is_one_sentence(defaults, arguments, expected):
    assert mistake(arguments.split(), defaults) == expected


@pytest.mark.parametrize(
    ("defaults", "arguments"),
    [
        (digits.DEFAULTS, ""),
        (digits.DEFAULTS, "--lr -1 --epochs None --resume --batch_size 3 --metric=kd+cw2"),
        (digits.DEFAULTS, "-h --metrc"),
        (table.Table(), "--metrics w2 cw2=1e-2 --seeds=2 --dataset"),
        (NEEDS_RUN, "--run a"),
        (PREDICTS, "--run a b.png c.png"),
        (PREDICTS, "b.png --run=a"),
    ],
)
def test_what_is_no_mistake_is_left_to_be_read(defaults, arguments):
    assert mistake(arguments.split(), defaults) is None


def test_every_flag_of_a_training_main_is_known():
    """With a value of its own kind: a flag that is overlooked here would be refused."""
    for group in ("distillation", "networks", "training", "run"):
        for field in dataclasses.fields(getattr(mnist.DEFAULTS, group)):
            value = getattr(getattr(mnist.DEFAULTS, group), field.name)
            given = [f"--{field.name}"] + ([] if value is False else [str(value)])
            assert field.name == "solver_of" or mistake(given, mnist.DEFAULTS) is None
