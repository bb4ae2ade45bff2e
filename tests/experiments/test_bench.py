"""The measuring instrument: its tables, its files, its judgement of right and wrong answers."""

import inspect
import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.bench import __main__ as main
from experiments.bench import (
    answers,
    devices,
    gpu,
    growth,
    measure,
    peers,
    start,
    step,
)
from experiments.bench import losses as loss_suites
from experiments.common import cli, tables
from kd2m_jax import Outputs, from_nnx, losses


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["experiments.bench", *flags])
    cli.main(main.Bench(), main.run, module="experiments.bench", description="")


def test_rows_have_medians_between_quartiles_and_run_in_turn():
    calls = []
    cases = [measure.Case({"what": what}, lambda what=what: calls.append(what)) for what in "ab"]
    rows = measure.in_turn(cases, repeats=5)
    assert [row["what"] for row in rows] == ["a", "b"]
    assert all(row["q1"] <= row["ms"] <= row["q3"] for row in rows)
    assert calls == ["a", "b"] * 6  # the first round does not count
    assert measure.ratios(rows)[0]["ratio"] == 1


def test_a_table_aligns_and_shows_what_is_missing():
    table = tables.of_records([{"what": "w2", "ms": 1.23456}, {"what": "floor"}])
    assert table.splitlines() == ["what     ms", "-----------", "w2     1.23", "floor     -"]


def test_a_planted_wrong_peer_is_marked(monkeypatch, tmp_path):
    """One whose cost is 5% too high, and one whose plan is not a coupling."""

    def planted(x, y):
        plan = np.eye(len(x))[order := np.arange(len(x))[::-1]] / len(x)
        exact = ((x - y[order]) ** 2).sum(1).mean()
        lazy = plan * (np.arange(len(x)) > 0)[:, None]
        answers = {"good": (exact, plan), "dear": (1.05 * exact, plan), "lazy": (exact, lazy)}
        return [(name, int, *answer) for name, answer in answers.items()]

    def reversed_clouds(kind, n, d):
        x = np.arange(4.0 * d).reshape(4, d)
        return x, x[::-1] + 0.5, None

    monkeypatch.setattr(measure, "clouds", reversed_clouds)
    monkeypatch.setattr(peers, "marginal", planted)
    rows, _ = peers.peers(tmp_path, sizes=(4,), d=8, classes=(), repeats=1, kinds=("unrelated",))
    answers = {row["what"]: row.get("answer") for row in rows}
    assert answers == {"good": "right", "dear": "WRONG", "lazy": "WRONG"}
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_without_torch_its_rows_are_left_out_and_one_sentence_says_so(monkeypatch, tmp_path):
    pytest.importorskip("ot")  # first, for SciPy looks for torch when it is first imported
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    rows, notes = peers.peers(tmp_path, (16,), 4, (2,), 1, ("related",))
    assert notes == [peers.NO_TORCH] and "pip install" in notes[0]
    assert not any("torch" in row["what"] for row in rows)
    answers = {row["what"]: row.get("answer") for row in rows}
    assert answers["floor: two products"] is None
    assert answers["w2"] == answers["cw2"] == "right"
    # Their epsilon, 5% of the mean cost, puts them far above exact on these clouds.
    assert answers["ott-jax, defaults"] == answers["ott-jax, padded classes"] == "WRONG"
    assert all(row["iterations"] >= 0 for row in rows if row["what"] in ("w2", "cw2"))


def test_a_confused_student_has_other_masses_than_its_teacher():
    x, y, labels = measure.clouds("confused", 200, 32, classes=4)
    centres = np.stack([y[labels == c].mean(0) for c in range(4)])
    nearest = [((z[:, None] - centres) ** 2).sum(-1).argmin(1) for z in (x, y)]
    assert (nearest[1] == labels).all()
    assert np.bincount(nearest[0])[0] == 60 and (nearest[0] != labels).sum() == 10


def test_peers_say_whether_the_target_is_met():
    def note(torch, answer="right"):
        name = {"clouds": "clustered", "n": 512}
        rows = [name | {"what": "w2", "answer": answer, "ratio": 1.0}]
        for form, (ratio, its) in zip(("cdist", "product"), torch, strict=True):
            rows.append(name | {"what": f"torch + emd, {form}", "answer": its, "ratio": ratio})
        return peers._verdicts(rows)

    faster, cdist = note([(3.0, "right"), (2.0, "right")])
    assert faster.endswith("2.00, target at least 2.5: MISSED") and "faster form" in faster
    assert cdist.endswith("3.00, target at least 2.5: met") and "paper's cdist" in cdist
    assert note([(3.0, "right"), (2.0, "WRONG")])[0].endswith("met")
    assert note([(3.0, "right"), (2.0, "right")], "WRONG")[0].endswith("its answer is WRONG")


