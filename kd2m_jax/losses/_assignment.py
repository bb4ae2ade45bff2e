"""Exact assignment: the pairing of n rows with n columns of least total cost, inside XLA.

Shortest augmenting paths from all free rows at once (Balas, Miller, Pekny & Toth, JACM 1991),
after a greedy start and an auction without increments, which is the row reduction of Jonker &
Volgenant (Computing 1987). Where that leaves many rows free (few dimensions, ties), auctions with
falling increments (Bertsekas & Castanon, Parallel Computing 1991) find better prices first.

The dual solution is a price v_j per column. Row i wants the columns of least ``C_ij - v_j``, its
reduced cost. A pairing is optimal once each row has one of those.

How it is written is for XLA:CPU, where an iteration is one scan of a row of costs (`_scans`):

- A body has at most eight operations after fusion. They then run one after the other, without
  the bookkeeping that lets independent ones run at once: up to 40% at n = 512.
- A body copies no array: an element is written at the start of the next iteration.
- Row n and column n mean "none": entry n takes writes that are to have no effect.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kd2m_jax.losses import _scans as s

# Increments of the auctions, in parts of the costs' spread: 0 for the start, four for problems
# that are hard then, and 0 again. A first one that is too small is the one expensive mistake:
# 0.4 of it takes 13 times as long in one dimension.
INCREMENTS = (0, 1 / 25, 1 / 150, 1 / 900, 1 / 5400, 0)
BIDS_PER_ROW = 10
# A problem is hard, and gets the auctions, where after a search so large a part of the rows is
# still free, or, at the rate of the last searches, more of them than this are to come. Not sooner:
# auctions undo what ties have gained (one-hot rows on both sides: 4 times as long).
CROWD, PATIENCE = 0.3, 40


class Assignment(NamedTuple):
    """A pairing of least total cost.

    Attributes:
      columns: ``[n]`` int32, each row's column: a permutation, whatever the costs are.
      prices: ``[n]``, a price per column that proves it: ``columns[i]`` is one of the columns of
        least ``cost[i] - prices``, up to rounding.
      searches: int32 scalar, how many searches it took.
    """

    columns: jax.Array
    prices: jax.Array
    searches: jax.Array


class _Pairing(NamedTuple):
    """What is paired so far: a price and a row per column, a column per row, and who is free."""

    prices: jax.Array
    row_of: jax.Array
    column_of: jax.Array
    free_rows: jax.Array
    free_columns: jax.Array
    left: jax.Array


def assign(cost: jax.Array) -> Assignment:
    """Pair rows with columns at the least total cost.

    Args:
      cost: ``[n, n]`` float32 or float64, of any sign. Where it is infinite or NaN a pair is
        forbidden. Rows that have no other column get one of those that are left.

    Returns:
      An `Assignment`. Costs that differ by less than their rounding are equal to it.
    """
    n = cost.shape[0]
    width = s.padded(n)

    # One problem after the other: under vmap, a scan of one row would become a gather.
    @jax.custom_batching.sequential_vmap
    def solve(cost):
        if width > n:
            cost = jnp.pad(cost, ((0, 0), (0, width - n)), constant_values=jnp.inf)
        return _solve(cost)

    mesh = jax.typeof(cost).sharding.mesh
    if not mesh.explicit_axes:
        return solve(cost)
    # A row is read whole, by every device; and the caller may not have set the mesh.
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(solve)(jax.sharding.reshard(cost, jax.sharding.PartitionSpec(None, None)))


def _solve(cost: jax.Array) -> Assignment:
    n = cost.shape[0]
    # "like" the costs, here and below: so that shard_map knows which devices hold different ones.
    nobody = jnp.full_like(cost[0], n, s.INT)
    prices, zero = jnp.zeros_like(cost[0]), 0 * nobody[0]
    # Not as one array: a constant array in here fails where a choice is batched (vmap of cond).
    spread = _spread(cost)
    steps = jnp.stack([spread * increment for increment in INCREMENTS])

    def attempt(state):  # the first without auctions, the second with them
        attempt, pairing, searches = state

        def level(state):
            level, pairing = state
            return level + 1, _start(cost, pairing.prices, s.take(steps, level))

        first, last = attempt, jnp.where(attempt == 0, 1, len(INCREMENTS))
        _, pairing = lax.while_loop(lambda t: t[0] < last, level, (first, pairing))

        def search(state):
            before, pace, _, searches = state
            pairing = _search(cost, before)
            moved = before.left - pairing.left
            pace = (pace + moved) // 2
            hard = (pairing.left > int(CROWD * n)) | (pairing.left > PATIENCE * pace)
            go_on = (pairing.left > 0) & (moved > 0) & ((attempt == 1) | ~hard)
            return pairing, pace, go_on, searches + 1

        state = (pairing, n + zero, pairing.left > 0, searches)
        pairing, _, _, searches = lax.while_loop(lambda t: t[2], search, state)
        return attempt + 1, pairing, searches

    everyone = jnp.concatenate([nobody[:n], nobody[:1]])
    pairing = _Pairing(prices, nobody, everyone, everyone, everyone, n + zero)
    _, pairing, searches = lax.while_loop(
        lambda t: (t[0] < 2) & (t[1].left > 0), attempt, (zero, pairing, zero)
    )

    def fill(k, column_of):  # non-finite costs leave rows without an admissible column
        return s.put(column_of, s.take(pairing.free_rows, k), s.take(pairing.free_columns, k))

    column_of = s.repeat(pairing.left, fill, pairing.column_of)
    return Assignment(column_of[:n], pairing.prices[:n], searches)


def _row(cost: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_slice(cost, (i, jnp.zeros_like(i)), (1, cost.shape[1]))[0]


def _spread(cost: jax.Array) -> jax.Array:
    """How far apart a row's costs lie, as a mean over 16 rows."""
    n = cost.shape[0]
    infinity = cost.dtype.type(np.inf)

    def add(k, total):
        c = _row(cost, k * (n // 16))
        finite = jnp.abs(c) < infinity
        width = s.most(jnp.where(finite, c, -infinity)) - s.least(jnp.where(finite, c, infinity))
        return total + jnp.where(jnp.abs(width) < infinity, width, 0) / 16

    return s.repeat(16, add, jnp.zeros_like(cost[0, 0]))


def _start(cost, prices, increment) -> _Pairing:
    """Raise prices until each column is some row's best; pair greedily; auction off the rest."""
    n = cost.shape[0]
    rows = lax.iota(s.INT, n + 1)
    distance, source = _sources(cost, prices, rows, n)
    distance = lax.bitcast_convert_type(distance, cost.dtype)
    row_of, column_of = _greedy(prices + distance, source, n)
    prices = prices + jnp.where(distance < np.inf, distance, 0)
    free_rows, left = _still_free(column_of, rows, n)
    prices, row_of = _auction(cost, prices, row_of, free_rows, left, increment)
    column_of = _inverse(row_of, n)
    free_rows, left = _still_free(column_of, rows, n)
    free_columns, _ = _still_free(row_of, rows, n)
    return _Pairing(prices, row_of, column_of, free_rows, free_columns, left)


def _sources(cost, prices, rows, count) -> tuple[jax.Array, jax.Array]:
    """For each column the nearest of some rows: its distance (as bits) and which row it is.

    The distance of row i to column j is how much more it costs than the row's best column.
    """
    name = lax.iota(jnp.uint32, cost.shape[1])

    def draw(i):
        # Rows that are equally good for a column share the columns out. Without this a collapsed
        # cloud takes n searches: 13.8 s instead of 9 ms at n = 2,048. By XOR, n identical rows and
        # columns get a permutation at once.
        return i.astype(jnp.uint32) ^ name

    def source(k, state):
        nearest, which = state
        i = s.take(rows, k)
        r = s.lower(_row(cost, i) - prices, cost.dtype.type(np.inf))
        best = s.least(r)
        r = r - jnp.where(best < np.inf, best, 0)
        r = s.bits(jnp.where(r > 0, r, 0))
        better = (r < nearest) | ((r == nearest) & (draw(i) < draw(which)))
        which = jnp.where(better, i, which)  # first: `nearest` is not read after it is written
        return jnp.where(which == i, r, nearest), which

    nearest = s.bits(jnp.full_like(prices, np.inf))
    return s.repeat(count, source, (nearest, jnp.full_like(prices, -1, s.INT)))


def _greedy(distance, source, n) -> tuple[jax.Array, jax.Array]:
    """Each row takes one of the columns that it is nearest to: row_of and column_of."""
    none = jnp.full_like(source[0], n)

    def claim(j, state):
        row_of, column_of, i, taken = state
        column_of = s.put(column_of, i, taken)
        i = s.take(source, j)
        free = (s.take(column_of, i) == n) & (s.take(distance, j) < np.inf)
        i = jnp.where(free, i, n)
        return s.put(row_of, j, i), column_of, i, jnp.where(free, j, n)

    state = (jnp.full_like(source, n), jnp.full_like(source, n, shape=(n + 1,)), none, none)
    row_of, column_of, i, taken = s.repeat(source.size, claim, state)
    return row_of, s.put(column_of, i, taken)


def _inverse(row_of, n) -> jax.Array:
    """Column_of from row_of."""

    def note(j, column_of):
        return s.put(column_of, s.take(row_of, j), j)

    column_of = s.repeat(row_of.size, note, jnp.full_like(row_of, n, shape=(n + 1,)))
    return s.put(column_of, jnp.int32(n), jnp.int32(n))


def _still_free(partner, members, count) -> tuple[jax.Array, jax.Array]:
    """Those of the first ``count`` members that have no partner, in front, and how many."""
    n = members.size - 1

    def keep(k, state):
        free, kept = state
        i = s.take(members, k)
        alone = s.take(partner, i) == n
        return s.put(free, jnp.where(alone, kept, n), i), kept + alone.astype(s.INT)

    return s.repeat(count, keep, (jnp.full_like(partner, n, shape=(n + 1,)), 0 * partner[0]))


def _auction(cost, prices, row_of, free_rows, left, increment):
    """Let free rows bid in turn; return prices and row_of.

    A row takes its best column, whose price falls to where the second best is as good, and by
    ``increment`` more. Who held the column queues again. With an increment, an auction ends at 2%
    of free rows, for the last ones would take most of the time.
    """
    n, width = cost.shape
    spare = jnp.where(increment > 0, n // 50, 0)
    bids = jnp.where(increment > 0, BIDS_PER_ROW, 2) * n
    infinity, word = cost.dtype.type(np.inf), s.signed(cost.dtype)
    (_, size), names = s.cut(width), lax.iota(s.INT, 8)
    last = n + BIDS_PER_ROW * n  # the queue's entry for writes that are to have no effect

    def words(x):
        return s.as_signed(x) if x.dtype == cost.dtype else x.astype(word)

    def write(state, columns, queue):
        update = state[:2].reshape(2, 1)
        columns = lax.dynamic_update_slice(columns, update, (jnp.int32(0), state[2].astype(s.INT)))
        return columns, s.put(queue, state[4].astype(s.INT), state[3])

    def bid(loop):
        state, columns, queue = loop  # columns: prices, as words, and who holds them
        position, tail = state[5].astype(s.INT), state[6].astype(s.INT)
        columns, queue = write(state, columns, queue)
        i = s.take(queue, position)
        r = s.lower(_row(cost, i) - lax.bitcast_convert_type(columns[0], cost.dtype), infinity)
        best = s.lanes(r)
        lane, second = s.two_least(best)
        first = s.take(best, lane)  # a read from memory, so that `best` is one operation
        step, other = s.two_least(s.slice_of(r, lane))
        second = s.lower(second, other)
        j = lane + size * step
        holder = s.take(columns[1], j)
        price = lax.bitcast_convert_type(s.take(columns[0], j), cost.dtype)
        offer = price - (jnp.where(second < infinity, second - first, 0) + increment)
        offer = s.lower(offer, price)
        taken = holder < n
        # A tie for a column that is taken is left to the searches.
        accepted = (first < infinity) & ((offer < price) | ~taken)
        again = accepted & taken
        new = (
            jnp.where(accepted, offer, price), jnp.where(accepted, i, holder.astype(s.INT)), j,
            holder, jnp.where(again, tail, last), position + 1, tail + again,
        )  # fmt: skip
        state = jnp.zeros_like(state)
        for k, x in enumerate(new):  # one operation for all scalars
            state = jnp.where(names == k, words(x), state)
        return state, columns, queue

    queue = jnp.concatenate([free_rows, jnp.full_like(free_rows, n, shape=(BIDS_PER_ROW * n,))])
    zero = 0 * left
    new = (prices[0], row_of[0], zero, zero + n, zero + last, zero, left, zero)
    loop = jnp.stack([words(x) for x in new]), jnp.stack([words(prices), words(row_of)]), queue
    state, columns, queue = lax.while_loop(
        lambda loop: loop[0][5] < jnp.minimum(loop[0][6] - spare, bids), bid, loop
    )
    columns, _ = write(state, columns, queue)
    return lax.bitcast_convert_type(columns[0], cost.dtype), columns[1].astype(s.INT)


def _search(cost, pairing: _Pairing) -> _Pairing:
    """Shortest paths from all free rows at once, and an augmentation in each tree that ends."""
    prices, row_of, column_of, free_rows, free_columns, left = pairing
    final = s.unsigned(cost.dtype).type(1 << (8 * cost.dtype.itemsize - 1))
    # The last bit is set for columns that are taken: of equally near ones free ones come first.
    taken = (row_of < cost.shape[0]).astype(final.dtype)
    distance, source = _sources(cost, prices, free_rows, left)
    distance, source = _nearest_first(cost, prices, row_of, taken, distance, source, left, final)
    done = distance >= final
    reached = lax.bitcast_convert_type(distance & ~final & ~final.dtype.type(1), cost.dtype)
    # Prices change up to the last free column's distance: the search need not have gone on.
    top = s.most(jnp.where(done & (taken == 0), reached, 0))
    prices = prices - jnp.where(done, jnp.maximum(top - reached, 0), 0)
    row_of, column_of = _augment(
        distance, source, final, row_of, column_of, free_rows, free_columns, left
    )
    free_columns, _ = _still_free(row_of, free_columns, left)
    free_rows, left = _still_free(column_of, free_rows, left)
    return _Pairing(prices, row_of, column_of, free_rows, free_columns, left)


def _nearest_first(cost, prices, row_of, taken, distance, source, goal, final):
    """Settle the nearest column, again and again, until ``goal`` free ones are, or none is left.

    Settled columns have the sign bit of their distance set: less than any other, as signed
    integers, and beyond infinity as unsigned ones.
    """
    n, width = cost.shape
    count, size = s.cut(width)
    name, steps, lanes = (lax.iota(jnp.uint32, k) for k in (width, count, size))
    infinity = cost.dtype.type(np.inf)
    unreachable = np.array(infinity).view(final.dtype)[()]
    last_bit = final.dtype.type(1)

    def tagged(x):
        return (x & ~last_bit) | taken

    def settle(state):
        best, distance, source, goal = state
        nearest = s.few(best)
        j = s.first_of(best, nearest, lanes)
        if count > 1:
            j = j + np.uint32(size) * s.first_of(s.slice_of(distance, j), nearest, steps)
        here = lax.bitcast_convert_type(nearest & ~last_bit, cost.dtype)
        i = s.take(row_of, j)
        c = _row(cost, jnp.minimum(i, n - 1))
        base = jnp.where(i == n, infinity, here - (s.take(c, j) - s.take(prices, j)))
        r = s.lower(c - prices + base, infinity)
        r = tagged(s.bits(jnp.where(r > here, r, here)))
        source = jnp.where(s.as_signed(r) < s.as_signed(distance), i, source)
        distance = jnp.where(source == i, r, distance)
        distance = jnp.where(name == j, nearest | final, distance)
        return s.lanes(distance), distance, source, goal - (i == n).astype(s.INT)

    distance = tagged(distance)
    state = (s.lanes(distance), distance, source, goal)
    _, distance, source, _ = lax.while_loop(
        lambda t: (s.few(t[0]) < unreachable) & (t[3] > 0), settle, state
    )
    return distance, source


def _augment(distance, source, final, row_of, column_of, free_rows, free_columns, left):
    """Swap partners along the path to the nearest free column, in each tree that reached one."""
    n = column_of.size - 1
    none = jnp.full_like(left, n)
    best = jnp.full_like(distance, np.iinfo(final.dtype).max, shape=(n + 1,))

    def compare(k, state):  # `best` and `end` by root: the nearest free column of its tree
        best, end, root, near, column = state
        best, end = s.put(best, root, near), s.put(end, root, column)
        column = s.take(free_columns, k)
        near = s.take(distance, column)

        def up(path):
            i = s.take(source, path[0])
            return s.take(column_of, i), i

        start = (jnp.where(near >= final, column, n), none)
        _, root = lax.while_loop(lambda path: path[0] < n, up, start)
        return best, end, jnp.where(near < s.take(best, root), root, n), near, column

    state = (best, jnp.full_like(column_of, n), none, best[0], none)
    _, end, root, _, column = s.repeat(left, compare, state)
    end = s.put(end, root, column)

    def swap(k, state):
        def step(path):
            column, row_of, column_of, i, taken = path
            column_of = s.put(column_of, i, taken)
            i = s.take(source, column)
            return s.take(column_of, i), s.put(row_of, column, i), column_of, i, column

        path = (s.take(end, s.take(free_rows, k)), *state, none, none)
        _, row_of, column_of, i, taken = lax.while_loop(lambda path: path[0] < n, step, path)
        return row_of, s.put(column_of, i, taken)

    return s.repeat(left, swap, (row_of, column_of))
