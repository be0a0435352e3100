"""The public kernels: one function each, with its contract, its checks and its dispatch.

Contract, the same for all of them:

- ``dtype`` in = ``dtype`` out, float32 or float64; sums over samples are taken in float64.
- Inputs are never written. Any memory order is accepted; C order is not copied.
- ``nll`` is the **mean** over samples, in nats; every ``d_x`` is the gradient of that mean with
  respect to ``x`` and has its shape.
- ``-inf`` among logits means probability zero and is allowed, as long as a row keeps one finite
  entry. A sample whose label has probability zero has log-likelihood ``-inf`` and a posterior and
  noise-model gradient of NaN: there is nothing to divide by.
- Results do not depend on the number of threads, bit for bit.
- ``check_values=False`` leaves out the looks at every logit (NaN, infinities, unreachable labels)
  and keeps those at shapes, dtypes and the range of the labels. It is for callers that have checked
  the data set once.
- The compiled kernels run on GNU OpenMP where it is there: do not fork a process after using them
  (``spawn`` and joblib's default are fine).
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np

from kernels import checks
from kernels.results import Posterior, SModelNLL, SoftmaxNLL

BACKENDS = {"numpy": "kernels.numpy_backend", "numba": "kernels.numba_backend"}
DEFAULT_BACKEND = "numba"


def get_backend(name: str | None = None) -> ModuleType:
    """Return the module that implements the kernels under that name.

    Parameters
    ----------
    name : {"numpy", "numba"}, optional
        None stands for "numba", the fast one for NumPy arrays.

    Raises
    ------
    ValueError
        If there is no backend of that name. There is no silent fallback.
    """
    if name is None:
        name = DEFAULT_BACKEND
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {sorted(BACKENDS)} or None; found {name!r}")
    return importlib.import_module(BACKENDS[name])


def _prepare_logits(logits: np.ndarray, check_values: bool) -> np.ndarray:
    checks.check_floats("logits", logits, ("n", "K"))
    checks.check_samples_and_classes("logits", logits)
    if check_values:
        checks.check_rows_are_log_weights("logits", logits)
    return np.ascontiguousarray(logits)


def _prepare_labels(name: str, labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    # Always, also for checked data: a label out of range would touch memory outside the arrays.
    checks.check_labels(name, labels, *shape)
    return np.ascontiguousarray(labels, dtype=np.int64)


def _prepare_s_model(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray, check_values: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logits = _prepare_logits(logits, check_values)
    k = logits.shape[1]
    checks.check_floats("channel_logits", channel_logits, (k, k), logits.dtype)
    labels = _prepare_labels("noisy_labels", noisy_labels, logits.shape)
    if check_values:
        checks.check_rows_are_log_weights("channel_logits", channel_logits)
        checks.check_labels_reachable("noisy_labels", labels, "channel_logits", channel_logits)
    return logits, np.ascontiguousarray(channel_logits), labels


def softmax_nll(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    backend: str | None = None,
    check_values: bool = True,
) -> SoftmaxNLL:
    r"""Return the cross-entropy of a softmax classifier, the paper's baseline, and its gradient.

    With :math:`q_{ti} = \mathrm{softmax}(a_t)_i` (Eq. 7),

    .. math:: nll = -\frac1n \sum_t \log q_{t,z_t}, \qquad
              \frac{\partial\,nll}{\partial a_{ti}} = \frac{q_{ti} - 1\{z_t = i\}}{n}.

    Parameters
    ----------
    logits : (n, K) float32 or float64
        The classifier's scores a_ti.
    labels : (n,) integer
        Class of each sample, 0..K-1.
    backend : {"numpy", "numba"}, optional
    check_values : bool
        See the module's contract.

    Returns
    -------
    SoftmaxNLL
        ``nll`` (mean, nats) and ``d_logits`` (n, K).

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape, label range, NaN, +inf or a row of -inf.

    Examples
    --------
    >>> import numpy as np
    >>> nll, d_logits = softmax_nll(np.zeros((1, 4)), np.array([2]))
    >>> float(round(np.exp(nll), 12)), d_logits.tolist()
    (4.0, [[0.25, 0.25, -0.75, 0.25]])
    """
    logits = _prepare_logits(logits, check_values)
    labels = _prepare_labels("labels", labels, logits.shape)
    return get_backend(backend).softmax_nll(logits, labels)


def soft_target_nll(
    logits: np.ndarray,
    targets: np.ndarray,
    *,
    backend: str | None = None,
    check_values: bool = True,
) -> SoftmaxNLL:
    r"""Return the cross-entropy against soft targets: the network's part of EM's M-step (Eq. 5).

    With targets :math:`c_t` that sum to one over the classes,

    .. math:: nll = -\frac1n \sum_t \sum_i c_{ti} \log q_{ti}, \qquad
              \frac{\partial\,nll}{\partial a_{ti}} = \frac{q_{ti} - c_{ti}}{n},

    the negative mean of the paper's S(w); its gradient times h(x_t) is Eq. 6.

    Parameters
    ----------
    logits : (n, K) float32 or float64
    targets : (n, K), same dtype
        Non-negative, rows sum to one: the E-step's posterior, or another network's output.
    backend : {"numpy", "numba"}, optional
    check_values : bool
        See the module's contract.

    Returns
    -------
    SoftmaxNLL
        ``nll`` (mean, nats; 0 log 0 = 0) and ``d_logits`` (n, K).

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype or shape, logits without a softmax, targets that are no distributions.

    Examples
    --------
    >>> import numpy as np
    >>> nll, d_logits = soft_target_nll(np.zeros((1, 2)), np.array([[0.75, 0.25]]))
    >>> float(round(np.exp(nll), 12)), d_logits.tolist()
    (2.0, [[-0.25, 0.25]])
    """
    logits = _prepare_logits(logits, check_values)
    checks.check_floats("targets", targets, logits.shape, logits.dtype)
    if check_values:
        checks.check_probability_rows("targets", targets)
    return get_backend(backend).soft_target_nll(logits, np.ascontiguousarray(targets))


def s_model_nll(
    logits: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    *,
    backend: str | None = None,
    check_values: bool = True,
) -> SModelNLL:
    r"""Return the s-model's loss (Eqs. 10-12) and its joint gradient.

    With :math:`q_t` the classifier's softmax (Eq. 7), :math:`\theta_i = \mathrm{softmax}(B_i)`
    row by row (Eqs. 10, 13) and :math:`m_t = \sum_i q_{ti}\theta_{i,z_t}` (Eq. 11),

    .. math:: nll = -\frac1n \sum_t \log m_t.

    The gradients are the E-step (Eq. 3) in disguise: with
    :math:`c_{ti} = q_{ti}\theta_{i,z_t}/m_t`, :math:`N_{ij} = \sum_{t: z_t=j} c_{ti}` and
    :math:`n_i = \sum_j N_{ij}`,

    .. math:: \frac{\partial\,nll}{\partial a_{ti}} = \frac{q_{ti} - c_{ti}}{n}, \qquad
              \frac{\partial\,nll}{\partial B_{ij}} = \frac{n_i\theta_{ij} - N_{ij}}{n}.

    Parameters
    ----------
    logits : (n, K) float32 or float64
        The classifier's scores a_ti, before any softmax.
    channel_logits : (K, K), same dtype
        B_ij: **rows are the true class, columns the observed one**. -inf is a zero of theta.
    noisy_labels : (n,) integer
        Observed labels z_t, 0..K-1.
    backend : {"numpy", "numba"}, optional
    check_values : bool
        See the module's contract.

    Returns
    -------
    SModelNLL
        ``nll`` (mean, nats), ``d_logits`` (n, K), ``d_channel_logits`` (K, K).

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape, label range, NaN, +inf, a row of -inf (a row of theta without a
        softmax), or a label whose column of theta is zero throughout.

    Notes
    -----
    log m_t is a log-sum-exp of log q_ti + log theta_{i,z_t} and c_t the softmax of the same K
    numbers: one reduction gives loss and posterior, with no epsilon. Only column z_t of theta is
    needed: O(nK + K^2) work, never the O(nK^2) product of q and theta. An entry of -inf has
    gradient zero: a zero of theta stays.

    Examples
    --------
    A noise layer that is the identity leaves plain cross-entropy:

    >>> import numpy as np
    >>> logits, labels = np.array([[2.0, -1.0], [0.5, 0.0]]), np.array([0, 1])
    >>> with np.errstate(divide="ignore"):
    ...     identity = np.log(np.eye(2))
    >>> joint = s_model_nll(logits, identity, labels)
    >>> plain = softmax_nll(logits, labels)
    >>> bool(abs(joint.nll - plain.nll) < 1e-15)
    True
    >>> joint.d_channel_logits.tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    arrays = _prepare_s_model(logits, channel_logits, noisy_labels, check_values)
    return get_backend(backend).s_model_nll(*arrays)