def _as_outputs(x, y, seed=0):
    logits = np.random.default_rng(seed).normal(size=(2, len(x), 3)).astype(np.float32)
    return Outputs(x, logits[0]), Outputs(y, logits[1])


@pytest.mark.parametrize("name", ["w2", "cw2", "jw2", "lohit", "gaussian-w2", "gaussian-cw2",
                                  "gaussian-kl", "gaussian-ckl"])  # fmt: skip
def test_answers_tell_right_from_wrong(monkeypatch, name):
    x, y, labels = measure.clouds("clustered", 24, 6, classes=3)
    outputs = _as_outputs(x, y)
    found = answers.answer(name, *outputs, labels)
    assert found["answer"] == "right" and found["off by"].endswith("%")
    assert ("iterations" in found) == ("gaussian" not in name)
    loss = losses.METRICS[name].function

    def dearer(*args, **options):
        out = loss(*args, **options)
        if isinstance(out, tuple):
            return 1.02 * out[0], out[1]
        return out if name == "jw2" else 1.02 * out  # the exact value that jw2 is judged by

    dearer.__signature__ = inspect.signature(loss)
    wrong = losses.METRICS[name]._replace(function=dearer)
    monkeypatch.setitem(losses.METRICS, name, wrong)
    assert answers.answer(name, *outputs, labels)["answer"] == "WRONG"


def test_an_answer_that_did_not_converge_is_wrong(monkeypatch):
    x, y, labels = measure.clouds("clustered", 24, 6, classes=3)
    monkeypatch.setattr(answers, "EXACT_UP_TO", 8)  # so that convergence is all there is
    assert answers.answer("w2", *_as_outputs(x, y), labels)["answer"] == "right"

    def stuck(metric, *outputs):
        value, info = losses.w2(x, y, has_aux=True)
        return value, info._replace(converged=False)

    monkeypatch.setattr(answers, "metric_with_info", stuck)
    assert answers.answer("w2", *_as_outputs(x, y), labels)["answer"] == "WRONG"
    assert answers.answer("l2", *_as_outputs(x, y), labels) == {}


def test_torchs_answer_is_exact():
    pytest.importorskip("torch")
    x, y, labels = measure.clouds("clustered", 32, 6, classes=3)
    exact = peers.exact_w2(x, y)
    for cost in ("cdist", "product"):
        _, value, plan = peers.torch_emd([(x, y)], cost)
        assert peers.judge(exact, value, plan)["answer"] == "right"
    by_class = [peers.exact_w2(x[labels == c], y[labels == c]) for c in range(3)]
    _, value, _ = peers.torch_emd([(x[labels == c], y[labels == c]) for c in range(3)], "cdist")
    assert value == pytest.approx(np.mean(by_class), rel=1e-4)


@pytest.mark.parametrize(("n", "d"), [(16, 40), (64, 6)])
def test_the_eigh_peer_has_the_value_and_the_gradient(n, d):
    x, y, _ = measure.clouds("related", n, d)
    value, grad = jax.value_and_grad(loss_suites.eigh_gaussian_w2)(x, y)
    assert float(value) == pytest.approx(answers.textbook_gaussian_w2(x, y), rel=1e-3)
    direction = np.random.default_rng(0).normal(size=x.shape)
    forms = [answers.textbook_gaussian_w2(x + h * direction, y) for h in (1e-3, -1e-3)]
    assert float((grad * direction).sum()) == pytest.approx((forms[0] - forms[1]) / 2e-3, rel=2e-2)


def test_classes_and_gaussian_rows(tmp_path):
    rows, notes = loss_suites.classes(tmp_path, counts=(3,), n=12, d=4, repeats=1)
    assert len(rows) == 3 and all("target at most 1.5" in note for note in notes)
    assert min(row["ratio"] for row in rows) == 1
    assert [row["answer"] for row in rows] == ["right"] * 3
    shapes = ((16, 4), (8, 12))
    rows, notes = loss_suites.gaussian(tmp_path, shapes, polar_sizes=(8,), repeats=1)
    assert {"gaussian_w2", "n x n, SVD", "polar, SVD"} < {row["what"] for row in rows}
    assert {row["answer"] for row in rows if row["what"] == "gaussian_w2"} == {"right"}
    assert len(notes) == 1 and "n = 8, d = 12" in notes[0] and "at least 10" in notes[0]


