"""What the public boundary refuses: one exception that names argument, finding and expectation.

The layers above call the same functions once per data set.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

CHECKED_AT_ONCE = 2**22  # numbers
_ARRAYS = (np.ndarray, np.memmap)
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_INT64 = np.dtype(np.int64)
# The unsigned type of the same size and byte order.
_UNSIGNED = {
    np.dtype(f"{order}{kind}{size}"): np.dtype(f"{order}u{size}")
    for order in "<>"
    for kind in "iu"
    for size in (1, 2, 4, 8)
}


def _shape_words(shape: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def is_on_gpu(value: Any) -> bool:
    """Return whether that is a CuPy array, without importing CuPy."""
    kind: Any = type(value)
    return kind is not np.ndarray and _is_cupys(kind)


@cache
def _is_cupys(kind: Any) -> bool:
    return kind.__module__.partition(".")[0] == "cupy" and hasattr(kind, "dtype")


def check_array(name: str, value: Any, shape: tuple[int | str, ...]) -> None:
    """Refuse what is no NumPy or CuPy array of that shape; a letter in it stands for any size.

    Classes made of NumPy's are refused but for memory-mapped arrays: a masked array would lose its
    mask, and the products of a matrix mean something else.
    """
    if type(value) not in _ARRAYS and not is_on_gpu(value):
        raise TypeError(
            f"{name} must be a NumPy array (or on a GPU a CuPy array) of shape "
            f"{_shape_words(shape)}; found {type(value).__name__}"
        )
    found = value.shape
    if found == shape:
        return
    fits = len(found) == len(shape)
    for want, got in zip(shape, found, strict=False):
        if want != got and type(want) is not str:
            fits = False
    if not fits:
        raise ValueError(
            f"{name} must have shape {_shape_words(shape)}; found {_shape_words(found)}"
        )


def check_same_home(name: str, value: Any, other_name: str, other: Any) -> None:
    """Refuse a NumPy array beside a CuPy array: nothing is copied to or from the GPU unasked."""
    if type(value) is not type(other) and is_on_gpu(value) != is_on_gpu(other):
        kinds = [("NumPy", "CuPy")[is_on_gpu(array)] for array in (value, other)]
        raise TypeError(
            f"{name} is a {kinds[0]} array and {other_name} a {kinds[1]} array; move one of them "
            "with cupy.asarray or cupy.asnumpy"
        )


def check_floats(name: str, value: Any, shape: tuple[int | str, ...], dtype: Any = None) -> None:
    """Refuse what is not a float32 or float64 array of that shape (and, if given, that dtype)."""
    check_array(name, value, shape)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32 or float64; found {value.dtype}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} like the arrays it goes with; found {value.dtype}")


def check_work(
    backend: str | None,
    name: str,
    value: Any,
    shape: tuple[int | str, ...],
    dtype: Any = None,
    written: bool = False,
    any_order: bool = False,
) -> None:
    """Refuse what a kernel that takes arrays as they are would read or write beyond its end.

    ``dtype`` is that of the other arrays. NumPy takes complex numbers, too, and real ones beside
    them, as long as nothing complex is to be written to real ones.
    """
    check_array(name, value, shape)
    is_complex = backend == "numpy" and value.dtype.kind == "c"
    if value.dtype not in FLOATS and not is_complex:
        raise TypeError(f"{name} must be float32 or float64; found {value.dtype}")
    fits = dtype is None or value.dtype == dtype
    if not fits and not is_complex and (written or dtype.kind != "c"):
        raise TypeError(f"{name} must be {dtype} like the arrays it goes with; found {value.dtype}")
    if not any_order and not value.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous, in C order")
    if written and not is_on_gpu(value) and not value.flags.writeable:
        raise ValueError(f"{name} is written to and must not be read-only")


def are_alike(first: Any, *others: Any) -> bool:
    """Return whether ``check_work`` has nothing against any of these, but maybe for their shapes.

    It is for a training step, where arrays mostly are as they should be: one look at each. A false
    answer means that ``check_work`` has to find out.
    """
    on_gpu = is_on_gpu(first)
    if type(first) is not np.ndarray and not on_gpu:
        return False
    kind, dtype = type(first), first.dtype
    if dtype not in FLOATS:
        return False
    for array in (first, *others):
        if type(array) is not kind or array.dtype is not dtype:
            return False
        flags = array.flags
        if not (flags.c_contiguous and (on_gpu or flags.writeable)):
            return False
    return True


def are_ready(logits: Any, labels: Any, *others: Any) -> bool:
    """Return whether no check but those of values and of the others' shapes has to be made.

    That is so for a mini-batch of NumPy arrays as the kernels take them: (n, K) logits, (n,) int64
    labels from 0 to K - 1, and other arrays of the logits' dtype, all in C order. One look at each
    takes half the time of the checks one by one, which for a false answer have to find out.
    (:func:`are_alike`, which also takes arrays on a GPU and wants all to be written to, would be a
    microsecond slower: two thirds of what this saves.)
    """
    if type(logits) is not np.ndarray or type(labels) is not np.ndarray:
        return False
    shape, dtype = logits.shape, logits.dtype
    if len(shape) != 2 or dtype not in FLOATS or labels.dtype is not _INT64:
        return False
    n, k = shape
    if n < 1 or k < 2 or labels.shape != (n,):
        return False
    if not (logits.flags.c_contiguous and labels.flags.c_contiguous):
        return False
    for array in others:
        if type(array) is not np.ndarray or array.dtype is not dtype:
            return False
        if not array.flags.c_contiguous:
            return False
    return _are_in_range(labels, k)


def dtype_of_all(*arrays: Any) -> np.dtype:
    """Return the complex dtype among those of arrays, else the first; what is no array has none."""
    dtypes = [array.dtype for array in arrays if hasattr(array, "dtype")]
    return next((dtype for dtype in dtypes if dtype.kind == "c"), dtypes[0])


def check_n_classes(n_classes: int) -> None:
    """Refuse fewer than two classes."""
    if n_classes < 2:
        raise ValueError(f"n_classes must be at least 2; found {n_classes}")


def check_samples_and_classes(name: str, value: np.ndarray) -> None:
    """Refuse an (n, K) array without samples or with fewer than two classes."""
    n, k = value.shape
    if n < 1:
        raise ValueError(f"{name} must hold at least one sample; found shape {value.shape}")
    if k < 2:
        raise ValueError(f"{name} must hold at least two classes; found shape {value.shape}")


def check_rows_are_log_weights(name: str, value: np.ndarray) -> None:
    """Refuse a row without a softmax: one with NaN or +inf, or -inf everywhere.

    A row's maximum shows all three: it is NaN, +inf or -inf.
    """
    if value.shape[1] < 1:
        raise ValueError(f"{name} must have at least one column; found shape {value.shape}")
    bad = np.flatnonzero(~np.isfinite(value.max(axis=1)))
    if bad.size:
        first = int(bad[0])
        row = value[first]
        found = "NaN" if np.isnan(row).any() else "+inf" if np.isposinf(row).any() else "only -inf"
        raise ValueError(
            f"{name}: row {first} holds {found}; every row must hold at least one finite entry "
            "and no NaN or +inf (-inf stands for probability zero)"
        )


def check_finite(name: str, value: np.ndarray) -> None:
    """Refuse NaN and infinities, in pieces: the array may be a file larger than memory."""
    rows = max(1, CHECKED_AT_ONCE * len(value) // max(1, value.size))
    for start in range(0, len(value), rows):
        finite = np.isfinite(value[start : start + rows])
        if not finite.all():
            first, *others = (int(i) for i in np.argwhere(~finite)[0])
            where = (start + first, *others)
            raise ValueError(f"{name} must be finite; found {value[where]} at {where}")


def check_products(name: str, value: np.ndarray, other_name: str, other: np.ndarray) -> None:
    """Refuse two finite arrays if sums over their last axes could leave the dtype's range."""
    largest = [max(float(array.max()), -float(array.min())) for array in (value, other)]
    bound = value.shape[-1] * largest[0] * largest[1]
    # A quarter: for a bias on top, and for the difference of two such sums.
    if not bound <= np.finfo(value.dtype).max / 4:
        raise ValueError(
            f"{name} and {other_name} must have products within the range of {value.dtype}; found "
            f"numbers as large as {largest[0]:.3g} and {largest[1]:.3g}"
        )


