"""Where a teacher's outputs come from, as `fit` was told."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd2m_jax._outputs import Outputs
from kd2m_jax.adapters import Model, Network, as_network
from kd2m_jax.callbacks import WeightAverage
from kd2m_jax.losses import ClassStatistics
from kd2m_jax.losses._resolve import AnyMetric
from kd2m_jax.teachers import Bank, EmaTeacher, Memory
from kd2m_jax.training._batches import Transfer
from kd2m_jax.training._students import Teacher, check_memory_suits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A teacher of one of five kinds, or none; and the average that is kept of the student.

    Attributes:
      network: the frozen network, which each step runs.
      gone: what is left of one that cannot run.
      stored: outputs for the training arrays, computed before.
      average: of the student, which `EmaTeacher` makes its own teacher.
      variables: the network's, or the `Memory` of what is left; on all devices.
    """

    network: Network | None = None
    gone: Bank | ClassStatistics | None = None
    stored: Outputs | None = None
    average: EmaTeacher | WeightAverage | None = None
    variables: Any = None

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        variables: Any,
        transfer: Transfer | None,
        metrics: list[AnyMetric],
        callbacks: Sequence[Any],
        place: Callable[[Any], Any],
    ) -> "Source":
        """Check what `fit` was given; ValueError where it does not fit together."""
        has_outputs = transfer is not None and transfer.teacher is not None
        if transfer is not None and (
            isinstance(teacher, Outputs) or (teacher is not None and has_outputs)
        ):
            raise ValueError(
                "transfer brings the teacher's outputs for its own inputs, as (x, Outputs), and "
                "there is another teacher: which one is meant?"
            )
        if transfer is not None and teacher is None and not has_outputs:
            raise ValueError("transfer needs a teacher, or its outputs: transfer=(x, Outputs)")
        averages = [one for one in callbacks if isinstance(one, WeightAverage)]
        if isinstance(teacher, EmaTeacher):
            averages.append(teacher)  # pyright: ignore
        if len(averages) > 1:
            raise ValueError("one average of the student's weights can be kept, and there are two")
        average = averages[0] if averages else None
        rest = isinstance(teacher, Outputs | EmaTeacher | Bank | ClassStatistics | None)
        if rest and variables is not None:
            raise ValueError("teacher_variables are those of a network, and the teacher is none")
        if isinstance(teacher, Bank | ClassStatistics):
            check_memory_suits(metrics, teacher)
            return cls(gone=teacher, average=average, variables=place(Memory.of(teacher)))
        if rest:
            return cls(stored=teacher if isinstance(teacher, Outputs) else None, average=average)
        network = as_network(teacher)  # pyright: ignore
        variables = place(variables_of(teacher, variables))  # pyright: ignore
        return cls(network=network, average=average, variables=variables)

    @property
    def is_given(self) -> bool:
        """Whether there is a teacher beside outputs that were computed before."""
        return self.network is not None or self.gone is not None or self.is_own_average

    @property
    def is_own_average(self) -> bool:
        """Whether the student's average is its teacher."""
        return isinstance(self.average, EmaTeacher)

    @property
    def rows(self) -> int | None:
        """How many rows of a bank a step draws, if not as many as the batch has."""
        return self.gone.rows if isinstance(self.gone, Bank) else None

    @property
    def options(self) -> dict[str, Any]:
        """What a step has to know of it."""
        return {"average": self.average, "remembers": self.gone is not None, "rows": self.rows}

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it continues."""
        decay = None if self.average is None else self.average.decay
        return {
            "decay": decay if self.is_own_average else None,
            "weight_average": None if self.is_own_average else decay,
            "rows": self.rows,
        }

    def default_rule(self, stored: Outputs | None) -> str:
        """Return what ``unlabelled=None`` means, where batches bring these outputs."""
        predicts = self.network is not None or self.is_own_average
        if stored is not None:
            predicts = stored.logits is not None
        return "teacher" if predicts and self.gone is None else "balanced"


def variables_of(model: Model, variables: Any) -> Any:
    """Return ``(params, state)`` of a trained model."""
    if isinstance(variables, Mapping) and "params" in variables:
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}
    if variables is not None:
        if not isinstance(variables, tuple | list) or len(variables) != 2:
            raise TypeError(
                "variables are (params, state) or a Linen module's dict, got a "
                f"{type(variables).__name__}: a trained module is the model itself"
            )
        return variables
    own = as_network(model).variables
    if own is not None:
        return own
    raise ValueError(
        "the trained variables are needed (teacher_variables of fit): only an NNX module, or a "
        "network made with them, brings its own"
    )