def test_growth_measures_a_point_in_a_process_of_its_own(monkeypatch, tmp_path):
    row = growth._point("w2", 1024, 8, repeats=1)  # megabytes, so that the peak can be seen
    assert (row["n"], row["d"]) == (1024, 8) and row["ms"] > 0 and row["answer"] == "right"
    if sys.platform == "linux":
        assert 0 < row["peak MiB"] < 500

    def cubic(metric, n, d, repeats):
        sizes = {"peak MiB": n**2 / d, "n x n arrays": n / 32}
        return {"metric": metric, "n": n, "d": d, "ms": 1e-6 * n**3 * d, **sizes}

    monkeypatch.setattr(growth, "_point", cubic)
    rows, notes = growth.growth(tmp_path, sizes=(64, 128), features=(4, 8, 16))
    assert len(rows) == 4 * (2 + 2)
    assert "w2: time ~ n^3.0, memory ~ n^2.0, time ~ d^1.0, memory ~ d^-1.0" in notes
    assert notes[-1] == "w2, n = 128: peak in n x n arrays: 4.00, target at most 4: met"
    assert {path.name for path in tmp_path.iterdir()} == {"growth-n.png", "growth-d.png"}


def flops(networks, metric):
    teacher, student, x, labels = networks
    compiled, *_ = step.program(from_nnx(student), from_nnx(teacher), x, labels, metric)
    return compiled.cost_analysis()["flops"]


def test_a_step_is_compared_with_one_that_runs_the_teacher_too():
    small, large = (
        flops(step.setting((f"mlp-{w}-4", "mlp-6-4", (4, 4, 1)), 8), "none") for w in (8, 512)
    )
    assert large - small > 0.9 * 2 * 8 * (512 - 8) * (16 + 4)


def test_a_steps_metrics_are_those_the_networks_suit(tmp_path):
    run = step.step(tmp_path, (("mlp-8-4", "mlp-6-4", (4, 4, 1)),), batch=8, repeats=1)
    (rows, notes), names = run, set(losses.METRICS)
    assert {row["metric"] for row in rows} == names - {"nst", "wkd-f"} | {"none"}
    assert rows[0]["ratio"] == 1 and rows[1]["answer"] == "right"
    assert "mlp-8-4 to mlp-6-4" in notes[0] and "random images" in notes[-1]


@pytest.mark.slow
def test_a_steps_metrics_of_maps_and_the_projector_of_wkd_f():
    *_, wkd = step.beside_none(("resnet8", "resnet8", (8, 8, 1)), ["nst", "wkd-f"], 8, 1)
    assert wkd["metric"] == "wkd-f" and np.isfinite(wkd["ratio"])


def test_a_step_on_digits_has_a_trained_teacher_and_a_student_on_its_way(monkeypatch):
    monkeypatch.setattr(step, "EPOCHS", (30, 1))
    teacher, student, x, labels = step.setting(("mlp-64-8", "mlp-8-8", "digits"), 128)
    right = [(jnp.argmax(net(x).logits, 1) == labels).mean() for net in (teacher, student)]
    assert right[0] > 0.9 > right[1]
    assert x.shape == (128, 8, 8, 1)


def test_a_start_has_a_cache_of_its_own_each_time(monkeypatch, tmp_path):
    seen = []

    def planted(environment, flags):
        cache = environment.get("JAX_COMPILATION_CACHE_DIR")
        compiling = 9.0 if cache is None else 3.0 if cache in [c for c, _ in seen] else 12.0
        seen.append((cache, flags[-1]))
        columns = dict.fromkeys(start.COLUMNS, float(len(seen)))
        return columns | {"compiling": compiling + (len(seen) > 6)}

    monkeypatch.setattr(start, "_one", planted)
    rows, notes = start.start(tmp_path, repeats=3, flags=())
    caches = [cache for cache, _ in seen]
    assert caches[::3] == [None] * 3 and caches[1::3] == caches[2::3]
    assert len(set(caches)) == 4 and len({out for _, out in seen}) == 9
    assert [(row["start"], row["end"]) for row in rows] == list(
        zip(start.KINDS, (4.0, 5.0, 6.0), strict=True)
    )
    assert [row["compiling"] for row in rows] == [9, 12, 3]
    assert notes[-1].endswith("0.25, target at most 0.333: met")


def test_devices_say_what_is_exchanged_and_what_the_metric_takes(monkeypatch, tmp_path):
    rows, _ = devices.devices(tmp_path, counts=(2,), sizes=(16,), repeats=1)
    [row] = rows
    assert (row["devices"], row["n"]) == (2, 16) and row["share"] < 1
    # Both networks' 128 features; for the cross-entropy the student's 10 logits, and labels.
    assert row["gathered bytes"] == 4 * 16 * (2 * 128 + 10 + 1)
    planted = [{"devices": 2, "n": n, "share": n / 1000} for n in (128, 512, 1024)]
    assert devices._note(2, planted).endswith("more than half of the step from n = 512 on")
    assert devices._note(2, planted[:1]).endswith("at no n up to 128")


