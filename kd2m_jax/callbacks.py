"""Callbacks of `fit` that many want: stop early, average the weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["EarlyStopping", "WeightAverage"]


class EarlyStopping:
    """End a run when a score of ``eval_data`` has not improved for a while.

    `FitResult.best` is then the student of the epoch with the best accuracy (or task loss),
    whatever is monitored. Give ``eval_data`` that is held out of the training data: what decides
    when to stop is no test set any more. Of a population it ends the run when none of its students
    has improved. A resumed run counts on, and so remains ended. An evaluation after ``max_steps``
    counts as any other.

    Args:
      patience: >= 1, evaluations without an improvement.
      monitor: the score's name in the records; by default what decides which epoch is the best:
        "test_accuracy" or, with a ``task_loss``, "test_loss".
      minimize: whether lower is better; by default of a name that ends with "loss" or "ece".

    Raises:
      ValueError: patience below 1; in `fit`, no ``eval_data``; at the first evaluation, a score
        that is not there.

    Example:
      >>> stop = EarlyStopping(2)
      >>> for accuracy in (0.5, 0.6, 0.6, 0.55):
      ...     print(stop({"test_accuracy": accuracy, "test_loss": 1.0}))
      None
      None
      None
      stop
    """

    def __init__(self, patience: int, *, monitor: str | None = None, minimize: bool | None = None):
        if not isinstance(patience, int | np.integer) or patience < 1:
            raise ValueError(f"patience must be a whole number >= 1, got {patience!r}")
        self.patience, self.monitor, self.minimize = int(patience), monitor, minimize
        self.begin("test_accuracy")

    def begin(self, monitor: str) -> None:
        """Forget what was seen, before a run: `fit` calls it, with what decides the best epoch."""
        self._default = monitor
        # For each student: the best, evaluations since then, evaluations in all.
        self._seen: dict[int, tuple[float, int, int]] = {}

    def __call__(self, record: dict) -> str | None:
        """Look at a record: "stop" where patience is at its end."""
        if "test_loss" not in record:  # none of an evaluation
            return None
        monitor = self.monitor or self._default
        if monitor not in record:
            if record.get("replayed"):  # of a run that did not have it yet
                return None
            scores = ", ".join(name for name in record if name.startswith("test_"))
            raise ValueError(f"there is no score {monitor!r} to stop by: {scores}")
        lower = monitor.endswith(("loss", "ece")) if self.minimize is None else self.minimize
        score = -record[monitor] if lower else record[monitor]
        student = record.get("student", 0)
        best, since, count = self._seen.get(student, (-np.inf, 0, 0))
        best, since = (score, 0) if score > best else (best, since + 1)
        self._seen[student] = (best, since, count + 1)
        # Of a population the records of one evaluation come one by one.
        all_there = len({count for *_, count in self._seen.values()}) == 1
        waiting = any(since < self.patience for _, since, _ in self._seen.values())
        return "stop" if all_there and not waiting else None


@dataclasses.dataclass(frozen=True)
class WeightAverage:
    """Evaluate and return a moving average of the student's weights in the place of the last ones.

    After step t the average is ``sum_s decay^(t - s) w_s / sum_s decay^(t - s)`` over the steps s
    from 1 to t: the initial weights have no part in it. It is taken of the parameters and of the
    floating-point part of the state (batch statistics), in float32 at least. The scores of
    ``eval_data``, `FitResult.student`, `FitResult.best` and `restore` are the average's;
    `FitResult.state` has the weights that are trained.

    Attributes:
      decay: between 0 and 1: the last 1 / (1 - decay) steps count, roughly.

    Raises:
      ValueError: a decay that is not between 0 and 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from kd2m_jax import fit, models
      >>> net = models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(0))
      >>> data = jnp.ones((8, 4)), jnp.zeros(8, int)
      >>> average = WeightAverage(0.9)
      >>> fit(net, data, epochs=2, batch_size=8, callbacks=[average]).history[-1]["step"]
      2

    References:
      Polyak & Juditsky, SIAM J. Control Optim. 30, 1992; with exponential weights as in Kingma &
      Ba, Adam, ICLR 2015, section 7.2.
    """

    decay: float

    def __post_init__(self):
        if not isinstance(self.decay, int | float | np.number) or not 0 < self.decay < 1:
            raise ValueError(f"decay must be between 0 and 1, got {self.decay!r}")
        object.__setattr__(self, "decay", float(self.decay))

    def __call__(self, record: dict) -> None:
        """Do nothing: `fit` itself keeps the average."""

    def kept(self, step: jax.Array) -> jax.Array:
        """Return how much of the average stays at this step, counted from 0."""
        log = float(np.log(self.decay))
        # decay (1 - decay^t) / (1 - decay^(t + 1)), without the difference of near numbers
        return self.decay * jnp.expm1(step * log) / jnp.expm1((step + 1) * log)
