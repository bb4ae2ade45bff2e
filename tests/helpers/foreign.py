"""Networks as other people write them: none of them knows of `Outputs`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from kd2m_jax._compat import layer_list


class Block(nnx.Module):
    """A residual block."""

    def __init__(self, width, out, stride, rngs):
        self.conv = nnx.Conv(width, out, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(out, momentum=0.9, rngs=rngs)
        self.shortcut = nnx.Conv(width, out, (1, 1), strides=stride, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)) + self.shortcut(x))


class NnxResNet(nnx.Module):
    """In the way of bonsai: stages are lists, the call returns logits."""

    def __init__(self, classes=3, width=8, rate=0.1, *, rngs):
        self.stem = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.blocks = layer_list([Block(width, width, 1, rngs), Block(width, 2 * width, 2, rngs)])
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.fc = nnx.Linear(2 * width, classes, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(self.dropout(x.mean((1, 2))))


class Attention(nnx.Module):
    """A transformer's layer."""

    def __init__(self, width, rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(width, width, rngs=rngs), nnx.gelu)

    def __call__(self, x):
        x = x + self.attend(self.norm(x))
        return x + self.mlp(x)


class NnxViT(nnx.Module):
    """A small vision transformer: patches, a class token, layers, a head."""

    def __init__(self, classes=3, width=16, *, rngs):
        self.patch = nnx.Conv(1, width, (4, 4), strides=4, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, width)))
        self.layers = layer_list([Attention(width, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        x = self.patch(x).reshape(len(x), -1, self.token.shape[-1])
        token = jnp.broadcast_to(self.token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class LinenBlock(nn.Module):
    """A residual block."""

    width: int

    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        y = nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)
        return nn.relu(y + nn.Conv(self.width, (1, 1))(x))


class LinenResNet(nn.Module):
    """In the way of flaxmodels: the call returns a dict of activations."""

    classes: int = 3

    @nn.compact
    def __call__(self, x, train=True):
        act = {}
        x = act["conv1"] = nn.Conv(8, (3, 3))(x)
        for i in range(2):
            x = act[f"block{i}"] = LinenBlock(8 * (i + 1), name=f"blocks_{i}")(x, train)
        act["fc"] = nn.Dense(self.classes, name="fc")(x.mean((1, 2)))
        return act


def equinox_net(key, classes=3, size=64):
    """Return an Equinox network with a stateful BatchNorm and dropout, and its state."""
    import equinox as eqx

    class Net(eqx.Module):
        hidden: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        dropout: eqx.nn.Dropout
        head: eqx.nn.Linear

        def __init__(self, key):
            one, two = jax.random.split(key)
            self.hidden, self.head = (
                eqx.nn.Linear(size, 16, key=one),
                eqx.nn.Linear(16, classes, key=two),
            )
            self.norm = eqx.nn.BatchNorm(16, "batch", mode="batch")
            self.dropout = eqx.nn.Dropout(0.1)

        def __call__(self, x, state, *, key=None):
            z, state = self.norm(self.hidden(x.reshape(-1)), state)
            z = jax.nn.relu(z)
            return (z, self.head(self.dropout(z, key=key))), state

    return eqx.nn.make_with_state(Net)(key)
