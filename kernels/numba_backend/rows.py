"""What the kernels share: row functions, options of compilation, samples sorted by label.

One row is handled by functions that are put in place in their caller's loop. A sum over more rows
than one is cut into pieces that depend on the sizes alone and that write to places of their own;
the pieces are summed in their order. So threads share the pieces out freely and the result stays
the same, bit for bit. Small problems run on the calling thread: to wake others takes longer.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kernels.numba_backend.fast_exp import exp, exp_up, row_max

# error_model="numpy": 0/0 is NaN and not an exception, as in the other backends.
jit = njit(cache=True, nogil=True, error_model="numpy")
jit_parallel = njit(cache=True, nogil=True, error_model="numpy", parallel=True)
# For one row. Called, it would cost more than a short row's work (each array handed over is
# counted twice, atomically); so it is put in place.
_OPTIONS = {"nogil": True, "error_model": "numpy", "forceinline": True}
jit_row = njit(fastmath={"contract"}, **_OPTIONS)
# For the loop that sums, and nothing else: without leave to reorder, a sum cannot be taken sixteen
# numbers at a time; with it, differences of large numbers would be reordered too.
jit_sum = njit(fastmath={"reassoc", "contract", "nsz"}, **_OPTIONS)

# Numbers that are added in the array's own dtype before they join a sum in float64.
BLOCK = 1024
# Samples, sorted by label, that one piece of work takes.
CHUNK = 64
# Below so many exponentials a problem is small.
SMALL = 8192


def frozen(*arrays):
    """Return read-only views: Numba then compiles once, not once more for read-only arguments."""
    views = tuple(array.view() for array in arrays)
    for view in views:
        view.flags.writeable = False
    return views


@jit_row
def difference(a, b):
    """Return a - b, out of reach of a sum that is reordered around it."""
    return a - b


@jit_sum
def exp_row(scores_i, top, e_i):
    """Write e_i = exp(s_i - top) and return their sum."""
    total = 0.0
    for start in range(0, scores_i.shape[0], BLOCK):
        s, e = scores_i[start : start + BLOCK], e_i[start : start + BLOCK]
        part = s.dtype.type(0)
        for i in range(s.shape[0]):
            e[i] = exp(difference(s[i], top))
            part += e[i]
        total += part
    return total


@jit_row
def scale_row(row, factor):
    """Multiply a row in place."""
    for i in range(row.shape[0]):
        row[i] *= factor


@jit_row
def scaled_exp_row(scores_i, top, factor, e_i):
    """Write e_i = exp(s_i - top) * factor."""
    for i in range(scores_i.shape[0]):
        e_i[i] = exp(scores_i[i] - top) * factor


@jit_sum
def exp_up_row(scores_i, top, e_i):
    """Write e_i = 2^40 exp(s_i - top) and return their sum."""
    total = 0.0
    for start in range(0, scores_i.shape[0], BLOCK):
        s, e = scores_i[start : start + BLOCK], e_i[start : start + BLOCK]
        part = s.dtype.type(0)
        for i in range(s.shape[0]):
            e[i] = exp_up(difference(s[i], top))
            part += e[i]
        total += part
    return total


@jit_sum
def exp_up_and_joint_row(scores_i, top, theta_i, e_i):
    """Write e_i = 2^40 exp(s_i - top); return the sums of e_i and of e_i theta_i."""
    total = joint = 0.0
    for start in range(0, scores_i.shape[0], BLOCK):
        s, e = scores_i[start : start + BLOCK], e_i[start : start + BLOCK]
        theta = theta_i[start : start + BLOCK]
        part = part_joint = s.dtype.type(0)
        for i in range(s.shape[0]):
            e[i] = exp_up(difference(s[i], top))
            part += e[i]
            part_joint += e[i] * theta[i]
        total += part
        joint += part_joint
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
        c_i[:] = np.nan
        return np.float64(top)
    joint = exp_row(c_i, top, c_i)
    c_i *= c_i.dtype.type(1 / joint)
    return top + np.log(joint)


@jit
def softmax_of_logs(c_p):
    """Turn a few logs (float64) into their softmax in place and return their log-sum-exp.

    NaN, and -inf or NaN, where no log is finite.
    """
    top = -np.inf
    for p in range(c_p.shape[0]):
        if not c_p[p] <= top:
            top = c_p[p]
    if not np.isfinite(top):
        c_p[:] = np.nan
        return top
    total = 0.0
    for p in range(c_p.shape[0]):
        c_p[p] = np.exp(c_p[p] - top)
        total += c_p[p]
    for p in range(c_p.shape[0]):
        c_p[p] /= total
    return top + np.log(total)


@jit
def runs_by_label(noisy_labels, k):
    """Sort the samples by label (counting sort) and cut them into runs.

    A run is samples of one label within one chunk of ``CHUNK`` sorted samples. Returns the sorted
    samples (n,), the labels that occur (s,), where each run starts (r + 1,), which of the labels
    that occur it has (r,), and the first run of each chunk (chunks + 1,).
    """
    n = noisy_labels.shape[0]
    next_j = np.zeros(k + 1, dtype=np.int64)
    for t in range(n):
        next_j[noisy_labels[t] + 1] += 1
    n_labels = 0
    for j in range(k):
        n_labels += next_j[j + 1] > 0
        next_j[j + 1] += next_j[j]
    order = np.empty(n, dtype=np.int64)
    for t in range(n):
        order[next_j[noisy_labels[t]]] = t
        next_j[noisy_labels[t]] += 1

    n_chunks = (n + CHUNK - 1) // CHUNK
    label_s = np.empty(n_labels, dtype=np.int64)
    run_start = np.empty(n_labels + n_chunks + 1, dtype=np.int64)
    run_label = np.empty(n_labels + n_chunks, dtype=np.int64)
    chunk_run = np.empty(n_chunks + 1, dtype=np.int64)
    n_runs, s = 0, -1
    for place in range(n):
        new_label = place == 0 or noisy_labels[order[place]] != label_s[s]
        if new_label:
            s += 1
            label_s[s] = noisy_labels[order[place]]
        if place % CHUNK == 0:
            chunk_run[place // CHUNK] = n_runs
        if new_label or place % CHUNK == 0:
            run_start[n_runs] = place
            run_label[n_runs] = s
            n_runs += 1
    run_start[n_runs] = n
    chunk_run[n_chunks] = n_runs
    return order, label_s, run_start[: n_runs + 1], run_label[:n_runs], chunk_run
