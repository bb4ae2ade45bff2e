"""The site: every public name is on an API page, every page can be reached, code fits its width."""

import inspect
import json
import re
from pathlib import Path

import numpy as np

import kd2m_jax
from kd2m_jax import losses, models, theory

DOCS = Path(__file__).parents[1] / "docs"
LIMIT = 88  # characters of a line of an example, beyond which a page scrolls sideways


def pages():
    files = (p.relative_to(DOCS) for p in DOCS.rglob("*.md"))
    return {
        p.with_suffix("").as_posix(): (DOCS / p).read_text()
        for p in files
        if p.parts[0] != "_build"
    }


def entries(page, text):
    """Return the pages that a page's toctrees list."""
    found = []
    for block in re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = [line for line in block.splitlines() if line and not line.startswith(":")]
        found += [(Path(page).parent / line).as_posix() for line in lines]
    return found


def test_every_public_name_is_on_an_api_page():
    text = "".join(t for name, t in pages().items() if name.startswith("api/"))
    shown = set(re.findall(r"^\.\. (?:auto\w+|module):: (kd2m_jax\S*)$", text, re.MULTILINE))
    # Sphinx itself puts the module before a name that it does not import.
    data = re.findall(r"^\.\. py:data:: (\w+)\n   :module: (\S+)$", text, re.MULTILINE)
    shown |= {f"{module}.{name}" for name, module in data}
    public = {f"kd2m_jax.{name}" for name in kd2m_jax.__all__}
    for module in (losses, models, theory):
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    # What has two public names is shown by the first.
    twice = {f"kd2m_jax.losses.{name}" for name in ("ClassStatistics", "class_statistics")}
    assert public - twice - shown == set()
    assert shown <= public


