"""Data, batches and evaluation data that are not what they should be: one sentence, at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import Network, NonFiniteLoss, Outputs, fit, models

N, D = 48, 4


def data():
    x, _, labels = draw("clustered", N, D, classes=3)
    return x.astype(np.float32), labels.astype(np.int32)


def mlp(seed=0):
    return models.MLP((8,), 3, in_features=D, rngs=nnx.Rngs(seed))


def run(student, given, **options):
    return fit(student, given, epochs=1, batch_size=16, optimizer=optax.sgd(0.1), **options)


X, Y = data()
FAULTS = [
    ((X, Y[:, None]), r"labels must be \[n\], got \[48, 1\]: take labels\[:, 0\]"),
    ((X, np.eye(3, dtype=int)[Y]), "one class number per example, no one-hot rows"),
    ((X, Y[:40]), "48 inputs, but 40 labels"),
    ((X[:40], Y), "40 inputs, but 48 labels"),
    ((X, np.where(Y == 2, -2, Y)), "labels must be class numbers from 0 to 2, got -2"),
    ((X, Y + 1), "labels must be class numbers from 0 to 2, got 3"),
    ((X, Y * 0.9), "labels must be integers, got float64: distributions"),
    ((X, Y.astype(np.float32)), "labels must be integers, got float32"),
    ((X, Y.astype(np.int64) + 2**40), "do not fit into 32 bits"),
    ((X[:0], Y[:0]), "has no examples"),
    (({}, Y), "has no inputs"),
    (({"ids": X, "mask": X[:40]}, Y), "40 inputs, but 48 labels"),
    ((np.full((N, D), 2**40), Y), "x has integers that do not fit into 32 bits"),
    (([["1", "2", "3", "4"]] * N, Y), "x must be numbers, got <U1"),
    ((np.full((N, D), "1"), Y), "x must be numbers, got <U1"),
    ((X, np.ma.masked_array(Y, Y == 2)), "labels are masked"),
    ({"image": X, "target": Y}, "is a dict of image, target: it needs one key of image/x and one"),
    ({"image": X, "x": X, "label": Y}, "is a dict of image, x, label"),
]
WAYS = {
    "data": lambda given: {"given": given},
    "batch 1": lambda given: {"given": [given]},
    "eval_data": lambda given: {"given": data(), "eval_data": given},
}


@pytest.mark.parametrize("what", WAYS)
@pytest.mark.parametrize(("given", "message"), FAULTS)
def test_a_fault_is_named(given, message, what):
    below = message.replace("from 0 to 2, got -2", "from 0 (on|to 2), got -2")
    with pytest.raises((ValueError, TypeError), match=f"^{what}.*{below}"):
        run(mlp(), **WAYS[what](given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (list(data()), r"eval_data is a list of two arrays: pass them as a tuple"),
        (X, "eval_data must be .*, got one array"),
        (7, "eval_data must be .*, got a int"),
    ],
)
def test_evaluation_data_of_another_kind(given, message):
    with pytest.raises(ValueError, match=message):
        run(mlp(), data(), eval_data=given)


def test_a_fault_in_a_later_batch_is_named_and_what_was_trained_is_kept(tmp_path):
    batches = [(X[:16], Y[:16]), (X[16:32], np.full(16, -2)), (X[32:], Y[32:])]
    with pytest.raises(ValueError, match="batch 2: labels must be class numbers from 0 to 2"):
        run(mlp(), batches, checkpoint_dir=tmp_path)
    batches[1] = (X[16:32], Y[16:32])
    assert run(mlp(), batches, checkpoint_dir=tmp_path).history[-1]["step"] == 3


class OneBuffer:
    """A loader that writes each batch into the arrays of the one before."""

    def __init__(self):
        self.x, self.labels = np.empty((16, D), np.float32), np.empty(16, np.int32)

    def __len__(self):
        return N // 16

    def __iter__(self):
        for start in range(0, N, 16):
            self.x[:], self.labels[:] = X[start : start + 16], Y[start : start + 16]
            yield self.x, self.labels
            self.x[:], self.labels[:] = np.nan, 0


def test_a_loader_may_use_its_buffers_again():
    fresh = [(X[i : i + 16].copy(), Y[i : i + 16].copy()) for i in range(0, N, 16)]
    assert run(mlp(), OneBuffer()).history == run(mlp(), fresh).history


def summing():
    """Make a network of two inputs, which it adds."""
    inner = mlp()

    def apply(params, state, x, *, train, rng=None):
        return nnx.merge(graph, params)(x["ids"] + x["mask"]), state

    graph, params = nnx.split(inner)
    return Network(lambda key, x: (params, {}), apply)


@pytest.mark.parametrize(
    "given",
    [
        {"image": {"ids": X, "mask": 0 * X}, "label": Y},
        ({"ids": X, "mask": 0 * X}, Y),
        [({"ids": X[i : i + 16], "mask": 0 * X[:16]}, Y[i : i + 16]) for i in range(0, N, 16)],
        [{"x": {"ids": X[i : i + 16], "mask": 0 * X[:16]}, "y": Y[i : i + 16]}
         for i in range(0, N, 16)],
    ],
)  # fmt: skip
def test_inputs_may_be_trees_and_batches_dicts(given):
    evaluation = ({"ids": X, "mask": 0 * X}, Y)
    last = run(summing(), given, eval_data=evaluation).history[-1]
    assert last["step"] == 3 and np.isfinite(last["test_loss"])
    if isinstance(given, list):  # in the same order as arrays of one input
        plain = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, N, 16)]
        expected = run(mlp(), plain, eval_data=data()).history[-1]
        for name in ("loss", "test_loss", "test_accuracy"):
            np.testing.assert_allclose(last[name], expected[name], rtol=1e-5)


def test_a_class_too_small_for_per_class_is_named():
    labels = np.repeat([0, 1, 2], [24, 21, 3])
    with pytest.raises(ValueError, match=r"per_class 4 would never draw .* examples: 2 \(3\)$"):
        run(mlp(), (X, labels), per_class=4)
    run(mlp(), (X, labels), per_class=2)


def test_data_beyond_the_memory_is_refused_before_it_is_copied():
    huge = np.broadcast_to(np.zeros((1, 64, 64, 3), np.float32), (10**9, 64, 64, 3))
    with pytest.raises(ValueError, match=r"data takes 45,780\.1 GiB, and .*: give an iterable"):
        run(mlp(), (huge, np.broadcast_to(np.zeros(1, np.int32), 10**9)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
        ({"seed": 2**32}, r"seed must be from 0 to 2\*\*32 - 1, got 4294967296"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": None}, "seed must be from 0 to .*, got None"),
        ({"seed": 1.5}, "seed must be from 0 to .*, got 1.5"),
        ({"save_every": None}, "save_every must be >= 0 seconds, got None"),
        ({"task_coef": None}, "task_coef must be a number >= 0 or a schedule, got None"),
        ({"task_coef": "0.5"}, "task_coef must be a number >= 0 or a schedule, got '0.5'"),
        ({"coef": np.array([0.1, 1.0])}, "coef must be a number >= 0 or a schedule"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        fit(mlp(), data(), **{"batch_size": 16, "epochs": 1} | options)


def test_a_network_of_several_outputs_of_unequal_classes():
    """A population is held to the fewest classes that one of its students knows."""
    fewer = models.MLP((8,), 2, in_features=D, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        run([mlp(), fewer], data())


def test_labels_from_torch_or_lists():
    torch = pytest.importorskip("torch")
    expected = run(mlp(), data()).history
    assert run(mlp(), (torch.tensor(X), torch.tensor(Y))).history == expected
    assert run(mlp(), (X, Y.tolist())).history == expected
    assert run(mlp(), (jnp.asarray(X), jax.device_put(Y))).history == expected


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda x: x, "the student's outputs must be kd2m_jax.Outputs or a tuple"),
        (lambda x: Outputs(x), "the student returns no logits"),
    ],
)
def test_a_network_that_returns_something_else(outputs, message):
    bad = Network(lambda key, x: ({}, {}), lambda p, s, x, *, train, rng=None: (outputs(x), s))
    with pytest.raises(TypeError, match=message):
        run(bad, data())


def test_numbers_may_be_numpys(tmp_path):
    numbers = {"seed": 1, "batch_size": 16, "epochs": 2, "max_steps": 4, "per_class": 4}
    expected = fit(mlp(), data(), **numbers).history
    numpys = {name: np.int64(value) for name, value in numbers.items()}
    assert fit(mlp(), data(), checkpoint_dir=tmp_path, **numpys).history == expected


def test_evaluation_data_beyond_the_memory_is_refused_too():
    huge = np.broadcast_to(np.zeros((1, D), np.float32), (10**12, D))
    with pytest.raises(ValueError, match="eval_data takes"):
        run(mlp(), data(), eval_data=(huge, np.broadcast_to(np.zeros(1, np.int32), 10**12)))


def test_evaluation_data_that_is_not_finite_is_named():
    with pytest.raises(NonFiniteLoss, match=r"the test loss is not finite after step 3, and the"):
        run(mlp(), data(), eval_data=(np.full_like(X, np.nan), Y))


class Aliasing(OneBuffer):
    """A loader that puts its buffer on the device itself, where JAX may keep the very buffer."""

    def __iter__(self):
        for x, labels in super().__iter__():
            yield jax.device_put(x), jax.device_put(labels)


def test_device_arrays_of_a_loader_are_copied_too():
    fresh = [(X[i : i + 16].copy(), Y[i : i + 16].copy()) for i in range(0, N, 16)]
    assert run(mlp(), Aliasing()).history == run(mlp(), fresh).history


def test_batches_may_be_lists_of_a_dict_and_labels():
    """As torch collates a pair of a dict and a label."""
    batch = [{"ids": X[:16], "mask": 0 * X[:16]}, Y[:16]]
    assert run(summing(), [batch]).history[-1]["step"] == 1
