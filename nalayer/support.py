"""Which links a sparse noise layer keeps (Section 3), and the way between dense and kept arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse

from kernels import LinkIndex, checks


def top_support(confusion: Any, n_kept: int) -> np.ndarray:
    """Return the support of a sparse noise layer: each row's diagonal and its largest entries.

    Row i holds class i itself and the ``n_kept - 1`` classes j != i with the largest
    ``confusion[i, j]``; **among equal entries the lower class index** is kept. That is the paper's
    "l largest entries of each row", except that the diagonal is always among them. Therefore every
    label is covered: label j can be observed from true class j by row j, whatever the data are.

    Parameters
    ----------
    confusion : (K, K) array or scipy.sparse matrix
        Rows are the true class, columns the observed one: counts, frequencies or a noise matrix.
        Finite and not negative. A sparse matrix's missing entries are zeros; nothing of size K x K
        is formed for it, only lists of its entries and of K n_kept links.
    n_kept : int
        The paper's l, 1 to K.

    Returns
    -------
    (K, n_kept) int64
        Every row ascending; hand it to :func:`kernels.link_index`.

    Raises
    ------
    TypeError, ValueError
        For what is not a square numeric matrix of at least two classes; NaN, infinity or a
        negative entry; ``n_kept`` out of 1..K.

    Examples
    --------
    >>> import numpy as np
    >>> top_support(np.array([[0, 3, 5], [2, 9, 2], [0, 0, 0]]), 2)
    array([[0, 2],
           [0, 1],
           [0, 2]])
    """
    sparse = scipy.sparse.issparse(confusion)
    if not sparse:
        checks.check_array("confusion", confusion, ("K", "K"))
    if len(confusion.shape) != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"confusion must have shape (K, K); found {confusion.shape}")
    if confusion.dtype.kind not in "biuf":
        raise TypeError(f"confusion must hold real numbers; found {confusion.dtype}")
    k = confusion.shape[0]
    checks.check_n_classes(k)
    if not isinstance(n_kept, int | np.integer) or isinstance(n_kept, bool):
        raise TypeError(f"n_kept must be an integer; found {type(n_kept).__name__}")
    if not 1 <= n_kept <= k:
        raise ValueError(f"n_kept must lie in 1..{k}; found {n_kept}")
    top = _top_of_sparse(confusion, n_kept) if sparse else _top_of_dense(confusion, n_kept)
    return np.sort(top, axis=1)


def _check_entries(entries: np.ndarray) -> None:
    if not (np.isfinite(entries) & (entries >= 0)).all():
        bad = entries[~(np.isfinite(entries) & (entries >= 0))][0]
        raise ValueError(f"confusion must be finite and not negative; found {bad}")


def _top_of_dense(confusion: np.ndarray, n_kept: int) -> np.ndarray:
    _check_entries(confusion)
    falling = -confusion.astype(np.float64)
    np.fill_diagonal(falling, -np.inf)
    return np.argsort(falling, axis=1, kind="stable")[:, :n_kept]


def _top_of_sparse(confusion: Any, n_kept: int) -> np.ndarray:
    entries = scipy.sparse.csr_matrix(confusion, copy=True)  # entries named twice are summed
    entries.sum_duplicates()
    _check_entries(entries.data)
    k = entries.shape[0]
    rows, stored = np.arange(k, dtype=np.int64), entries.tocoo()
    # A row with too few stored entries goes on with zeros, lowest class first. Less than n_kept of
    # these can be stored already, so twice n_kept of them are enough.
    fillers = np.arange(min(2 * n_kept, k), dtype=np.int64)
    row_e = np.concatenate([rows, stored.row, np.repeat(rows, fillers.size)])
    column_e = np.concatenate([rows, stored.col, np.tile(fillers, k)])
    falling_e = -np.concatenate(
        [np.full(k, np.inf), stored.data.astype(np.float64), np.zeros(k * fillers.size)]
    )
    # Of several entries for one place the largest stands: diagonal, stored, filler.
    order = np.lexsort((falling_e, column_e, row_e))
    row_e, column_e, falling_e = row_e[order], column_e[order], falling_e[order]
    first = np.ones(row_e.size, dtype=bool)
    first[1:] = (row_e[1:] != row_e[:-1]) | (column_e[1:] != column_e[:-1])
    row_e, column_e, falling_e = row_e[first], column_e[first], falling_e[first]

    order = np.lexsort((column_e, falling_e, row_e))
    start_i = np.searchsorted(row_e, rows)  # every row has n_kept entries or more
    return column_e[order][start_i[:, None] + np.arange(n_kept)]


def gather_links(matrix: Any, links: LinkIndex) -> np.ndarray:
    """Return the entries of the links: (K, K) or (K, K, d) -> (K, l) or (K, l, d), a copy.

    Accepts a scipy.sparse matrix as well. Raises TypeError or ValueError for another shape.
    """
    k = links.support.shape[0]
    rows = np.arange(k, like=links.support)[:, None]
    if scipy.sparse.issparse(matrix):
        if matrix.shape != (k, k):
            raise ValueError(f"matrix must have shape ({k}, {k}); found {matrix.shape}")
        return scipy.sparse.csr_matrix(matrix)[rows, links.support].toarray()
    checks.check_array("matrix", matrix, (k, k, "d")[: max(2, getattr(matrix, "ndim", 2))])
    checks.check_same_home("links", links.support, "matrix", matrix)
    return matrix[rows, links.support]


def scatter_links(values: np.ndarray, links: LinkIndex, missing: float) -> np.ndarray:
    """Return a dense (K, K) matrix with (K, l) values at the links and ``missing`` elsewhere.

    For looking at small models: 0 is missing from a noise matrix, -inf from channel logits.

    Examples
    --------
    >>> import numpy as np
    >>> from kernels import link_index
    >>> scatter_links(np.array([[0.9], [0.8]]), link_index(np.array([[0], [1]])), missing=0.0)
    array([[0.9, 0. ],
           [0. , 0.8]])
    """
    checks.check_array("values", values, links.support.shape)
    k = links.support.shape[0]
    dense = np.full_like(values, missing, shape=(k, k))
    dense[np.arange(k, like=values)[:, None], links.support] = values
    return dense
