"""Iterables of batches: whatever NumPy reads, read ahead, never all of it in memory."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import Outputs, fit, models

N, D, K, SIZE = 64, 6, 3, 16
X, _, Y = draw("clustered", N, D, classes=K)
X, Y = X.astype(np.float32), Y.astype(np.int32)
STARTS = range(0, N, SIZE)
BATCHES = [(X[i : i + SIZE], Y[i : i + SIZE]) for i in STARTS]


def mlp(seed=0):
    return models.MLP((8, 5), K, in_features=D, rngs=nnx.Rngs(seed))


def run(data, **options):
    options = {"epochs": 2, "optimizer": optax.sgd(0.1), "log_every": 1} | options
    return fit(mlp(1), data, **{"teacher": mlp(0), "metric": "cw2", "coef": 0.1} | options)


class Tensor:
    """What another library's tensor shows: a shape and a dtype of its own, and NumPy reads it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, f"theirs.{array.dtype}"

    def __len__(self):
        return len(self.array)

    def __array__(self, dtype=None, copy=None):
        return self.array.astype(self.array.dtype if dtype is None else dtype)


class Loader:
    """A loader of another library: a length or none, and an iterator of its own each epoch."""

    def __init__(self, batches, length=None):
        self.batches, self.length, self.drawn = batches, length, []

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            self.drawn.append((number, threading.current_thread().name))
            yield batch

    def __len__(self):
        if self.length is None:  # torch's DataLoader of an IterableDataset does this
            raise TypeError("an iterable of unknown length")
        return self.length


@pytest.fixture(scope="module")
def expected():
    return run(BATCHES).state.params