def test_every_page_is_reached_from_the_first():
    known, reached, waiting = pages(), set(), ["index"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page in known:
            reached.add(page)
            waiting += entries(page, known[page])
    assert reached == known.keys()


def test_every_listed_page_is_there():
    known, notebooks = pages(), {p.stem for p in DOCS.parent.glob("notebooks/*.ipynb")}
    for page, text in known.items():
        for entry in entries(page, text):
            assert entry in known or entry.removeprefix("tutorials/") in notebooks, (page, entry)


def test_the_lines_of_examples_fit():
    long = []
    for home in (kd2m_jax, losses, models, theory):
        for name in home.__all__:
            doc = inspect.getdoc(getattr(home, name)) or ""
            code = (line for line in doc.splitlines() if re.match(r"\s*(>>>|\.\.\.) ", line))
            long += [(name, line) for line in code if len(line.lstrip()) > LIMIT]
    for page, text in pages().items():
        if page == "adding_a_metric":  # shows a file, with the width of a file
            continue
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            long += [(page, line) for line in block.splitlines() if len(line) > LIMIT]
    assert long == []


def result(name):
    return json.loads((DOCS / "results" / f"{name}.json").read_text())


def row(page, start):
    """Return the cells of the table row of a page that starts so."""
    (line,) = (s for s in (DOCS / f"{page}.md").read_text().splitlines() if s.startswith(start))
    return [cell.strip() for cell in line.strip("| ").split("|")]


def spread(accuracies):
    accuracies = 100 * np.array(accuracies)
    return f"{accuracies.mean():.1f}% ± {accuracies.std(ddof=1):.1f}"


def test_the_results_page_has_what_the_studies_wrote():
    few, turned = result("few_labels"), result("shifted_domain")
    digits = result("digits")["datasets"]["digits"]["rows"]
    cifar = result("h200")["cifar10"]["test accuracy per epoch, %"]
    thousand = result("gpu_cifar10")["rows"]["1000"]
    later = result("gpu_cifar10_h200")["rows"]["1000"]
    mnist = result("mnist")["datasets"]["mnist"]["rows"]
    rows = {
        "| MNIST, all labels": [
            "{mean:.2f}% ± {sd:.2f}".format(**mnist[k]["last"]) for k in ("none", "cw2", "kd=0.9")
        ],
        "| CIFAR-10, 1,000 labels": [
            spread(np.array(thousand[k]["values"]) / 100) for k in ("none", "cw2")
        ],
        "| the same with `procrustes`": [
            spread(np.array(later[k]["values"]) / 100) for k in ("none", "procrustes")
        ],
        "| MNIST, 100 labels": [spread(few["alone"]), spread(few["with a transfer set"])],
        "| MNIST turned": [spread(turned["turned"]), spread(turned["from a bank"])],
        "| digits, all labels": [
            "{mean:.2f}% ± {sd:.2f}".format(**digits[k]["last"]) for k in ("none", "jw2")
        ],
        "| CIFAR-10, all labels": [f"{cifar[k][-1]:.2f}%" for k in ("student", "jw2")],
    }
    for start, cells in rows.items():
        assert row("results", start)[1 : 1 + len(cells)] == cells


def test_what_the_results_page_says_against_the_paper():
    metrics = ("w2", "cw2", "jw2", "gaussian-w2", "gaussian-cw2", "gaussian-kl")
    tables = [result(name)["datasets"][name] for name in ("digits", "mnist", "cifar10")]
    cases = [table["rows"][metric]["difference"] for table in tables for metric in metrics]
    means = np.round([case["mean"] for case in cases], 6)
    said = row("results", "| every metric is above")[1]
    assert f"{(means > 0).sum()} of {len(cases)} cases" in said
    assert (means == 0).sum() == 1 and "equal in one" in said
    assert min(case["p_holm"] for case in cases) > 0.05 and said.endswith("for none")
    order = {"w2", "cw2", "jw2"}
    pairs = [p for t in tables for p in t["pairs"] if {p["first"], p["second"]} <= order]
    assert len(pairs) == 9 and min(pair["p_holm"] for pair in pairs) > 0.05


def test_the_page_of_gpus_has_what_was_measured():
    ms = {
        r["loss"]: r["ms"]
        for r in result("h100")["times"]
        if r.get("n, d") == "128, 512" and "loss" in r
    }
    rows = {
        "| `w2` / `cw2`": ("w2", "cw2", "jw2"),
        "| `gaussian_w2` /": ("gaussian-w2", "gaussian-cw2"),
        "| `gaussian_kl` /": ("gaussian-kl", "gaussian-ckl"),
        "| `sw2` /": ("sw2", "scf"),
        "| `mmd_rbf` /": ("mmd-rbf", "cmmd-rbf"),
        "| `procrustes` /": ("procrustes", "gram", "cka"),
        "| `cw2` with a rotation": ("cw2:rotation=True",),
        "| `kd` / `nst`": ("kd", "nst", "wkd-l", "wkd-f", "l2"),
        "| `gw2`": ("gw2",),
    }
    for start, names in rows.items():
        expected = [f"{ms[n]:.2f}" if ms[n] < 1 else f"{ms[n]:.1f}" for n in names]
        assert row("gpu", start)[1] == " / ".join(expected)
    study = result("gpu_cifar10")["rows"]["1000"]
    for name, start in {"kd": "| `kd` | 82.7,", "cw2": "| `cw2` | 82.5,"}.items():
        low, high = study[name]["interval"]
        _, values, gain, p = row("gpu", start)
        assert values == ", ".join(f"{v:.1f}" for v in study[name]["values"])
        assert gain == f"+{study[name]['mean']:.1f} [{low:.1f}, {high:.1f}]"
        assert p == f"{study[name]['p']:.4f}"
    study = result("gpu_cifar10_h200")["rows"]
    found = {
        "| student alone, H200": study["1000"]["none"],
        "| `procrustes`, H200": study["1000"]["procrustes"],
        "| student alone, all": study["50000"]["none"],
    }
    for start, one in found.items():
        assert row("gpu", start)[1] == ", ".join(f"{v:.1f}" for v in one["values"])
    low, high = study["1000"]["procrustes"]["interval"]
    gain, p = row("gpu", "| `procrustes`, H200")[2:]
    assert gain == f"+{study['1000']['procrustes']['mean']:.1f} [{low:.1f}, {high:.1f}]"
    assert p == f"{study['1000']['procrustes']['p']:.4f}"
    later = {name: middle for name, (_, middle, _) in result("h200_later")["ms"].items()}
    rows["| `gaussian_cw2` with a rotation"] = ("gaussian-cw2:rotation=true",)
    shown = [later.get(n.lower()) for names in rows.values() for n in names]
    assert len(later) == len([ms for ms in shown if ms])
    for start, names in rows.items():
        found = [later.get(n.lower()) for n in names]
        texts = ["–" if ms is None else f"{ms:.2f}" if ms < 1 else f"{ms:.1f}" for ms in found]
        assert row("gpu", start)[2] == (" / ".join(texts) if any(found) else "–")
    share = {one["metric"]: one["ratio"] for one in result("h200_later")["step"]}
    text = (DOCS / "gpu.md").read_text()
    for name, ratio in share.items():
        assert name == "none" or f"`{name.replace('-', '_')}` {100 * ratio - 100:.0f}%" in text


def test_the_table_of_solvers_has_what_the_study_wrote():
    for name, found in result("solvers").items():
        data, metric, *rest = re.split("[:,] ", name)
        lam = rest[0] if rest else "λ 1e-3"
        start = f"| {data.replace('mnist', 'MNIST')}, `{metric}`, {lam} |"
        _, exact, sinkhorn, difference, _ = row("solvers", start)
        assert exact == f"{found['exact'][-1]:.2f}%"
        assert sinkhorn == f"{found['sinkhorn'][-1]:.2f}%"
        half = f"{found['its 95% half-width']:.2f}"
        assert difference.endswith(f"± {half}"), name


def test_the_table_beside_torch_has_what_the_suite_wrote():
    cells = {}
    for one in result("bench/losses")["rows"]:
        name = f"cw2, {one['classes']}" if "classes" in one else one["metric"]
        cells[name, one["clouds"], one["n"]] = ", ".join(
            f"{one[k]:#.2g}".strip(".") for k in ("ms", "times")
        )
    for clouds in ("related", "clustered", "confused", "unrelated"):
        for n, few in (("128", 128), ("512", 512), ("2,048", 1024)):
            found = row("solvers", f"| {clouds} | {n}")[2:]
            many = int(n.replace(",", ""))
            wanted = [("w2", many), ("jw2", many), ("cw2, 10", few), ("cw2, 100", few)]
            assert found == [f"{cells[name, clouds, m]}×" for name, m in wanted]


def test_the_table_of_growth_has_what_the_suite_wrote():
    points = {(r["metric"], r["n"], r["d"]): r for r in result("bench/growth")["rows"]
              if r["classes"] == 10}  # fmt: skip
    metrics = ("w2", "cw2", "sw2", "gaussian-w2", "gaussian-w2:covariance=diagonal")
    for n, d in ((1024, 512), (2048, 512), (4096, 512), (8192, 512), (1024, 128), (1024, 2048)):
        found = [points[m, n, d] for m in metrics]
        expected = [f"{r['ms']:.{1 if r['ms'] < 10 else 0}f}, {r['peak MiB']:.0f}" for r in found]
        assert row("benchmarks", f"| {n:,}, {d:,} |")[1:] == expected


def test_what_a_metric_adds_to_a_step_is_what_the_suite_wrote():
    steps = result("bench/step")["rows"]
    ms = {one["metric"]: one["ms"] for one in steps if one["student"] == "mlp-32-64"}
    wanted = {
        "equal feature sizes": ["cw2"],
        "no classes: neither": ["w2"],
        "features and predictions": ["jw2"],
        "as for `w2` and `cw2`": ["gaussian-w2", "gaussian-cw2"],
        "a likelihood": ["gaussian-kl", "gaussian-ckl"],
        "the same examples": ["procrustes", "gram", "cka"],
        "smooth kernels": ["mmd-rbf", "cmmd-rbf", "mmd-energy"],
        "logits only": ["kd", "wkd-l"],
    }
    for start, metrics in wanted.items():
        added = [f"{max(ms[one] - ms['none'], 0):.1f}" for one in metrics]
        assert row("which_metric", f"| {start}")[-1] == ", ".join(added), start