def check_probability_rows(name: str, value: np.ndarray) -> None:
    """Refuse rows that are not distributions: negative entries, NaN, or a sum away from one."""
    off: np.ndarray = np.abs(value.sum(axis=1, dtype=np.float64) - 1.0)
    worst = int(np.argmax(np.where(np.isnan(off), np.inf, off)))
    tolerance = 64 * value.shape[1] * np.finfo(value.dtype).eps
    if not (value >= 0).all() or not (off <= tolerance).all():
        raise ValueError(
            f"{name} must have non-negative rows that sum to one; "
            f"smallest entry {value.min()}, row {worst} sums to {value[worst].sum()}"
        )


def check_noise_matrix(name: str, theta: Any) -> None:
    """Refuse what is not a square matrix of at least two row distributions."""
    check_floats(name, theta, ("K", "K"))
    check_array(name, theta, (theta.shape[0], theta.shape[0]))
    check_samples_and_classes(name, theta)
    check_probability_rows(name, theta)


def check_generator(name: str, rng: Any) -> None:
    """Refuse what is not a random generator."""
    if not isinstance(rng, np.random.Generator):
        raise TypeError(
            f"{name} must be a numpy.random.Generator, such as nalayer.stream gives; "
            f"found {type(rng).__name__}"
        )