KINDS = {
    "tensors": lambda x, y: [Tensor(x), Tensor(y)],
    "a dict of tensors": lambda x, y: {
        "image": Tensor(x),
        "label": Tensor(y),
        "name": ["a"] * SIZE,
    },
    "lists of numbers": lambda x, y: (x.tolist(), y.tolist()),
    "a dict of lists": lambda x, y: {"x": x.tolist(), "y": y.tolist()},
    "a list of rows that are arrays of Python": lambda x, y: ([tuple(r) for r in x.tolist()], y),
    "jax": lambda x, y: (jnp.asarray(x), jnp.asarray(y)),
    "64 bits": lambda x, y: (x.astype(np.float64), y.astype(np.int64)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_numpy_reads_is_a_batch(kind, expected):
    loader = Loader([KINDS[kind](x, y) for x, y in BATCHES], length=len(BATCHES))
    got = run(loader, eval_data=Loader([KINDS[kind](x, y) for x, y in BATCHES]))
    chex.assert_trees_all_equal(got.state.params, expected)
    assert got.history[-1]["steps"] == 8 and "test_accuracy" in got.history[-1]


@pytest.mark.slow
def test_tensors_are_arrays_too(expected):
    whole = run((Tensor(X), Tensor(Y)), batch_size=SIZE, eval_data=(Tensor(X), Tensor(Y)))
    chex.assert_trees_all_equal(whole.state.params, run((X, Y), batch_size=SIZE).state.params)
    assert whole.history[-1]["test_loss"] > 0
    few = run((X[:16], Y[:16]), batch_size=8, transfer=Tensor(X), transfer_batch_size=8)
    same = run((X[:16], Y[:16]), batch_size=8, transfer=X, transfer_batch_size=8)
    chex.assert_trees_all_equal(few.state.params, same.state.params)


@pytest.mark.slow
def test_images_of_pillow():
    """What a Hugging Face data set gives whose format was not set."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    batch = {"image": [image.fromarray(one) for one in pixels], "label": [0, 1, 2, 0, 1, 2, 0, 1]}

    def net():
        return models.resnet8(K, in_channels=3, rngs=nnx.Rngs(0))

    options = {"preprocess": lambda x, keys: x / 255, "epochs": 1}
    got = fit(net(), [batch], **options)
    same = fit(net(), [(pixels, np.array(batch["label"]))], **options)
    chex.assert_trees_all_equal(got.state.params, same.state.params)


@pytest.mark.slow
def test_loaders_of_torch(expected):
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, IterableDataset, TensorDataset

    whole = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    chex.assert_trees_all_equal(run(DataLoader(whole, SIZE)).state.params, expected)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(whole)

    got = run(DataLoader(Stream(), SIZE), eval_data=DataLoader(whole, 24))
    assert got.history[-1]["steps"] is None
    with pytest.raises(ValueError, match="this is one example, and not a batch"):
        run(whole)


@pytest.mark.slow
def test_batches_are_read_in_another_thread_and_no_more_than_are_needed():
    loader = Loader(BATCHES * 50)
    assert run(loader, epochs=1, max_steps=5).history[-1]["step"] == 5
    first, *rest = loader.drawn
    assert first == (0, "MainThread")  # for its shapes
    assert [number for number, _ in rest] == list(range(len(rest))) and 5 <= len(rest) <= 6
    assert {name for _, name in rest} == {"kd2m_jax batches"}
    assert not [t for t in threading.enumerate() if t.name == "kd2m_jax batches"]


@pytest.mark.slow
def test_reading_goes_on_while_steps_run_and_stays_three_batches_ahead():
    class Watched(Loader):
        def __iter__(self):
            self.drawn.clear()
            yield from super().__iter__()

    loader, ahead = Watched(BATCHES * 5), []

    def slow(record):
        time.sleep(0.05)
        ahead.append(len(loader.drawn) - record["step"])

    run(loader, epochs=1, callbacks=[slow])
    assert max(ahead) >= 2 and max(ahead) <= 4  # two wait, one is in hand, one metric behind


@pytest.mark.slow
def test_an_error_of_the_loader_comes_after_the_steps_before_it(tmp_path):
    class Broken(Exception):
        pass

    def broken():
        yield from BATCHES[:3]
        raise Broken("the disk is gone")

    class Source(Loader):
        def __iter__(self):
            return broken()

    with pytest.raises(Broken, match="the disk is gone"):
        run(Source([], len(BATCHES)), checkpoint_dir=tmp_path, save_every=1e9)
    assert not [t for t in threading.enumerate() if t.name == "kd2m_jax batches"]
    # Nothing is lost: the run goes on behind the third step, to the same end.
    got = run(BATCHES, checkpoint_dir=tmp_path)
    chex.assert_trees_all_equal(got.state.params, run(BATCHES).state.params)


@pytest.mark.slow
def test_no_thread_stays_where_an_error_is_kept():
    """As a notebook keeps the last one: its traceback holds what was running."""
    kept = None
    try:
        run([BATCHES[0], (X[:SIZE], np.full(SIZE, 9)), *BATCHES * 50])
    except ValueError as error:
        kept = error
    assert kept is not None
    assert not [t for t in threading.enumerate() if t.name == "kd2m_jax batches"]


@pytest.mark.slow
def test_ctrl_c_is_heard_while_a_loader_hangs(tmp_path):
    class Hangs(Loader):
        def __iter__(self):
            yield from BATCHES[:2]
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(3)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(Hangs([], len(BATCHES)), checkpoint_dir=tmp_path)
    assert time.monotonic() - start < 60
    got = run(BATCHES, checkpoint_dir=tmp_path)  # two steps were saved
    chex.assert_trees_all_equal(got.state.params, run(BATCHES).state.params)


@pytest.mark.slow
def test_one_iterator_for_all_epochs_is_a_generator():
    class Shared:
        def __init__(self, source):
            self.source = source

        def __iter__(self):
            return self.source

    for source in (iter(BATCHES), (batch for batch in BATCHES)):
        with pytest.raises(ValueError, match="data is a generator, which can be read only once"):
            run(Shared(source), epochs=1)


@pytest.mark.slow
def test_masked_labels_are_refused_in_every_batch():
    masked = np.ma.masked_array(Y[:SIZE], mask=np.arange(SIZE) < 8)
    with pytest.raises(ValueError, match="batch 2: labels are masked"):
        run([BATCHES[0], (X[:SIZE], masked)])


@pytest.mark.slow
def test_lists_of_rows_and_of_numbers_of_numpy(expected):
    """What a loader of one's own collates; and arrays as lists."""
    for batches in (
        [(x, list(y)) for x, y in BATCHES],
        [(list(x), y) for x, y in BATCHES],
        [{"x": x, "y": tuple(y)} for x, y in BATCHES],
    ):
        chex.assert_trees_all_equal(run(batches).state.params, expected)
    whole = run((X.tolist(), Y.tolist()), batch_size=SIZE).state.params
    chex.assert_trees_all_equal(whole, run((X, Y), batch_size=SIZE).state.params)


@pytest.mark.slow
def test_grain_that_leaves_batches_out_or_never_ends_is_named():
    data = grain_batches([])
    for bad in (0, 1):
        value = data[bad][0][0, 0]
        dropped = data.filter(lambda batch, value=value: batch[0][0, 0] != value)
        with pytest.raises(ValueError, match=r"a filter behind batch\(\) leaves whole batches out"):
            run(dropped, epochs=1)
    with pytest.raises(ValueError, match="eval_data never ends"):
        run(data, eval_data=data.repeat())


@pytest.mark.slow
def test_a_bad_batch_is_named(expected):
    for bad, message in (
        (([[1.0, 2.0], [3.0]], [0, 1]), "batch 2 cannot be read as arrays of equal rows"),
        ((X[:4], [0, 1, 2, 3]), "batch 2: labels must be class numbers from 0 to 2, got 3"),
        (([object()] * 2, [0, 1]), "batch 2: x must be numbers, got object"),
        ((X[:4], Y[:3]), "batch 2 has 4 inputs, but 3 labels"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            run([BATCHES[0], bad])
        with pytest.raises((ValueError, TypeError), match=f"eval_data, {message}"):
            run(BATCHES, eval_data=[BATCHES[0], bad])


def test_what_is_no_iterable_is_named():
    for data, message in (
        (3, r"data must be \(x, labels\) or an iterable of such batches, got a int"),
        ([(X[0], 1)], "batch 1: labels must be .n., got ..: this is one example"),
    ):
        with pytest.raises(ValueError, match=message):
            run(data)
        with pytest.raises(ValueError, match=message.replace("data", "eval_data")):
            run((X, Y), batch_size=SIZE, eval_data=data)
    with pytest.raises(ValueError, match="eval_data is a generator, which can be read only once"):
        run((X, Y), batch_size=SIZE, eval_data=iter(BATCHES))


class Rows:
    """A random-access source for grain."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i], Y[i], np.int32(i)


def grain_batches(order):
    grain = pytest.importorskip("grain")

    def noted(batch):
        order.append(batch[2].tolist())
        return batch[:2]

    return grain.MapDataset.source(Rows()).shuffle(seed=0).batch(SIZE).map(noted)


@pytest.mark.slow
def test_a_map_dataset_of_grain_is_shuffled_anew_each_epoch(tmp_path):
    order = []
    data = grain_batches(order)
    whole = run(data, epochs=3)
    assert whole.history[-1]["steps"] == 12
    rows = {tuple(batch) for batch in order}  # it reads in threads, in any order
    assert len(rows) == 12  # the first one twice, for its shapes
    assert sorted(itertools.chain(*rows)) == sorted([*range(N)] * 3)

    # Killed in the second epoch and taken up again: to the same bits, and nothing is read twice.
    def stop(record):
        if record["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(data, epochs=3, callbacks=[stop], checkpoint_dir=tmp_path)
    order.clear()
    again = run(data, epochs=3, checkpoint_dir=tmp_path)
    chex.assert_trees_all_equal(again.state.params, whole.state.params)
    # The record of step 6 is read while step 7 runs, which is saved.
    assert len({tuple(batch) for batch in order}) == 12 - 7 + 1


class Shuffled:
    """A class as docs/what_you_have.md has it: an order of its own in each epoch."""

    epoch = -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(N)
        for rows in np.split(order, range(SIZE, N, SIZE)):
            yield {"image": X[rows], "label": Y[rows]}

    def __len__(self):
        return N // SIZE


@pytest.mark.slow
def test_an_iterable_is_told_its_epoch_and_resumed_to_the_bit(tmp_path):
    whole = run(Shuffled(), epochs=4).state.params
    by_hand = [batch for epoch in range(4) for batch in _of_epoch(epoch)]
    chex.assert_trees_all_equal(whole, run(by_hand, epochs=1).state.params)
    run(Shuffled(), epochs=4, max_steps=9, checkpoint_dir=tmp_path)
    again = run(Shuffled(), epochs=4, checkpoint_dir=tmp_path).state.params
    chex.assert_trees_all_equal(again, whole)


def _of_epoch(epoch):
    data = Shuffled()
    data.set_epoch(epoch)
    return list(data)


@pytest.mark.slow
def test_a_map_dataset_that_never_ends():
    data = grain_batches([]).repeat()
    history = run(data, max_steps=6).history
    assert [(r["step"], r["epoch"]) for r in history] == [(k, 1) for k in range(1, 7)]


@pytest.mark.slow
def test_eval_data_takes_what_data_takes():
    """Batches of any size, a last one that is not full, a dict, and grain: the same scores."""
    options = {"batch_size": SIZE, "epochs": 1}
    more = options | {"metrics": ["top-5", "ece"]}
    scores = {}
    kinds = {
        "arrays": (X[:50], Y[:50]),
        "a dict": {"image": X[:50], "label": Y[:50]},
        "batches": [(X[:20], Y[:20]), (X[20:40], Y[20:40]), (X[40:50], Y[40:50])],
        "a larger second one": [(X[:7], Y[:7]), (X[7:50], Y[7:50])],
        "with a row that has no label": [(X[:25], Y[:25]), (X[25:51], np.append(Y[25:50], -1))],
    }
    for kind, data in kinds.items():
        last = run((X, Y), **more, eval_data=data).history[-1]
        scores[kind] = [last[f"test_{name}"] for name in ("loss", "accuracy", "top_5", "ece")]
    for found in scores.values():
        np.testing.assert_allclose(found, scores["arrays"], rtol=1e-5)
    out = run((X, Y), **options).student(X[:50])
    np.testing.assert_allclose(
        scores["arrays"][1], (np.asarray(out.logits).argmax(1) == Y[:50]).mean()
    )
    whole = run((X, Y), **options, eval_data=(X, Y)).history[-1]
    again = run((X, Y), **options, eval_data=grain_batches([])).history[-1]
    assert again["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_stream_without_any_label_cannot_be_scored():
    with pytest.raises(ValueError, match="eval_data has no label"):
        run(BATCHES, eval_data=[(X, None)])
    with pytest.raises(ValueError, match="eval_data has no label"):
        run(BATCHES, eval_data=(X, None))
    run(BATCHES, eval_data=[(X[:5], np.full(5, -1)), (X[5:], Y[5:])])
    with pytest.raises(ValueError, match="eval_data needs class numbers"):
        run(BATCHES, eval_data=[(X, np.eye(K)[Y])])


@pytest.mark.slow
def test_outputs_of_a_teacher_come_with_batches_of_lists():
    out = Outputs(*mlp(0)(X)[:2])
    batches = [
        {
            "x": X[i : i + SIZE].tolist(),
            "y": Y[i : i + SIZE].tolist(),
            "teacher": {
                "features": np.asarray(out.features[i : i + SIZE]).tolist(),
                "logits": np.asarray(out.logits[i : i + SIZE]).tolist(),
            },
        }
        for i in STARTS
    ]
    got = run(batches, teacher=None).state.params
    chex.assert_trees_all_close(got, run(BATCHES).state.params, rtol=1e-4, atol=1e-6)


STREAM = """
import resource, sys
import numpy as np
from flax import nnx
from kd2m_jax import fit, models

class Generated:
    # 2 GB in batches of 10 MB
    def __iter__(self):
        for i in range(200):
            rng = np.random.default_rng(i)
            yield rng.random((2500, 1000), np.float32), rng.integers(0, 3, 2500)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GB

net = lambda i: models.MLP((8,), 3, in_features=1000, rngs=nnx.Rngs(i))
start = peak()
result = fit(net(0), Generated(), teacher=net(1), metric="l2", epochs=1, eval_data=Generated())
print(result.history[-1]["step"], peak() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_data_larger_than_memory_is_never_in_memory():
    """2 GB to train on and 2 GB to evaluate on: less than 1 GB above the start."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STREAM],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    steps, above = done.stdout.split()
    assert int(steps) == 200 and float(above) < 1, done.stdout


@pytest.mark.slow
def test_64_bits_stay_what_the_caller_has_set():
    """The thread that reads has not the caller's setting, which is a thread's own."""
    with jax.enable_x64():
        batches = [(jnp.asarray(x, jnp.float64), jnp.asarray(y, jnp.int64)) for x, y in BATCHES]
        seen = []

        def preprocess(x, keys):
            seen.append(x.dtype)
            return x

        run(batches, preprocess=preprocess, epochs=1)
    assert set(map(str, seen)) == {"float64"}
