"""Every error that the library raises by a name of its own. Importing them needs no JAX."""

__all__ = ["CheckpointError", "NonFiniteLoss", "Stopped"]


class CheckpointError(ValueError):
    """A checkpoint folder that is another process's or another run's, or cannot be written.

    `fit` raises it before the first step, and then nothing in the folder is changed; or when a save
    fails (a full disk, say), and then the save before is still there.

    Example:
      >>> from kd2m_jax import CheckpointError
      >>> issubclass(CheckpointError, ValueError)
      True
    """


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


class Stopped(SystemExit):
    """SIGTERM came: the step was finished and saved. The same call, or --resume, continues.

    `fit` raises it where it has a checkpoint folder. A program that does not catch it ends with
    the status 143 that the shell expects after SIGTERM.

    Example:
      >>> from kd2m_jax import Stopped
      >>> Stopped(143).code, issubclass(Stopped, SystemExit)
      (143, True)
    """
