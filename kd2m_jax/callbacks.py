"""Callbacks of `fit` that many want: stop early, average the weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


class EarlyStopping:
    """End a run when a score of ``eval_data`` has not improved for a while.

    `FitResult.best` is then the best epoch's student. Give ``eval_data`` that is held out of the
    training data: what decides when to stop is no test set any more. Of a population it ends the
    run when none of its students has improved. A resumed run counts on, and so remains ended.

    Args:
      patience: >= 1, evaluations without an improvement.
      monitor: the score's name in the records; by default what decides which epoch is the best:
        "test_accuracy" or, with a ``task_loss``, "test_loss".
      minimize: whether lower is better; by default of a name that ends with "loss".

    Raises:
      ValueError: patience below 1; at the first evaluation, a score that is not there.

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
        self._of_student: dict[int, tuple[float, int]] = {}  # the best, evaluations since then

    def __call__(self, record: dict) -> str | None:
        """Look at a record: "stop" where patience is at its end."""
        if "test_loss" not in record:  # none of an evaluation
            return None
        monitor = self.monitor
        if monitor is None:
            monitor = "test_accuracy" if "test_accuracy" in record else "test_loss"
        if monitor not in record:
            scores = ", ".join(name for name in record if name.startswith("test_"))
            raise ValueError(f"there is no score {monitor!r} to stop by: {scores}")
        lower = monitor.endswith("loss") if self.minimize is None else self.minimize
        score = -record[monitor] if lower else record[monitor]
        student = record.get("student", 0)
        best, since = self._of_student.get(student, (-np.inf, 0))
        self._of_student[student] = (score, 0) if score > best else (best, since + 1)
        waiting = any(since < self.patience for _, since in self._of_student.values())
        return None if waiting else "stop"


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
      >>> fit(net, data, epochs=2, batch_size=8, callbacks=[WeightAverage(0.9)]).history[-1]["step"]
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