@pytest.mark.slow
def test_gpu_suites_run_where_there_is_none(monkeypatch, tmp_path):
    pair = ("resnet8", "resnet8")
    monkeypatch.setattr(gpu, "SHAPE", (8, 8, 3))
    rows, notes = gpu.gpu_step(tmp_path, pair, batches=(4,), metrics=("w2",), repeats=1)
    assert [(row["dtype"], row["metric"]) for row in rows] == [
        (dtype, metric) for dtype in ("float32", "bfloat16") for metric in ("none", "w2")
    ]
    assert all("target at most 1.05" in note for note in notes)
    [row], [note] = gpu.gpu_epoch(tmp_path, pair, images=16, batch=8, repeats=2)
    assert row["images/s"] > 0 and row["utilisation"] is None and "No peak" in note


def test_model_flops_and_peaks():
    network = step._build("mlp-64-32", gpu.SHAPE, 0, jnp.float32)
    products = 2 * (32 * 32 * 3 * 64 + 64 * 32 + 32 * 10)
    assert products <= gpu.forward_flops(network) < 1.02 * products
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L4": 121e12,
             "Tesla T4": 65e12, "NVIDIA A100-SXM4-40GB": 312e12, "cpu": None}  # fmt: skip
    assert {name: gpu.peak_flops(name) for name in names} == names


@pytest.mark.slow
def test_the_torch_epoch_runs_and_is_of_the_same_networks(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    from experiments.bench import gpu_torch

    for depths, name in ((gpu_torch.DEPTHS[n], n) for n in gpu.PAIR):
        theirs = gpu_torch.ResNet(depths)
        ours = nnx.eval_shape(lambda name=name: step._build(name, (32, 32, 3), 0, jnp.float32))
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(ours, nnx.Param)))
        assert sum(p.numel() for p in theirs.parameters()) == count
        features, logits = theirs(torch.zeros(2, 3, 32, 32))
        assert (features.shape, logits.shape) == ((2, 512), (2, 10))
    data = gpu.random_images(8)
    x = gpu_torch._augmented(torch.tensor(data.train[0]).permute(0, 3, 1, 2), data)
    assert x.shape == (8, 3, 32, 32)
    assert (x.amin((2, 3)) >= -torch.tensor(data.mean) / torch.tensor(data.std) - 1e-5).all()
    monkeypatch.setitem(gpu_torch.DEPTHS, "resnet8", (1, 1, 1, 1))
    pair = ("resnet8", "resnet8")
    rows, notes = gpu_torch.gpu_torch(tmp_path, pair, images=16, batch=8, repeats=1)
    assert [row["what"] for row in rows][:2] == ["kd2m_jax", "torch + emd"] and len(rows) == 5
    assert len(notes) == 3 and "input pipeline" in notes[-1]


def test_the_main_prints_and_writes(monkeypatch, capsys, tmp_path):
    rows, notes = [{"metric": "w2", "ms": 1.0}], ["a note"]
    monkeypatch.setattr(loss_suites, "classes", lambda out, repeats: (rows, notes))
    stub = types.ModuleType("population")
    stub.population = lambda out: (rows, notes)
    monkeypatch.setitem(sys.modules, "experiments.bench.population", stub)
    command(monkeypatch, "--suite=population", f"--out={tmp_path}")
    assert json.loads((tmp_path / "population.json").read_text())["rows"] == rows
    command(monkeypatch, "--suite=classes", "--repeats=1", f"--out={tmp_path}")
    assert "metric" in (printed := capsys.readouterr().out) and "a note" in printed
    written = json.loads((tmp_path / "classes.json").read_text())
    assert (written["rows"], written["notes"]) == (rows, notes)
    assert written["versions"]["jax"] == jax.__version__
    assert {"date", "machine", "cores", "python"} <= written.keys()
    assert written["devices"] == ["cpu"] * jax.device_count()
    if pathlib.Path("/proc/cpuinfo").exists():
        assert written["processor"] in pathlib.Path("/proc/cpuinfo").read_text()
    assert written["float32 products"]["jax"] == "default"


def test_a_mistake_is_one_line_and_status_2(monkeypatch, capsys):
    for flags in (["--repeats=0"], ["--suite=peer"], ["--suite=gpu-step"]):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, *flags)
        assert stop.value.code == 2
        assert "Traceback" not in (error := capsys.readouterr().err) and error