def _are_in_range(labels: Any, n_classes: int) -> bool:
    # Seen as unsigned, a negative label is larger than any class: one pass over them, not two.
    # For a batch of them NumPy's argmax takes a fifth of the time of its max.
    as_unsigned = labels.view(_UNSIGNED[labels.dtype])
    return bool(as_unsigned[as_unsigned.argmax()] < n_classes)


def check_labels(
    name: str, labels: Any, n: int | str, n_classes: int, check_range: bool = True
) -> None:
    """Refuse what is not an array of n integers from 0 to n_classes - 1."""
    check_array(name, labels, (n,))
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers; found {labels.dtype}")
    if not check_range or not labels.size:
        return
    if not _are_in_range(labels, n_classes):
        found = f"{int(labels.min())}..{int(labels.max())}"
        raise ValueError(f"{name} must lie in 0..{n_classes - 1}; found {found}")


def check_labels_reachable(
    name: str, labels: np.ndarray, channel_name: str, channel_logits: np.ndarray
) -> None:
    """Refuse a label that no true class can produce: its column of the noise matrix is zero."""
    unreachable = np.flatnonzero(np.isneginf(channel_logits.max(axis=0)))
    found = np.intersect1d(unreachable, labels)
    if found.size:
        lost = int(found[0])
        raise ValueError(
            f"{name} contains label {lost}, but column {lost} of {channel_name} is -inf "
            "throughout: no true class can be observed as it, and its likelihood is zero"
        )


def check_support(name: str, support: Any, n_classes: int | str = "K") -> None:
    """Refuse what is not a (K, l) integer array whose rows are different classes."""
    check_array(name, support, (n_classes, "l"))
    if support.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers; found {support.dtype}")
    k, n_kept = support.shape
    if k < 2 or not 1 <= n_kept <= k:
        raise ValueError(
            f"{name} must have shape (K, l) with K >= 2 and 1 <= l <= K; found {support.shape}"
        )
    if support.min() < 0 or support.max() >= k:
        raise ValueError(f"{name} must lie in 0..{k - 1}; found {support.min()}..{support.max()}")
    in_order = np.sort(support, axis=1)
    twice = np.flatnonzero((in_order[:, 1:] == in_order[:, :-1]).any(axis=1))
    if twice.size:
        raise ValueError(
            f"{name} must name l different classes in every row; row {twice[0]} is "
            f"{support[twice[0]].tolist()}"
        )


def check_labels_linked(
    name: str, labels: np.ndarray, support_name: str, n_links_j: np.ndarray
) -> None:
    """Refuse a label that no row of the support, with a finite channel logit, leads to."""
    lost = np.intersect1d(np.flatnonzero(n_links_j == 0), labels)
    if lost.size:
        raise ValueError(
            f"{name} contains label {int(lost[0])}, but no row of {support_name} leads to it with "
            "a channel logit above -inf: no true class can be observed as it, and its likelihood "
            "is zero"
        )
