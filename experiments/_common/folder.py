"""The folder that a run leaves: configuration, environment, metrics, events, checkpoints."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil

from experiments._common.cli import UsageError
from experiments._common.events import event_writer
from kd2m_jax._locks import locked

OURS = ("config.json", "env.json", "metrics.jsonl", "report.md", "curves.png", "diverged.json")
OUR_FOLDERS = ("checkpoints", "tensorboard")
PACKAGES = ("kd2m-jax", "jax", "jaxlib", "flax", "optax", "ott-jax", "orbax-checkpoint", "numpy")


class RunFolder:
    """One run's folder, made or taken up again.

    An earlier run's files are moved to ``previous-<k>/`` unless the run is resumed; files that
    are not ours are left alone.
    """

    def __init__(self, path: str | pathlib.Path, config: dict, *, resume: bool):
        self.path = pathlib.Path(path)
        existing = self.path / "config.json"
        if resume and existing.exists():
            self._check_same(json.loads(existing.read_text()), config)
        else:
            self._set_aside()
        _write_json(existing, config)
        self.checkpoints = self.path / "checkpoints"

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: str | pathlib.Path, config: dict, *, resume: bool):
        """The folder, held against other processes as long as the context lasts."""
        path = pathlib.Path(path)
        if path.exists() and not path.is_dir():
            raise UsageError(f"--out {path} is a file, not a folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {path} cannot be made: {error}") from error
        with locked(path / ".lock"):
            yield cls(path, config, resume=resume)

    def _check_same(self, old: dict, new: dict) -> None:
        # data_sha256 covers what it adds, so a folder from before it was written down is the same.
        old = {"train_examples": new.get("train_examples"), **old}
        changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        if changed:
            what = ", ".join(f"{k} {old.get(k)} -> {new.get(k)}" for k in changed)
            raise UsageError(
                f"{self.path} holds a run with other settings ({what}): resume it with its own, "
                "or name another --out"
            )

    def _set_aside(self) -> None:
        names = [n for n in (*OURS, *OUR_FOLDERS) if (self.path / n).exists()]
        if not names:
            return
        k = 1
        while (self.path / f"previous-{k}").exists():
            k += 1
        aside = self.path / f"previous-{k}"
        aside.mkdir()
        for name in names:
            shutil.move(self.path / name, aside / name)
        print(
            f"An earlier run's files are now in {aside} (to continue a run, start with --resume)."
        )

    def write_environment(self, **more) -> None:
        """Versions and machine, what may explain a difference between two runs."""
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        host = {"python": platform.python_version(), "machine": platform.machine(), **processor()}
        env = {**host, "packages": versions, **more}
        if (self.path / "env.json").exists():
            before = json.loads((self.path / "env.json").read_text())
            speed, earlier = before.pop("images_per_second"), before.pop("earlier", [])
            env |= {"images_per_second": speed}
            if changed := {k: v for k, v in before.items() if env.get(k) != v}:
                earlier = [*earlier, changed]
            if earlier:
                env |= {"earlier": earlier}
        _write_json(self.path / "env.json", {"images_per_second": {}, **env})

    def write_speed(self, phase: str, images_per_second: float) -> None:
        """How fast a phase trained, evaluations included, compilation not."""
        env = json.loads((self.path / "env.json").read_text())
        env["images_per_second"][phase] = round(images_per_second)
        _write_json(self.path / "env.json", env)

    def phase(self, name: str):
        """A callback that writes a phase's records, in the place of what it wrote before."""
        file = self.path / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["phase"] != name]
        # A new file, then a rename: killed in between, the old one is still whole.
        scratch = file.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
        scratch.replace(file)
        events = self.path / "tensorboard" / name
        shutil.rmtree(events, ignore_errors=True)
        write_events = event_writer(events)

        def write(record: dict) -> None:
            told = {k: v for k, v in record.items() if k not in ("steps", "replayed")}
            line = {"phase": name, **told}
            with file.open("a") as out:
                out.write(json.dumps(line) + "\n")
            scalars = {k: v for k, v in told.items() if k not in ("step", "epoch")}
            write_events(record["step"], scalars)

        return write


def processor() -> dict:
    """The CPU's model, where Linux tells it, and how many cores there are."""
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return {"cpu": found[1] if found else platform.processor(), "cores": os.cpu_count()}


def read_metrics(path: str | pathlib.Path) -> list[dict]:
    """The lines of a run folder's metrics.jsonl, without a last one cut off by a kill."""
    file = pathlib.Path(path) / "metrics.jsonl"
    lines = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _write_json(path: pathlib.Path, content: dict) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=2) + "\n")
    scratch.replace(path)
