"""The confusion matrix of very many classes, from which a sparse noise layer's links are chosen.

Nothing of size K x K is formed: a sample leaves its mark at the few classes that it may belong to.
Counts of parts of a data set, or of several machines, add up with ``+``.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse

from kernels import LinkIndex, checks, log_softmax
from nalayer.noise_layer import AUTHORS_FLOOR
from nalayer.support import gather_links


def confusion_counts(
    probabilities: np.ndarray, noisy_labels: np.ndarray, n_candidates: int = 1
) -> scipy.sparse.csr_array:
    r"""Return how often each true class, as the network sees it, was observed as each label.

    .. math:: C_{ij} = \sum_t 1\{z_t=j\}\; w_{ti}

    Parameters
    ----------
    probabilities : (n, K)
        The network's softmax outputs q_ti. For one candidate the logits will do.
    noisy_labels : (n,) integer
    n_candidates : int
        1 counts: w_ti is 1 for the class with the largest q_ti (the lower one among equals), as
        for a "hard" :func:`~nalayer.confusion_start`. More of them weigh: w_ti is q_ti for the
        so many most probable classes, and 0 for all others; all K are the "soft" one.

    Returns
    -------
    scipy.sparse.csr_array (K, K), float64
        At most n n_candidates entries. Of one candidate they are whole numbers, so that the sum
        over parts of the data is exact whatever the parts; otherwise to rounding. Take it to
        :func:`~nalayer.top_support` and :func:`sparse_confusion_start`.

    Raises
    ------
    TypeError, ValueError
        For arrays that do not fit, NaN and infinities (of one candidate, -inf is a logit), labels
        out of range, ``n_candidates`` outside 1..K.

    Examples
    --------
    >>> q = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    >>> confusion_counts(q, np.array([0, 1, 1])).toarray()
    array([[1., 1.],
           [0., 1.]])
    """
    checks.check_floats("probabilities", probabilities, ("n", "K"))
    checks.check_samples_and_classes("probabilities", probabilities)
    checks.check_rows_are_log_weights("probabilities", probabilities)
    n, k = probabilities.shape
    checks.check_labels("noisy_labels", noisy_labels, n, k)
    if not 1 <= n_candidates <= k:
        raise ValueError(f"n_candidates must lie in 1..{k}; found {n_candidates}")
    if n_candidates == 1:
        class_tc = probabilities.argmax(axis=1)[:, None]
        weight_tc = np.ones((n, 1))
    else:
        checks.check_finite("probabilities", probabilities)
        class_tc = np.argpartition(-probabilities, n_candidates - 1, axis=1)[:, :n_candidates]
        weight_tc = np.take_along_axis(probabilities, class_tc, axis=1).astype(np.float64)
    label_tc = np.repeat(noisy_labels, n_candidates)
    counts = scipy.sparse.coo_array((weight_tc.ravel(), (class_tc.ravel(), label_tc)), shape=(k, k))
    return counts.tocsr()  # which sums what is named twice


def sparse_confusion_start(
    confusion: scipy.sparse.csr_array, links: LinkIndex, floor: float = AUTHORS_FLOOR
) -> np.ndarray:
    r"""Return a sparse s-model's channel logits (K, l) from a sparse confusion matrix.

    .. math:: B_{ij} = \log\Big(\frac{C_{ij}}{\sum_{j'} C_{ij'}} + floor\Big)
              \quad\text{at the links}

    It is what :func:`~nalayer.sparse_start` makes of a dense model that starts from
    :func:`~nalayer.confusion_start`, without the dense model.

    Parameters
    ----------
    confusion : scipy.sparse (K, K)
        From :func:`confusion_counts`, or anything like it.
    links : LinkIndex
        For instance ``link_index(top_support(confusion, n_kept))``.
    floor : float
        As in :func:`~nalayer.confusion_start`.

    Returns
    -------
    (K, l) float64
        Finite; rows are log-probabilities. Uniform for a class that nothing was counted of.

    Raises
    ------
    ValueError
        For a confusion matrix of another shape than the links are for, or a floor that is not
        positive.
    """
    k = links.support.shape[0]
    if confusion.shape != (k, k):
        raise ValueError(f"confusion must have shape ({k}, {k}); found {confusion.shape}")
    if not floor > 0:
        raise ValueError(f"floor must be positive; found {floor}")
    n_i = np.asarray(confusion.sum(axis=1), dtype=np.float64).reshape(k, 1)
    kept_ij = gather_links(confusion, links)
    share_ij = np.divide(kept_ij, n_i, out=np.zeros(kept_ij.shape), where=n_i > 0)
    return log_softmax(np.log(share_ij + floor))
