"""The folder that a run leaves: every path in it, and the files that need no JAX."""

import contextlib
import dataclasses
import datetime
import json
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator

from kd2m_jax import internal

from ..common import files, machine
from ..common.errors import UsageError
from .configuration import RunConfig
from .events import event_writer

# The metric of a run without distillation, and the name of its cell in a table.
ALONE = "none"
OURS = ("config.json", "env.json", "metrics.jsonl", "report.md", "curves.png", "diverged.json")
OUR_FOLDERS = ("checkpoints", "tensorboard")
PACKAGES = ("kd2m-jax", "jax", "jaxlib", "flax", "optax", "ott-jax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """One run's folder, which need not exist yet.

    Attributes:
      path: the folder.
      in_table: whether it is a cell of a table, which trains a seed's student alone once for all
        metrics and keeps it in the cell `ALONE` beside.
    """

    path: pathlib.Path
    in_table: bool = False

    def teacher(self, config: RunConfig) -> pathlib.Path:
        """Return the teacher's checkpoints, which the runs beside this one share."""
        return self.path.parent / "teachers" / config.teacher_name

    @property
    def student(self) -> pathlib.Path:
        """Return the checkpoints of the student alone."""
        own = self.path.parent / ALONE if self.in_table else self.path
        return own / "checkpoints" / "student"

    @property
    def distilled(self) -> pathlib.Path:
        """Return the checkpoints of the distilled student."""
        return self.path / "checkpoints" / "distilled"

    @property
    def report(self) -> pathlib.Path:
        """Return the report, which is written last."""
        return self.path / "report.md"

    @property
    def curves(self) -> pathlib.Path:
        """Return the figure of accuracy and losses."""
        return self.path / "curves.png"

    @property
    def finished(self) -> bool:
        """Tell whether the run came to its end."""
        return self.report.exists()

    @property
    def diverged(self) -> int | None:
        """Return the step at which its training diverged, if it did."""
        file = self.path / "diverged.json"
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            return int(files.read_object(file)["step"])
        return None  # damaged: it is tried again

    @property
    def config(self) -> RunConfig:
        """Read config.json; UsageError where it is not the configuration of a run."""
        file = self.path / "config.json"
        try:
            return RunConfig.from_json(files.read_object(file))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{file} cannot be used: {error}") from error

    @property
    def environment(self) -> dict:
        """Read env.json, which is only a note: a damaged one counts as none."""
        file = self.path / "env.json"
        try:
            return files.read_object(file)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            files.tell(f"{file} cannot be read ({error}): written anew")
            return {}

    @property
    def records(self) -> list[dict]:
        """Read metrics.jsonl."""
        return read_metrics(self.path)

    @property
    def trained_on(self) -> datetime.date:
        """Return the day of its last checkpoint, which survives a copy of the folder."""
        saved = (self.path / "checkpoints").glob("*/last/*/_CHECKPOINT_METADATA")
        times = []
        for file in saved:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                times.append(files.read_object(file)["commit_timestamp_nsecs"] / 1e9)
        times = times or [(self.path / "config.json").stat().st_mtime]
        return datetime.date.fromtimestamp(max(times))

    @contextlib.contextmanager
    def opened(self, config: RunConfig, *, resume: bool) -> Iterator["RunFolder"]:
        """Begin or continue a run, and hold the folder against other processes meanwhile.

        An earlier run's files are moved to ``previous-<k>/`` unless the run is resumed. Files that
        are not ours are left alone.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out {self.path} is a file, not a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {self.path} cannot be made: {error}") from error
        with internal.locked(self.path / ".lock"):
            file = self.path / "config.json"
            if resume and file.exists():
                self._check_same(config)
            else:
                self._set_aside()
            files.write_json(file, config.to_json())
            yield self

    def _check_same(self, config: RunConfig) -> None:
        file = self.path / "config.json"
        try:
            files.read_object(file)
        except ValueError as error:
            aside = file.with_name(f"config.json.unreadable-{time.time_ns()}")
            file.rename(aside)
            files.tell(
                f"{file} cannot be read ({error}) and is now {aside.name}: whether the settings "
                "are the run's is told by the checkpoints alone"
            )
            return
        old = self.config
        if old.train_examples is None:
            old = dataclasses.replace(old, train_examples=config.train_examples)
        if changes := old.changes(config):
            what = ", ".join(f"{key} {was} -> {now}" for key, (was, now) in changes.items())
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
        """Write versions and machine, which may explain a difference between two runs."""
        flags = sorted(internal.compiler_flags_in_force())
        env = {**machine.host(), "packages": machine.versions(PACKAGES), "xla_flags": flags, **more}
        if before := self.environment:
            speed = before.pop("images_per_second", None) or {}
            earlier = before.pop("earlier", None) or []
            # A run from before flags were written down had those of the environment alone.
            before["xla_flags"] = before.get("xla_flags") or []
            if before["xla_flags"] != flags:
                then, now = (" ".join(f) or "none" for f in (before["xla_flags"], flags))
                print(
                    f"{self.path} was begun with other compiler settings ({then}, now {now}): what "
                    "is still to be trained may differ in its last digits."
                )
            for term, solver in before.get("solver", {}).items():
                if (now := env.get("solver", {}).get(term)) not in (None, solver):
                    print(
                        f"{self.path} was begun with solver {solver} for {term}, and goes on here "
                        f"with {now}: their gradients differ."
                    )
            env |= {"images_per_second": speed}
            if changed := {k: v for k, v in before.items() if env.get(k) != v}:
                earlier = [*earlier, changed]
            if earlier:
                env |= {"earlier": earlier}
        files.write_json(self.path / "env.json", {"images_per_second": {}, **env})

    def write_speed(self, phase: str, images_per_second: float) -> None:
        """Write how fast a phase trained, evaluations included, compilation not."""
        env = self.environment
        speeds = env.get("images_per_second") or {}
        env["images_per_second"] = speeds | {phase: round(images_per_second)}
        files.write_json(self.path / "env.json", env)

    def write_diverged(self, message: str) -> None:
        """Write at which step the training diverged, so that it is not tried again."""
        step = re.search(r"step (\d+)", message)
        record = {"step": int(step[1]) if step else 0, "message": message}
        files.write(self.path / "diverged.json", json.dumps(record) + "\n")

    @contextlib.contextmanager
    def writer(self, phase: str) -> Iterator[Callable[[dict], None]]:
        """Yield a callback of `kd2m_jax.fit` that writes a phase's records.

        They replace the records that an earlier attempt at the phase wrote.
        """
        file = self.path / "metrics.jsonl"
        kept = [line for line in self.records if line["phase"] != phase]
        files.write(file, "".join(json.dumps(line) + "\n" for line in kept))
        events = self.path / "tensorboard" / phase
        shutil.rmtree(events, ignore_errors=True)

        def write(record: dict) -> None:
            values = {k: v for k, v in record.items() if k not in ("steps", "replayed")}
            with file.open("a") as out:
                out.write(json.dumps({"phase": phase, **values}) + "\n")
            for name in values.keys() - {"step", "epoch"}:
                writer.add_scalar(name, record[name], record["step"])

        with event_writer(events) as writer:
            yield write


def read_metrics(path: str | pathlib.Path) -> list[dict]:
    """Read a run folder's metrics.jsonl, as far as it can be read."""
    return files.read_lines(pathlib.Path(path) / "metrics.jsonl", needed="phase")
