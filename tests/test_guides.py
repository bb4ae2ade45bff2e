"""The pages of docs/: what they show runs."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clouds import draw
from flax import linen as nn
from flax import nnx
from foreign import equinox_net

import kd2m_jax
from kd2m_jax import losses, models, predict

DOCS = pathlib.Path(__file__).parents[1] / "docs"
TABLE = (DOCS / "what_you_have.md").read_text()
LINES = re.findall(r"^\| (.+) \| `(.+)` \|$", TABLE, re.MULTILINE)


def read(*names):
    return "".join((DOCS / f"{name}.md").read_text() for name in names)


# The first block below each heading of these pages, which have a test each.
PAGE = read("data", "tasks", "labels", "banks", "torch_teacher", "using_the_student")
BLOCKS = dict(
    re.findall(r"^## (.+)\n(?:(?!^##).*\n)*?```python\n((?:.*\n)*?)```", PAGE, re.MULTILINE)
)
# Pages all of whose blocks run one after the other, with the names of the table.
HOW_TO = ("other_models", "unequal_sizes", "per_class", "resume", "logging", "devices")


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5)(x))
        return x, nn.Dense(3)(x)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.fc = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.hidden(x))


class Dicts(nn.Module):
    @nn.compact
    def __call__(self, x):
        act = nn.Dense(5)(x)
        return {"act": act, "fc": nn.Dense(3)(act)}


def mlp(seed, width=5):
    return models.MLP((8, width), 3, in_features=4, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def space():
    """Return the names that the table speaks of; `fit` makes few steps."""
    x, _, y = draw("clustered", 160, 4, classes=3)
    x, y, teacher = x.astype(np.float32), y.astype(np.int32), mlp(1)
    seen, module = teacher(x), Linen()

    def few_steps(*given, **options):
        options = {"batch_size": 32, "epochs": 1, "optimizer": optax.sgd(0.01)} | options
        return kd2m_jax.fit(*given, **options)

    def apply(params, state, x, *, train, rng):
        features = x @ params["w"]
        return kd2m_jax.Outputs(features, features @ params["h"]), state

    names = {name: getattr(kd2m_jax, name) for name in kd2m_jax.__all__}
    names |= {"jax": jax, "jnp": jnp, "np": np, "optax": optax}
    exec(BLOCKS["Another task"] + BLOCKS["Mixed examples"], names)
    return names | {
        "fit": few_steps,
        "functools": functools,
        "losses": losses,
        "x": x,
        "y": y,
        "x_few": x[:16],
        "y_few": y[:16],
        "known": np.arange(160) % 2 == 0,
        "loader": [{"image": x[i : i + 32], "label": y[i : i + 32]} for i in range(0, 160, 32)],
        "pairs": list(zip(x, y, strict=True)),
        "targets": x[:, :3] ** 2,
        "tags": (x[:, :3] > 0).astype(np.float32),
        "soft": np.eye(3)[y] * 0.9 + 0.1 / 3,
        "student": mlp(0),
        "teacher": teacher,
        "another": mlp(2),
        "wide": mlp(3, 12),
        "features": seen.features,
        "logits": seen.logits,
        "z_s": mlp(0)(x).features,
        "z_t": seen.features,
        "module": module,
        "net": Net(nnx.Rngs(0)),
        "dicts": Dicts(),
        "variables": module.init(jnp.zeros(2, jnp.uint32), x),
        "init": lambda key, x: ({"w": jnp.ones((4, 5)), "h": jnp.ones((5, 3))}, {}),
        "apply": apply,
    }


def test_the_table_is_read():
    table = TABLE[TABLE.index("| You have |") : TABLE.index("A label of −1 is no label")]
    assert len(LINES) == table.count("\n|") - 1 > 30  # less its rule
    assert len({code for _, code in LINES}) == len(LINES)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "code"), LINES, ids=[what for what, _ in LINES])
def test_a_line_of_the_table_runs(what, code, space):
    if "equinox" in code:
        pytest.importorskip("equinox")
        net, state = equinox_net(jax.random.key(0), size=4)
        space = space | {"equinox_net": net, "its_state": state}
    if "MapDataset" in code:
        space = space | {"MapDataset": pytest.importorskip("grain").MapDataset}
    got = eval(code, space)
    if code.startswith("layers"):
        assert got is None
    elif code.startswith("fit"):
        last = got.history[-1]
        assert np.isfinite(last["loss"]) and np.isfinite(last["distillation_loss"])
        assert last["distillation_loss"] > 0
    else:
        assert np.all(np.isfinite(got))


@pytest.mark.slow
@pytest.mark.parametrize("page", HOW_TO)
def test_a_how_to_page_runs(page, space, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = dict(space)
    few_steps = space["fit"]
    for code in re.findall(r"^```python\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL):
        # What a page imports is there already; fit is the one of few steps.
        exec(re.sub(r"^from kd2m_jax import .*$", "", code, flags=re.MULTILINE), space)
        assert space["fit"] is few_steps
    results = space.get("results", space.get("result"))
    for result in results if isinstance(results, list) else [results]:
        assert np.isfinite(result.history[-1]["distillation_loss"])


@pytest.mark.slow
def test_labels_that_are_not_trusted(space):
    exec(BLOCKS["Labels you do not trust"], space)
    assert np.isfinite(space["result"].history[-1]["distillation_loss"])


@pytest.mark.slow
def test_the_weights_of_a_torch_file(tmp_path, monkeypatch):
    """To the file that is not there: tests/models reads real ones."""
    code = BLOCKS["A ResNet of timm or torchvision: its weights"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "resnet34", lambda *given, **options: mlp(0))
    with pytest.raises(FileNotFoundError, match=r"resnet34\.safetensors"):
        exec(code, {})


@pytest.mark.slow
def test_few_labels():
    """On clouds instead of MNIST: the lines are those of the study."""
    x, _, y = draw("clustered", 400, 784, classes=10)
    x = (x / np.abs(x).max()).astype(np.float32)
    teacher = models.MLP((64, 128), 10, in_features=784, rngs=nnx.Rngs(0))
    short = {"epochs": 2, "devices": jax.devices()[:2]}
    fit = lambda *given, **options: kd2m_jax.fit(*given, **options | short)  # noqa: E731
    space = {"np": np, "nnx": nnx, "models": models, "fit": fit, "seed": 0, "coef": 0.01}
    space |= {"x": x, "y": y.astype(np.int32), "teacher": teacher}
    exec(BLOCKS["Few labels"], space)
    assert {"alone", "helped"} <= space.keys()
    study = (DOCS / "results/few_labels.py").read_text()
    for line in BLOCKS["Few labels"].splitlines()[:4]:
        assert line in study
    found = json.loads((DOCS / "results/few_labels.json").read_text())
    for name in ("alone", "with a transfer set"):
        accuracies = 100 * np.array(found[name])
        assert f"{accuracies.mean():.1f}% ± {accuracies.std(ddof=1):.1f}" in PAGE


@pytest.mark.slow
def test_no_pairs_at_all():
    """On clouds instead of MNIST: the lines are those of the study."""
    x, _, y = draw("clustered", 256, 20, classes=3)
    x, y = x.astype(np.float32), y.astype(np.int32)
    fit = lambda *given, **o: kd2m_jax.fit(*given, **o | {"epochs": 1})  # noqa: E731
    space = {name: getattr(kd2m_jax, name) for name in ("outputs", "Bank", "class_statistics")}
    network = models.MLP((16, 8), 3, in_features=20, rngs=nnx.Rngs(0))
    space |= {"x": x, "y": y, "turned": x[:, ::-1], "seed": 0, "network": network, "fit": fit}
    exec(BLOCKS["No pairs at all"], space)
    study = (DOCS / "results/shifted_domain.py").read_text()
    for line in BLOCKS["No pairs at all"].splitlines():
        assert line in study
    found = json.loads((DOCS / "results/shifted_domain.json").read_text())
    for values in found.values():
        accuracies = 100 * np.array(values)
        assert f"{accuracies.mean():.1f}% ± {accuracies.std(ddof=1):.1f}" in PAGE


def test_a_teacher_in_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 8, 8, 1)).astype(np.float32)
    body = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    space = {"torch_body": body, "torch_head": torch.nn.Linear(6, 3)}
    space |= {"x": x, "y": np.arange(32) % 3}
    exec(BLOCKS["A teacher in torch"], space)
    value = losses.l2(space["seen"].features, space["seen"].features)
    assert value == 0 and np.isfinite(space["result"].history[-1]["loss"])


@pytest.mark.slow
def test_a_teacher_of_timm():
    """With random weights, and a smaller student."""
    pytest.importorskip("timm")
    x = np.random.default_rng(0).normal(size=(32, 32, 32, 3)).astype(np.float32)
    space = {"x": x, "y": np.arange(32) % 3}
    code = BLOCKS["A teacher of timm"].replace("pretrained=True", "pretrained=False")
    assert "models.resnet18(3, stem" in code
    exec(code.replace("models.resnet18", "models.resnet8"), space)
    assert space["seen"].features.shape == (32, 512) and space["seen"].logits.shape == (32, 1000)
    assert np.isfinite(space["result"].history[-1]["loss"])


@pytest.mark.slow
def test_the_tutorial_with_a_teacher_in_torch(tmp_path, monkeypatch):
    """It runs, in few epochs; the outputs that the page shows are of a whole run."""
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(64))  # a step per epoch
    text = read("tutorials/torch_teacher").replace('"epochs": 30', '"epochs": 1')
    space = {}
    for code in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(code, space)
    assert space["teacher"].features.shape == (1347, 128)
    assert np.isfinite(predict(space["student"], space["test_x"])).all()


@pytest.mark.slow
def test_using_the_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
    student = models.resnet8(3, in_channels=1, rngs=nnx.Rngs(0))
    student.eval()
    space = {"jax": jax, "nnx": nnx, "pathlib": pathlib, "student": student, "x": images}
    pytest.importorskip("flatbuffers")
    exec(BLOCKS["Using the student"], space)
    program = jax.export.deserialize(bytearray(pathlib.Path("student.jax").read_bytes()))
    for n in (6, 1):
        np.testing.assert_allclose(program.call(images[:n]), student(images[:n]).logits, atol=1e-5)
    pytest.importorskip("safetensors")
    for block in re.findall(
        r"```python\n((?:.*\n)*?)```", read("using_the_student").partition("## Its weights")[2]
    ):
        exec(block, space)
    np.testing.assert_allclose(space["again"](images).logits, student(images).logits, atol=1e-5)
    assert len([line for line in BLOCKS["Using the student"].splitlines() if line]) <= 6
