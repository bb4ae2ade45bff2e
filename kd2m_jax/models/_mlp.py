"""Multi-layer perceptrons, with those of the paper's MNIST experiment."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kd2m_jax._compat import layer_list
from kd2m_jax._outputs import Outputs
from kd2m_jax.models._layers import check_array, head, linear


class MLP(nnx.Module):
    """Map flattened images through ReLU hidden layers and a linear head.

    The features ``[n, d]``, d = widths[-1], are the last hidden layer's outputs, after its ReLU.

    Args:
      widths: number of units of each hidden layer, at least one layer.
      num_classes: number k of logits.
      in_features: number of values in one example, e.g. 784 for an image of 28 x 28.
      dtype: what the hidden layers compute in.
      rngs: keys for the initial parameters.

    Raises:
      ValueError: if ``widths`` is empty or holds a number below 1; at the call, if an example
        does not hold ``in_features`` values.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> out = MLP((64, 32), 10, in_features=64, rngs=nnx.Rngs(0))(jnp.ones((5, 8, 8, 1)))
      >>> out.features.shape, out.logits.shape, out.maps
      ((5, 32), (5, 10), ())
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        in_features: int,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must be positive numbers, at least one, got {widths}")
        self.in_features = in_features
        self.hidden = layer_list(
            linear(fan_in, fan_out, dtype, rngs)
            for fan_in, fan_out in itertools.pairwise((in_features, *widths))
        )
        self.fc = head(widths[-1], num_classes, dtype, rngs)

    def __call__(self, x: jax.Array) -> Outputs:
        """Map ``[n, ...]`` examples to ``Outputs``, without maps."""
        check_array("MLP", x)
        if math.prod(x.shape[1:]) != self.in_features:
            raise ValueError(f"expected {self.in_features} values per example, got {x.shape[1:]}")
        x = x.reshape(x.shape[0], -1)
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        features = x.astype(self.fc.dtype)
        return Outputs(features, self.fc(features))


def mlp_teacher(
    num_classes: int, *, in_features: int, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
) -> MLP:
    """Build the paper's teacher for MNIST, ``MLP((512, 256, 128, 128, 128), ...)``.

    `MLP` says what ``num_classes``, ``in_features``, ``dtype`` and ``rngs`` are, and what raises.

    Returns:
      A network with features ``[n, 128]``.
    """
    widths = (512, 256, 128, 128, 128)
    return MLP(widths, num_classes, in_features=in_features, dtype=dtype, rngs=rngs)


def mlp_student(
    num_classes: int, *, in_features: int, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
) -> MLP:
    """Build the paper's student for MNIST, ``MLP((512, 256, 128), ...)``.

    `MLP` says what ``num_classes``, ``in_features``, ``dtype`` and ``rngs`` are, and what raises.

    Returns:
      A network with features ``[n, 128]``.
    """
    widths = (512, 256, 128)
    return MLP(widths, num_classes, in_features=in_features, dtype=dtype, rngs=rngs)
