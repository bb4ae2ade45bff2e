"""One run of `fit` as it goes on: where it stands, how it is saved, stopped and taken up again."""

import contextlib
import logging
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kd2m_jax._locks import locked, stop_requests
from kd2m_jax.errors import NonFiniteLoss, Stopped
from kd2m_jax.training._identity import check_same
from kd2m_jax.training._plan import Plan
from kd2m_jax.training._processes import agreed, asked_to_stop, held_by_first
from kd2m_jax.training._programs import drop_unshared
from kd2m_jax.training._step import owned

_all_finite = jax.jit(lambda tree: jnp.all(jnp.array([jnp.isfinite(x).all() for x in tree])))


class Session:
    """Where a run stands.

    Attributes:
      states: the students' states, donated to each call.
      best: ``(params, state)`` of each student's best epoch so far.
      epoch: epochs done.
      position: steps done of the epoch under way.
      done: steps done in all.
    """

    def __init__(self, plan: Plan):
        self._plan, self._checkpoints = plan, None
        self._stop_signal: Callable[[], int | None] = lambda: None
        self.states = plan.states
        self.best = [owned(variables) for variables in self.variables]
        self.epoch = self.position = self.done = 0
        self._best_scores = [-math.inf] * len(plan.networks)
        self._best_is_new = self._stopped = False
        self._saved = (time.monotonic(), 0, 0)  # when, and which epoch and step

    @property
    def variables(self) -> list:
        """What is evaluated and returned of each student."""
        return [self._plan.kept(state) for state in self.states]

    @property
    def stopped_short(self) -> bool:
        """Whether max_steps are done, or a callback has said "stop"."""
        return self._stopped or (
            self._plan.max_steps is not None and self.done >= self._plan.max_steps
        )

    @property
    def place(self) -> dict[str, Any]:
        """Where in the batches it stands: arguments of `Batches.epoch`."""
        most = self._plan.max_steps
        return {
            "epoch": self.epoch,
            "steps": self._plan.steps_per_call,
            "skip": self.position,
            "done": self.done,
            "most": None if most is None else most - self.done + 1,  # one tells that there are more
            "waiting": self._stop_if_asked,
        }

    def run(self, rows: tuple[jax.Array, jax.Array | None], arrays) -> None:
        """Make one call of the program: a step or some, on these rows of the arrays."""
        plan = self._plan
        self.states, metrics = plan.program(self.states, plan.teacher_variables, rows, arrays)
        steps = len(rows[0])
        self.done, self.position = self.done + steps, self.position + steps
        # Metrics of the calls before are read while this one runs. An epoch's last steps wait for
        # its evaluation.
        for records, values in zip(plan.records, metrics, strict=True):
            records.add(self.done, self.epoch + 1, values)
        if len(plan.records[0]) >= plan.log_every:
            self._record()
        self._stop_or_save()

    def end_epoch(self, *, whole: bool) -> None:
        """Evaluate, keep the best, record. Of an epoch that max_steps cut, ``whole`` is False."""
        plan, scores = self._plan, []
        for i, (state, variables) in enumerate(zip(self.states, self.variables, strict=True)):
            scores.append(plan.evaluate[i](variables))
            if not _all_finite(jax.tree.leaves(state.params)):
                plan.records[i].settle()  # a loss that was not finite before says more
                whose = plan.records[i].whose
                raise NonFiniteLoss(f"the parameters{whose} are not finite after step {self.done}")
            plan.records[i].settle()
            if not math.isfinite(scores[i].get("test_loss", 0)):
                raise NonFiniteLoss(
                    f"the test loss{plan.records[i].whose} is not finite after step {self.done}, "
                    f"and the parameters are: {plan.why_not_finite}?"
                )
            quality = plan.records[i].quality(scores[i]) if scores[i] else -math.inf
            if not scores[i] or quality > self._best_scores[i]:
                self._best_is_new = True
                self._best_scores[i] = quality
                self.best[i] = owned(variables)  # the next step donates the state
        if whole:
            self.epoch, self.position = self.epoch + 1, 0
        # Callbacks last: where one raises, all of the epoch is done and can be saved.
        self._record(scores)
        self._stop_or_save()

    def _stop_or_save(self) -> None:
        """Save and raise if the run is to stop; save if the last save is old enough."""
        number = self._stop_signal()
        if number or time.monotonic() - self._saved[0] >= self._plan.save_every:
            self.save()
        if number:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(143)

    def _stop_if_asked(self) -> None:
        """Stop while a batch is waited for: of several processes each would ask at its own time."""
        if jax.process_count() == 1:
            self._stop_or_save()

    def _record(self, scores=None) -> None:
        """Close the record of every student, then hand them to the callbacks."""
        firsts = [len(records.history) for records in self._plan.records]
        for i, records in enumerate(self._plan.records):
            records.close(None if scores is None else scores[i])
        said = [
            records.deliver(first)
            for first, records in zip(firsts, self._plan.records, strict=True)
        ]
        self._stopped = self._stopped or agreed(any(said))

    def save(self) -> None:
        """Save the run as it stands, if there is a folder for it and anything new."""
        here = (self.epoch, self.done)
        if self._checkpoints is None or self._saved[1:] == here:
            return
        record = {
            "epoch": self.epoch,
            "position": self.position,
            "settings": self._plan.settings,
            "total": self._plan.total,
            # This reads what is in flight: a loss that is not finite is not saved.
            "logs": [records.state() for records in self._plan.records],
        }
        best = self.best if self._best_is_new else None
        self._checkpoints.save(self.done, self.states, record, best=best)
        self._best_is_new = False
        self._saved = (time.monotonic(), *here)

    def save_in_distress(self) -> None:
        """Save what can be saved while an error is on its way, which matters more."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.states)):
            return  # the call that failed had taken them
        if int(self.states[0].step) != self.done:
            return  # interrupted between a call and the note of it
        try:
            self.save()
        except NonFiniteLoss:
            return
        except Exception as error:
            logging.getLogger(__name__).warning("the run could not be saved: %s", error)

    def resume(self, checkpoints) -> None:
        """Save to these checkpoints from now on, after taking up what they hold."""
        plan, lost = self._plan, False
        if found := checkpoints.restore(self.states):
            self.states, saved = found
            check_same(saved["settings"], plan.settings, plan.checkpoint_dir)
            if saved.get("total", plan.total) != plan.total:
                logging.getLogger(__name__).warning(
                    "the run in %s was planned for %s steps and is continued to %s: a learning "
                    "rate that follows their number is another from here on",
                    plan.checkpoint_dir,
                    saved["total"],
                    plan.total,
                )
            self.epoch, self.position = saved["epoch"], saved["position"]
            self.done = int(self.states[0].step)
            self._saved = (time.monotonic(), self.epoch, self.done)
            best = checkpoints.restore(self.best, best=True)
            lost = best is None
            self.best = [owned(v) for v in self.variables] if best is None else best[0]
            said = [
                records.replay(old)
                for records, old in zip(plan.records, saved["logs"], strict=True)
            ]
            self._stopped = agreed(any(said))
        if lost and any(records.tests for records in plan.records):
            logging.getLogger(__name__).warning(
                "the best checkpoint in %s is lost: the best from step %d on is kept instead",
                plan.checkpoint_dir,
                self.done,
            )
        tests = [[] if lost else records.tests for records in plan.records]
        self._best_scores = [max(of_one, default=-math.inf) for of_one in tests]
        self._checkpoints = checkpoints

    def listen(self, stop_signal: Callable[[], int | None]) -> None:
        """Ask this function after each call which signal, if any, wants the run to stop."""
        self._stop_signal = stop_signal


@contextlib.contextmanager
def session(plan: Plan) -> Iterator[Session]:
    """Hold a run's folder, if it has one, and save there at the end, whatever the end is."""
    run = Session(plan)
    with contextlib.ExitStack() as stack:
        stack.callback(drop_unshared, plan.program)
        if plan.checkpoint_dir is None:
            yield run
            return
        from kd2m_jax.training._checkpoints import Checkpoints  # orbax takes a second

        stack.enter_context(held_by_first(locked(pathlib.Path(plan.checkpoint_dir) / ".lock")))
        # JAX listens for SIGTERM where there are several processes, so that they agree.
        if jax.process_count() > 1:
            run.listen(lambda: signal.SIGTERM if asked_to_stop() else None)
        else:
            run.listen(stack.enter_context(stop_requests()))
        run.resume(stack.enter_context(contextlib.closing(Checkpoints(plan.checkpoint_dir))))
        try:
            yield run
        except NonFiniteLoss:
            raise  # the last good checkpoint stays
        except (Exception, KeyboardInterrupt, SystemExit):
            run.save_in_distress()
            raise
        run.save()
