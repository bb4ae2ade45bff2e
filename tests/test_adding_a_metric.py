"""Adding a metric takes what docs/adding_a_metric.md says: a function, a line in the catalogue."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from kd2m_jax import fit, losses, models

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "docs/adding_a_metric.md").read_text()


def l1(z_s, z_t, *, power: float = 1.0):
    """Mean of the features' absolute differences."""
    return jnp.mean(jnp.sum(jnp.abs(z_s - z_t) ** power, axis=1))


def test_a_metric_added_at_run_time_trains(monkeypatch):
    monkeypatch.setitem(losses.METRICS, "l1", losses.MetricInfo(l1, "|z_S - z_T|", "here"))
    x = jax.random.normal(jax.random.key(0), (64, 4))
    data = (x, (x[:, 0] > 0).astype(int))
    teacher, student = (models.MLP((8,), 2, in_features=4, rngs=nnx.Rngs(s)) for s in (0, 1))
    metric = losses.get_metric("L1:power=2")
    assert metric == losses.get_metric("l1", power=2) and metric.projector == "features"
    options = {"teacher": teacher, "batch_size": 32, "epochs": 8, "optimizer": optax.sgd(0.05)}
    for chosen in (metric, "l1", "l1@logits", "l1:power=2+cw2"):
        values = [
            r["distillation_loss"] for r in fit(student, data, metric=chosen, **options).history
        ]
        assert values[-1] < values[0], chosen
    with pytest.raises(TypeError, match="'l1' has no option 'powr': did you mean power"):
        losses.get_metric("l1", powr=1)


@pytest.mark.slow
def test_the_pages_steps_make_a_metric_that_passes_every_walk(tmp_path):
    """In a copy of the package, to the letter, with the tests that walk the catalogue."""
    for folder in ("kd2m_jax", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (function,) = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    (name,) = re.findall(r"^def (\w+)", function, re.MULTILINE)
    (tmp_path / f"kd2m_jax/losses/_{name}.py").write_text(function)
    # The other lines, each below the path of its file; entries go into the table that is named.
    (lines,) = re.findall(r"^```py\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    for path, line in re.findall(r"^# (\S+\.py).*\n(.*)$", lines, re.MULTILINE):
        table = re.search(r"^(METRICS|LAWS)\b.*= \{\n", (tmp_path / path).read_text(), re.MULTILINE)
        text = (tmp_path / path).read_text()
        if line.startswith(" "):
            assert table, path
            text = text.replace(table[0], f"{table[0]}{line}\n")
        else:
            first = text.index("\nfrom kd2m_jax") + 1
            text = f"{text[:first]}{line}\n{text[first:]}"
        (tmp_path / path).write_text(text)
    walks = ["tests/test_docs.py"]
    walks += [f"tests/losses/test_{part}.py" for part in ("contract", "numerics", "where")]
    chosen = ["-k", f"{name} or every_metric_has_its_laws", "-m", "slow or not slow"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", *walks, *chosen],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 15


def test_no_name_of_a_metric_is_written_outside_the_catalogue():
    """What one asks of its surroundings stands in its line."""
    code = "".join((ROOT / f"experiments/runs/{n}.py").read_text() for n in ("build", "train"))
    assert [name for name in losses.METRICS if f'"{name}"' in code] == []