def s_model_posterior(
    logits: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    *,
    backend: str | None = None,
    check_values: bool = True,
) -> Posterior:
    r"""Return the s-model's E-step (Eq. 3) and each sample's term of the likelihood (Eq. 2).

    .. math:: c_{ti} = p(y_t = i \mid x_t, z_t) = \frac{q_{ti}\theta_{i,z_t}}{m_t}, \qquad
              \log m_t = \log \sum_i q_{ti}\theta_{i,z_t}.

    Parameters
    ----------
    logits : (n, K) float32 or float64
    channel_logits : (K, K), same dtype
        Rows are the true class, columns the observed one.
    noisy_labels : (n,) integer
    backend : {"numpy", "numba"}, optional
    check_values : bool
        See the module's contract.

    Returns
    -------
    Posterior
        ``log_likelihood_t`` (n,), nats, one value per sample (their sum is L of Eq. 2), and
        ``posterior`` (n, K).

    Raises
    ------
    TypeError, ValueError
        As :func:`s_model_nll`.

    Examples
    --------
    The label says class 1, but class 0 is often observed as 1 and the classifier is sure:

    >>> import numpy as np
    >>> theta = np.array([[0.5, 0.5], [0.0, 1.0]])
    >>> q = np.array([[0.9, 0.1]])
    >>> with np.errstate(divide="ignore"):
    ...     e_step = s_model_posterior(np.log(q), np.log(theta), np.array([1]))
    >>> (e_step.posterior * 55).round(9).tolist()
    [[45.0, 10.0]]
    >>> np.exp(e_step.log_likelihood_t).round(9).tolist()
    [0.55]
    """
    arrays = _prepare_s_model(logits, channel_logits, noisy_labels, check_values)
    return get_backend(backend).s_model_posterior(*arrays)


def thread_count() -> int:
    """Return how many threads the parallel kernels use (Numba's setting; change it there)."""
    return get_backend("numba").thread_count()
