"""What the kernels share: row functions, options of compilation, samples sorted by label.

One row is handled by functions that are put in place in their caller's loop. A sum over more rows
than one is cut into pieces that depend on the sizes alone and that write to places of their own;
the pieces are summed in their order. So threads share the pieces out freely and the result stays
the same, bit for bit. Small problems run on the calling thread: to wake others takes longer.

A row function walks along its row in vectors: one *step* for each whole vector, with a mask that is
always full and costs nothing, and one for what is left.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kernels.numba_backend.pieces import OPTIONS
from kernels.numba_backend.vector import (
    exp,
    exp_up,
    first,
    lane_max,
    lane_sum,
    lanes,
    less,
    load,
    muladd,
    splat,
    store,
    where,
)

# For what Python calls.
jit = njit(cache=True, **OPTIONS)
# For what compiled code alone calls: put in place in its caller and kept with that. Left a function
# of its own, it would run as it was first compiled, in a process that compiles both; LLVM sees it
# once more in its caller, and one convolution took 10 ms after that and 24 before.
jit_part = njit(forceinline=True, no_cpython_wrapper=True, **OPTIONS)
# For what is rarely done: out of the way of its caller's loop.
jit_rare = njit(no_cpython_wrapper=True, **OPTIONS)
# For one row: put in place in the caller's loop. It keeps no array, so it need not count references
# to them: done atomically, as Numba does it, that costs as much as a short row's work.
jit_row = njit(fastmath={"contract"}, forceinline=True, _nrt=False, **OPTIONS)

# Numbers that are added in the array's own dtype, lane by lane, before they join a sum in float64:
# a multiple of any vector's lanes.
BLOCK = 1024
# Samples that one piece of work takes.
CHUNK = 64
# Below so many exponentials a problem is small.
SMALL = 8192
# A product of probabilities, each at least 2^-40 / K, is turned into its log before it underflows.
SMALL_PRODUCT = 1e-150


def frozen(*arrays):
    """Return read-only views: Numba then compiles once, not once more for read-only arguments."""
    views = [array.view() for array in arrays]
    for view in views:
        view.setflags(False)  # write; by its name it would take thrice the time, in every call
    return views


@jit_row
def fill(row, number):
    """Write a number to all places of a row.

    ``row[:] = number`` does so too, but Numba compiles a message for it about shapes that differ.
    """
    for i in range(row.shape[0]):
        row[i] = number


@jit
def sum_in_order(numbers):
    """Return the sum, added from the left."""
    total = 0.0
    for number in numbers:
        total += number
    return total


@jit_row
def _max_step(row, top, i, mask):
    numbers = load(row, i, mask, top)
    return where(less(top, numbers), numbers, top)


@jit_row
def row_max(row):
    """Return the largest number of a row that is not NaN; -inf if there is none."""
    n, width = row.shape[0], lanes(row)
    every, whole, top = first(row, width), n - n % width, splat(row, -np.inf)
    for i in range(0, whole, width):
        top = _max_step(row, top, i, every)
    if whole < n:
        top = _max_step(row, top, whole, first(row, n - whole))
    return lane_max(top)


@jit_row
def _exp_step(scores_i, top, e_i, i, mask):
    e = exp(load(scores_i, i, mask, splat(e_i, -np.inf)) - top)
    store(e_i, i, mask, e)
    return e


@jit_row
def exp_row(scores_i, top, e_i):
    """Write e_i = exp(s_i - top) and return their sum."""
    n, width = e_i.shape[0], lanes(e_i)
    every, whole, tops = first(e_i, width), n - n % width, splat(e_i, top)
    total, part = 0.0, splat(e_i, 0.0)
    if whole < n:
        part = _exp_step(scores_i, tops, e_i, whole, first(e_i, n - whole))
    for start in range(0, max(whole, 1), BLOCK):
        for i in range(start, min(start + BLOCK, whole), width):
            part = part + _exp_step(scores_i, tops, e_i, i, every)
        total += lane_sum(part)
        part = splat(e_i, 0.0)
    return total


@jit_row
def _scale_step(row, factor, i, mask):
    store(row, i, mask, load(row, i, mask, factor) * factor)


@jit_row
def scale_row(row, factor):
    """Multiply a row in place."""
    n, width = row.shape[0], lanes(row)
    every, whole, factors = first(row, width), n - n % width, splat(row, factor)
    for i in range(0, whole, width):
        _scale_step(row, factors, i, every)
    if whole < n:
        _scale_step(row, factors, whole, first(row, n - whole))


@jit_row
def _scale_twice_step(row, factor, other, i, mask):
    store(row, i, mask, load(row, i, mask, factor) * factor * other)


@jit_row
def scale_row_twice(row, factor, other):
    """Multiply a row in place by one number, then by another."""
    n, width = row.shape[0], lanes(row)
    every, whole = first(row, width), n - n % width
    factors, others = splat(row, factor), splat(row, other)
    for i in range(0, whole, width):
        _scale_twice_step(row, factors, others, i, every)
    if whole < n:
        _scale_twice_step(row, factors, others, whole, first(row, n - whole))


@jit_row
def _exp_up_step(scores_i, top, e_i, i, mask):
    e = exp_up(load(scores_i, i, mask, splat(e_i, -np.inf)) - top)
    store(e_i, i, mask, e)
    return e


@jit_row
def exp_up_row(scores_i, top, e_i):
    """Write e_i = 2^40 exp(s_i - top) and return their sum."""
    n, width = e_i.shape[0], lanes(e_i)
    every, whole, tops = first(e_i, width), n - n % width, splat(e_i, top)
    total, part = 0.0, splat(e_i, 0.0)
    if whole < n:
        part = _exp_up_step(scores_i, tops, e_i, whole, first(e_i, n - whole))
    for start in range(0, max(whole, 1), BLOCK):
        for i in range(start, min(start + BLOCK, whole), width):
            part = part + _exp_up_step(scores_i, tops, e_i, i, every)
        total += lane_sum(part)
        part = splat(e_i, 0.0)
    return total


@jit_row
def exp_up_and_joint_row(scores_i, top, theta_i, e_i):
    """Write e_i = 2^40 exp(s_i - top); return the sums of e_i and of e_i theta_i."""
    n, width = e_i.shape[0], lanes(e_i)
    every, whole = first(e_i, width), n - n % width
    tops, zero = splat(e_i, top), splat(e_i, 0.0)
    total, joint, part, part_joint = 0.0, 0.0, zero, zero
    if whole < n:
        some = first(e_i, n - whole)
        part = _exp_up_step(scores_i, tops, e_i, whole, some)
        part_joint = part * load(theta_i, whole, some, zero)
    for start in range(0, max(whole, 1), BLOCK):
        for i in range(start, min(start + BLOCK, whole), width):
            e = _exp_up_step(scores_i, tops, e_i, i, every)
            part = part + e
            part_joint = muladd(e, load(theta_i, i, every, zero), part_joint)
        total += lane_sum(part)
        joint += lane_sum(part_joint)
        part, part_joint = zero, zero
    return total, joint


@jit_row
def log_posterior_row(scores_i, log_theta_i, c_i):
    """Write c_i (Eq. 3) and return log m (Eqs. 9, 11), all in the log domain.

    A label that no class can produce has no posterior: NaN.
    """
    top = row_max(scores_i)
    log_total = np.log(exp_row(scores_i, top, c_i))
    shift = c_i.dtype.type(log_total)
    for i in range(c_i.shape[0]):
        c_i[i] = (scores_i[i] - top) - shift + log_theta_i[i]
    top = row_max(c_i)
    if not np.isfinite(top):
        fill(c_i, np.nan)
        return np.float64(top)
    joint = exp_row(c_i, top, c_i)
    scale_row(c_i, c_i.dtype.type(1 / joint))
    return top + np.log(joint)


@jit_part
def softmax_of_logs(c_p):
    """Turn a few logs (float64) into their softmax in place and return their log-sum-exp.

    NaN, and -inf or NaN, where no log is finite.
    """
    top = -np.inf
    for p in range(c_p.shape[0]):
        if not c_p[p] <= top:
            top = c_p[p]
    if not np.isfinite(top):
        fill(c_p, np.nan)
        return top
    total = 0.0
    for p in range(c_p.shape[0]):
        c_p[p] = np.exp(c_p[p] - top)
        total += c_p[p]
    for p in range(c_p.shape[0]):
        c_p[p] /= total
    return top + np.log(total)


@jit
def order_by_label(noisy_labels, k):
    """Return the samples sorted by label, those of one label in order (radix sort, by bytes)."""
    n = noisy_labels.shape[0]
    order, sorted_by_next_byte = np.arange(n), np.empty(n, dtype=np.int64)
    shift = 0
    while (k - 1) >> shift > 0:
        place = np.zeros(257, dtype=np.int64)
        for t in range(n):
            place[((noisy_labels[t] >> shift) & 255) + 1] += 1
        for byte in range(255):
            place[byte + 1] += place[byte]
        for t in order:
            byte = (noisy_labels[t] >> shift) & 255
            sorted_by_next_byte[place[byte]] = t
            place[byte] += 1
        order, sorted_by_next_byte = sorted_by_next_byte, order
        shift += 8
    return order


@jit
def runs_by_label(noisy_labels, k):
    """Sort the samples by label and cut them into runs, in time that does not depend on k.

    A run is samples of one label within one chunk of ``CHUNK`` sorted samples. Returns the sorted
    samples (n,), the labels that occur (s,), where each run starts (r + 1,), which of the labels
    that occur it has (r,), and the first run of each chunk (chunks + 1,).
    """
    n = noisy_labels.shape[0]
    order = order_by_label(noisy_labels, k)
    n_chunks = (n + CHUNK - 1) // CHUNK
    most_runs = min(n, k + n_chunks)
    label_s = np.empty(min(n, k), dtype=np.int64)
    run_start = np.empty(most_runs + 1, dtype=np.int64)
    run_label = np.empty(most_runs, dtype=np.int64)
    chunk_run = np.empty(n_chunks + 1, dtype=np.int64)
    n_runs, s = 0, -1
    for place in range(n):
        z = noisy_labels[order[place]]
        new_label = place == 0 or z != label_s[s]
        if new_label:
            s += 1
            label_s[s] = z
        if place % CHUNK == 0:
            chunk_run[place // CHUNK] = n_runs
        if new_label or place % CHUNK == 0:
            run_start[n_runs] = place
            run_label[n_runs] = s
            n_runs += 1
    run_start[n_runs] = n
    chunk_run[n_chunks] = n_runs
    return order, label_s[: s + 1], run_start[: n_runs + 1], run_label[:n_runs], chunk_run
