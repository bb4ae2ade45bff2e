"""Batch normalisation over all devices of a step, without being told to."""

import contextlib

import jax
from flax import linen as nn
from flax import nnx

# The name of the axis that a step runs over on several devices. A network's batch statistics
# are taken over it wherever it is bound.
DEVICES = "devices"


def synchronise(call, args, kwargs, context):
    """Linen interceptor: BatchNorm takes its statistics over all devices."""
    m = context.module
    if isinstance(m, nn.BatchNorm) and m.axis_name is None and on_devices():
        object.__setattr__(m, "axis_name", DEVICES)  # a bound module is a copy for this call
    if isinstance(m, nnx.bridge.ToLinen) and context.method_name == "__call__" and on_devices():
        with _synchronised_nnx():
            return call(*args, **kwargs)
    return call(*args, **kwargs)


@contextlib.contextmanager
def _synchronised_nnx():
    """Let every BatchNorm of an NNX module that Linen makes as it is called do the same."""
    plain = nnx.BatchNorm.__call__

    def synchronised(self, *args, **kwargs):
        if self.axis_name is None:
            self.axis_name = DEVICES
        return plain(self, *args, **kwargs)

    nnx.BatchNorm.__call__ = synchronised
    try:
        yield
    finally:
        nnx.BatchNorm.__call__ = plain


def on_devices() -> bool:
    """Whether this is traced inside a step over several devices."""
    try:
        jax.lax.axis_size(DEVICES)
    except NameError:
        return False
    return True
