"""Training metrics on their way from the device to the callbacks."""

import math

import jax
import numpy as np


class NonFiniteLoss(FloatingPointError):
    """A training loss became NaN or infinite. The last good checkpoint is still there.

    `fit` raises it; the message names the step and each term of the loss. What helps: a smaller
    lambda (``coef``, or ``coef="auto"``), a smaller learning rate, inputs that are finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from kd2m_jax import NonFiniteLoss, fit, models
      >>> net = models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(0))
      >>> try:
      ...     fit(net, (jnp.full((8, 4), jnp.nan), jnp.zeros(8, int)), epochs=1, batch_size=8)
      ... except NonFiniteLoss as error:
      ...     print(str(error)[:36])
      the loss is not finite at step 1 (lo
    """


class Log:
    """Means over the steps since the last record, checked for NaN, handed to the callbacks."""

    def __init__(self, callbacks, has_teacher: bool, total: int | None, whose: str = ""):
        self.history: list[dict] = []
        self._whose = whose
        self._callbacks, self._total = callbacks, total
        names = {"loss": "loss", "task_loss": "task_loss", "accuracy": "train_accuracy"}
        if has_teacher:
            names |= {"distillation_loss": "distillation_loss", "coef": "coef"}
        self._names = names
        self._window: list[dict[str, float]] = []
        self._pending = None
        self._at = (0, 0)

    @property
    def waiting(self) -> int:
        """Steps since the last record."""
        in_flight = 0 if self._pending is None else len(self._pending["loss"])
        return len(self._window) + in_flight

    def add(self, step: int, epoch: int, metrics: dict[str, jax.Array]) -> None:
        """Take a step's metrics. They are read one step later, while the next one runs."""
        self.settle()
        self._pending, self._at = metrics, (step, epoch)

    def settle(self) -> None:
        """Read the metrics still in flight; NonFiniteLoss if one's loss is not finite."""
        if self._pending is None:
            return
        # A sum of metrics reports its terms beside it.
        names = [*self._names, *(k for k in self._pending if k.startswith("distillation_loss/"))]
        columns = {name: np.asarray(self._pending[name], np.float64) for name in names}
        self._pending = None
        losses = columns["loss"]
        for i in range(len(losses)):
            values = {name: float(column[i]) for name, column in columns.items()}
            if not math.isfinite(values["loss"]):
                terms = ", ".join(f"{name} {value}" for name, value in values.items())
                step = self._at[0] - len(losses) + 1 + i
                # Before anything was learnt: cross-entropy is NaN for a label beyond the logits.
                hint = ": inputs not finite, or labels not below the number of classes?"
                raise NonFiniteLoss(
                    f"the loss{self._whose} is not finite at step {step} ({terms})"
                    + (hint if step == 1 else "")
                )
            self._window.append(values)

    def emit(self, scores: dict[str, float]) -> None:
        """Close the window and hand a record over."""
        self.settle()
        if not self._window:
            return
        step, epoch = self._at
        record = {"step": step, "epoch": epoch, "steps": self._total}
        for name in self._window[0]:
            alias = self._names.get(name, name)
            record[alias] = sum(values[name] for values in self._window) / len(self._window)
        record |= scores
        self._window = []
        self.history.append(record)
        for callback in self._callbacks:
            callback(record)

    def state(self) -> dict:
        """What `replay` takes: all records, and the steps since the last one."""
        self.settle()
        return {"history": self.history, "window": self._window, "at": self._at}

    def replay(self, state: dict) -> None:
        """Hand the records of an earlier, interrupted run over again, marked as such."""
        self.history, self._window = list(state["history"]), list(state["window"])
        self._at = tuple(state["at"])
        for record in self.history:
            for callback in self._callbacks:
                callback(record | {"replayed": True})
