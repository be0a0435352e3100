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
- NumPy arrays are computed with Numba and CuPy arrays on their GPU, unless ``backend`` names
  another; nothing is copied from one to the other. On the GPU every result is a CuPy array, the
  scalar ``nll`` as well, and the same bits come back in every run on the same kind of device.
- ``check_values=False`` leaves out the looks at every logit (NaN, infinities, unreachable labels)
  and keeps those at shapes, dtypes and the range of the labels. It is for callers that have checked
  the data set once. On the GPU it leaves out the range too, and then no call waits for the device;
  a label out of range gives NaN for its sample and the loss.
- The compiled kernels run on GNU OpenMP where it is there: do not fork a process after using them
  (``spawn`` and joblib's default are fine).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np

from kernels import checks
from kernels.links import LinkIndex, link_index
from kernels.results import CModelNLL, Posterior, SkippingCModelNLL, SModelNLL, SoftmaxNLL

BACKENDS = {
    "numpy": "kernels.numpy_backend",
    "numba": "kernels.numba_backend",
    "cupy": "kernels.cupy_backend",
}
CPU_BACKENDS = ("numpy", "numba")
"""Those that work on NumPy arrays."""
DEFAULT_BACKEND = "numba"
_FOUND: dict[str, ModuleType] = {}
"""The modules that are imported, wholly; import_module would take half a microsecond again."""


def get_backend(name: str | None = None) -> ModuleType:
    """Return the module that implements the kernels under that name.

    Parameters
    ----------
    name : {"numpy", "numba", "cupy"}, optional
        None stands for "numba", the fast one for NumPy arrays.

    Raises
    ------
    ValueError
        If there is no backend of that name. There is no silent fallback.
    ImportError
        If what the backend needs is not installed; the message says what to install.
    """
    if name is None:
        name = DEFAULT_BACKEND
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {sorted(BACKENDS)} or None; found {name!r}")
    if name not in _FOUND:
        # Not sys.modules, where another thread may find a module that is still being imported
        _FOUND[name] = importlib.import_module(BACKENDS[name])
    return _FOUND[name]


def _backend_for(name: str | None, array: Any, array_name: str = "logits") -> ModuleType:
    """Return the backend of that name, or for None that of the arrays; refuse the wrong arrays."""
    on_gpu = checks.is_on_gpu(array)
    if name is None and on_gpu:
        name = "cupy"
    module = get_backend(name)
    if on_gpu != (name == "cupy"):
        raise TypeError(
            f"backend {name!r} works on NumPy arrays; {array_name} is a CuPy array: leave the "
            "backend out, or move the arrays with cupy.asnumpy"
            if on_gpu
            else f"backend {name!r} works on CuPy arrays; {array_name} is a NumPy array: move the "
            "arrays to the GPU with cupy.asarray"
        )
    return module


def _contiguous(array: np.ndarray, dtype: Any = None) -> np.ndarray:
    """Return the array in C order, itself if it is; a method, so that CuPy's arrays do it too."""
    return array.astype(array.dtype if dtype is None else dtype, order="C", copy=False)


def _prepare_logits(logits: np.ndarray, check_values: bool) -> np.ndarray:
    checks.check_floats("logits", logits, ("n", "K"))
    checks.check_samples_and_classes("logits", logits)
    if check_values:
        checks.check_rows_are_log_weights("logits", logits)
    return _contiguous(logits)


def _prepare_labels(
    name: str, labels: np.ndarray, logits: np.ndarray, check_values: bool
) -> np.ndarray:
    # Always on the CPU, also for checked data: a label out of range would touch memory outside the
    # arrays. On the GPU the look would wait for the device; the kernels there guard themselves.
    check_range = check_values or not checks.is_on_gpu(labels)
    n, k = logits.shape
    checks.check_labels(name, labels, n, k, check_range)
    checks.check_same_home(name, labels, "logits", logits)
    return _contiguous(labels, np.int64)


def _prepare_s_model(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray, check_values: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ready = not check_values and checks.are_ready(logits, noisy_labels, channel_logits)
    if ready and channel_logits.shape == (logits.shape[1],) * 2:
        return logits, channel_logits, noisy_labels
    logits = _prepare_logits(logits, check_values)
    k = logits.shape[1]
    checks.check_floats("channel_logits", channel_logits, (k, k), logits.dtype)
    checks.check_same_home("channel_logits", channel_logits, "logits", logits)
    labels = _prepare_labels("noisy_labels", noisy_labels, logits, check_values)
    if check_values:
        checks.check_rows_are_log_weights("channel_logits", channel_logits)
        checks.check_labels_reachable("noisy_labels", labels, "channel_logits", channel_logits)
    return logits, _contiguous(channel_logits), labels


def _prepare_hidden(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_shape: tuple[int | str, ...],
    check_values: bool,
) -> tuple[np.ndarray, np.ndarray]:
    checks.check_floats("hidden", hidden, (logits.shape[0], "d"), logits.dtype)
    d = hidden.shape[1]
    if d < 1:
        raise ValueError(f"hidden must hold at least one feature; found shape {hidden.shape}")
    checks.check_floats("channel_weights", channel_weights, (*channel_shape, d), logits.dtype)
    checks.check_same_home("hidden", hidden, "logits", logits)
    checks.check_same_home("channel_weights", channel_weights, "logits", logits)
    if check_values:
        checks.check_finite("hidden", hidden)
        checks.check_finite("channel_weights", channel_weights)
        checks.check_products("hidden", hidden, "channel_weights", channel_weights)
    return _contiguous(hidden), _contiguous(channel_weights)


def _prepare_c_model(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    check_values: bool,
) -> tuple[np.ndarray, ...]:
    logits, channel_logits, labels = _prepare_s_model(
        logits, channel_logits, noisy_labels, check_values
    )
    shape = channel_logits.shape
    wide = _prepare_hidden(logits, hidden, channel_weights, shape, check_values)
    return logits, *wide, channel_logits, labels


def _prepare_sparse_c_model(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    support: np.ndarray | LinkIndex,
    noisy_labels: np.ndarray,
    check_values: bool,
) -> tuple:
    logits = _prepare_logits(logits, check_values)
    links = _prepare_links(logits, channel_logits, support, noisy_labels, check_values)
    shape = channel_logits.shape
    wide = _prepare_hidden(logits, hidden, channel_weights, shape, check_values)
    return logits, *wide, *links


def _prepare_links(
    logits: np.ndarray,
    channel_logits: np.ndarray,
    support: np.ndarray | LinkIndex,
    noisy_labels: np.ndarray,
    check_values: bool,
) -> tuple[np.ndarray, LinkIndex, np.ndarray]:
    k = logits.shape[1]
    index = support if isinstance(support, LinkIndex) else link_index(support)
    checks.check_array("support", index.support, (k, "l"))
    checks.check_floats("channel_logits", channel_logits, index.support.shape, logits.dtype)
    checks.check_same_home("support", index.support, "logits", logits)
    checks.check_same_home("channel_logits", channel_logits, "logits", logits)
    labels = _prepare_labels("noisy_labels", noisy_labels, logits, check_values)
    if check_values:
        checks.check_rows_are_log_weights("channel_logits", channel_logits)
        alive = ~np.isneginf(channel_logits)
        n_links_j = np.bincount(index.support[alive], minlength=k)
        checks.check_labels_linked("noisy_labels", labels, "support", n_links_j)
    return _contiguous(channel_logits), index, labels


def _prepare_sparse_s_model(
    logits: np.ndarray,
    channel_logits: np.ndarray,
    support: np.ndarray | LinkIndex,
    noisy_labels: np.ndarray,
    check_values: bool,
) -> tuple[np.ndarray, np.ndarray, LinkIndex, np.ndarray]:
    ready = not check_values and checks.are_ready(logits, noisy_labels, channel_logits)
    if ready and isinstance(support, LinkIndex) and type(support.support) is np.ndarray:
        shape = support.support.shape
        if channel_logits.shape == shape and len(shape) == 2 and shape[0] == logits.shape[1]:
            return logits, channel_logits, support, noisy_labels
    logits = _prepare_logits(logits, check_values)
    links = _prepare_links(logits, channel_logits, support, noisy_labels, check_values)
    return logits, *links


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
    backend : {"numpy", "numba", "cupy"}, optional
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
    if check_values or not checks.are_ready(logits, labels):
        logits = _prepare_logits(logits, check_values)
        labels = _prepare_labels("labels", labels, logits, check_values)
    return _backend_for(backend, logits).softmax_nll(logits, labels)


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
    backend : {"numpy", "numba", "cupy"}, optional
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
    checks.check_same_home("targets", targets, "logits", logits)
    if check_values:
        checks.check_probability_rows("targets", targets)
    return _backend_for(backend, logits).soft_target_nll(logits, _contiguous(targets))


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
    backend : {"numpy", "numba", "cupy"}, optional
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
    return _backend_for(backend, logits).s_model_nll(*arrays)


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
    backend : {"numpy", "numba", "cupy"}, optional
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
    return _backend_for(backend, logits).s_model_posterior(*arrays)


def c_model_nll(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    *,
    backend: str | None = None,
    check_values: bool = True,
) -> CModelNLL:
    r"""Return the c-model's loss (Eqs. 8-9), whose noise depends on the features, and its gradient.

    With :math:`q_t` the classifier's softmax (Eq. 7), one noise matrix for each sample,
    :math:`\theta_{t,ij} = \mathrm{softmax}_j(u_{ij} \cdot h_t + B_{ij})` (Eq. 8), and
    :math:`m_t = \sum_i q_{ti}\theta_{t,iz_t}` (Eq. 9),

    .. math:: nll = -\frac1n \sum_t \log m_t.

    With the posterior :math:`c_{ti} = q_{ti}\theta_{t,iz_t}/m_t` (Eq. 3) and the gradient of a
    score :math:`G_{tij} = c_{ti}(\theta_{t,ij} - 1\{j=z_t\})/n`,

    .. math:: \frac{\partial\,nll}{\partial a_{ti}} = \frac{q_{ti} - c_{ti}}{n}, \quad
              \frac{\partial\,nll}{\partial u_{ij}} = \sum_t G_{tij} h_t, \quad
              \frac{\partial\,nll}{\partial B_{ij}} = \sum_t G_{tij}, \quad
              \frac{\partial\,nll}{\partial h_t} = \sum_{ij} G_{tij} u_{ij}.

    Parameters
    ----------
    logits : (n, K) float32 or float64
        The classifier's scores a_ti.
    hidden : (n, d), same dtype
        The network's last hidden layer h(x_t). Finite.
    channel_weights : (K, K, d), same dtype
        ``channel_weights[i, j]`` is u_ij: true class i, observed class j. Finite.
    channel_logits : (K, K), same dtype
        B_ij; -inf is a zero of every theta_t.
    noisy_labels : (n,) integer
        Observed labels z_t, 0..K-1.
    backend : {"numpy", "numba", "cupy"}, optional
    check_values : bool
        See the module's contract.

    Returns
    -------
    CModelNLL
        ``nll`` (mean, nats), ``d_logits`` (n, K), ``d_hidden`` (n, d), ``d_channel_weights``
        (K, K, d) and ``d_channel_logits`` (K, K). ``d_hidden`` is only what comes through the noise
        layer; what comes through the logits is the network's to add.

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype or shape, a label out of range or unreachable, NaN or +inf anywhere,
        -inf in ``hidden`` or ``channel_weights``, a row of -inf.

    Notes
    -----
    3 products of n x K x K x d multiplications, or 4 where theta is computed a second time because
    keeping it would take more than 64 MiB (256 on a GPU). That, not n x K x K, bounds the memory
    beside arguments and results, but for many classes: K x K in float64, and a few arrays of
    block x K for a block of samples, 8 MiB each, are needed in any case. Entries of n G below
    1e-30 (float64: 1e-300) may count as zero: numbers so small slow a matrix product down by a
    factor of ten.

    Examples
    --------
    With U = 0 it is the s-model:

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> logits, hidden, B = (rng.normal(size=size) for size in ((4, 3), (4, 2), (3, 3)))
    >>> z = np.array([0, 2, 1, 2])
    >>> c, s = c_model_nll(logits, hidden, np.zeros((3, 3, 2)), B, z), s_model_nll(logits, B, z)
    >>> bool(abs(c.nll - s.nll) < 1e-15)
    True
    >>> bool(np.abs(c.d_channel_logits - s.d_channel_logits).max() < 1e-15)
    True
    """
    arrays = _prepare_c_model(
        logits, hidden, channel_weights, channel_logits, noisy_labels, check_values
    )
    return _backend_for(backend, logits).c_model_nll(*arrays)


def c_model_nll_skipping(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    skip_below: float,
    *,
    backend: str | None = None,
    check_values: bool = True,
) -> SkippingCModelNLL:
    r"""Return the c-model's loss, and its gradient without what hardly any posterior mass asks for.

    Row i of the noise matrix learns from sample t in proportion to :math:`c_{ti}`. Where that is
    below ``skip_below`` the pair is left out of ``d_hidden``, ``d_channel_weights`` and
    ``d_channel_logits``. A trained classifier puts next to no mass on most classes; then what
    remains is the one product of the loss. ``nll`` and ``d_logits`` are those of
    :func:`c_model_nll`.

    Parameters
    ----------
    logits, hidden, channel_weights, channel_logits, noisy_labels
        As for :func:`c_model_nll`.
    skip_below : float
        A posterior probability; 0 leaves nothing out.
    backend : {"numpy", "numba"}, optional
    check_values : bool
        See the module's contract.

    Returns
    -------
    SkippingCModelNLL
        With ``missing_i`` (K,): :math:`\frac2n \sum_{t: c_{ti} < skip} c_{ti}`. It bounds
        :math:`\sum_{tj} |G_{tij}|` over what was left out, since
        :math:`\sum_j |\theta_{t,ij} - 1\{j=z_t\}| \le 2`. So the error of ``d_channel_logits[i]``
        has at most this L1 norm, that of ``d_channel_weights[i]`` at most this times the largest
        \|h_tf\|, and that of ``d_hidden`` at most :math:`\sum_i` of this times the largest L1 norm
        of a u_ij.

    Raises
    ------
    TypeError, ValueError
        As :func:`c_model_nll`, or ``skip_below`` is no probability.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> a, h, U, B = (rng.normal(size=s) for s in ((9, 3), (9, 2), (3, 3, 2), (3, 3)))
    >>> z = rng.integers(3, size=9)
    >>> exact, skipping = c_model_nll(a, h, U, B, z), c_model_nll_skipping(a, h, U, B, z, 0.1)
    >>> error_i = np.abs(skipping.d_channel_logits - exact.d_channel_logits).sum(axis=1)
    >>> bool((error_i <= skipping.missing_i + 1e-15).all() and skipping.missing_i.max() < 0.05)
    True
    """
    if not 0 <= skip_below <= 1:
        raise ValueError(f"skip_below must lie in [0, 1]; found {skip_below}")
    arrays = _prepare_c_model(
        logits, hidden, channel_weights, channel_logits, noisy_labels, check_values
    )
    return _backend_for(backend, arrays[0]).c_model_nll_skipping(*arrays, skip_below)


def c_model_posterior(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    *,
    backend: str | None = None,
    check_values: bool = True,
) -> Posterior:
    r"""Return the c-model's E-step (Eq. 3) and each sample's term of the likelihood (Eq. 2).

    .. math:: c_{ti} = \frac{q_{ti}\theta_{t,iz_t}}{m_t}, \qquad
              \log m_t = \log \sum_i q_{ti}\theta_{t,iz_t}.

    Parameters, errors and cost (one product of the four) as for :func:`c_model_nll`.

    Returns
    -------
    Posterior
        ``log_likelihood_t`` (n,), nats, one value per sample, and ``posterior`` (n, K).

    Examples
    --------
    The same label means different things for different features:

    >>> import numpy as np
    >>> h = np.array([[-10.0], [10.0]])
    >>> U = np.array([[[0.0], [1.0]], [[0.0], [0.0]]])  # true class 0 is seen as 1 where h is large
    >>> e_step = c_model_posterior(np.zeros((2, 2)), h, U, np.zeros((2, 2)), np.array([1, 1]))
    >>> e_step.posterior.round(3).tolist()
    [[0.0, 1.0], [0.667, 0.333]]
    """
    arrays = _prepare_c_model(
        logits, hidden, channel_weights, channel_logits, noisy_labels, check_values
    )
    return _backend_for(backend, logits).c_model_posterior(*arrays)


def sparse_s_model_nll(
    logits: np.ndarray,
    channel_logits: np.ndarray,
    support: np.ndarray | LinkIndex,
    noisy_labels: np.ndarray,
    *,
    backend: str | None = None,
    check_values: bool = True,
) -> SModelNLL:
    r"""Return the loss and gradient of an s-model whose rows keep l links each (Section 3).

    Row i of theta is a softmax over the l observed classes ``support[i]``; the other entries are
    zero. Everything else is :func:`s_model_nll`, with sums over the links that exist.

    Parameters
    ----------
    logits : (n, K) float32 or float64
        The classifier's scores a_ti.
    channel_logits : (K, l), same dtype
        ``channel_logits[i, s]`` is B_ij of the link from true class i to observed class
        j = ``support[i, s]``.
    support : (K, l) integer, or LinkIndex
        The links of each row, all different. Build a :func:`~kernels.link_index` once and pass
        that: a plain array is checked and sorted in every call.
    noisy_labels : (n,) integer
        Observed labels z_t, 0..K-1.
    backend : {"numpy", "numba", "cupy"}, optional
    check_values : bool
        See the module's contract.

    Returns
    -------
    SModelNLL
        ``nll`` (mean, nats), ``d_logits`` (n, K), ``d_channel_logits`` (K, l).

    Raises
    ------
    TypeError, ValueError
        As :func:`s_model_nll`; a support that is none; a label that no link leads to.

    Notes
    -----
    O(K) a sample for the classifier's own softmax, plus the links that lead to z_t (l on average):
    the noise layer's part does not grow with K. No K x K array exists anywhere.

    Examples
    --------
    Two links a row; class 2 cannot have been seen as class 0:

    >>> import numpy as np
    >>> support = np.array([[0, 1], [0, 1], [1, 2]])
    >>> nll, d_logits, _ = sparse_s_model_nll(
    ...     np.zeros((1, 3)), np.zeros((3, 2)), support, np.array([0])
    ... )
    >>> float(round(np.exp(-nll), 12)), d_logits.round(3).tolist()
    (0.333333333333, [[-0.167, -0.167, 0.333]])
    """
    arrays = _prepare_sparse_s_model(logits, channel_logits, support, noisy_labels, check_values)
    return _backend_for(backend, logits).sparse_s_model_nll(*arrays)


def sparse_s_model_posterior(
    logits: np.ndarray,
    channel_logits: np.ndarray,
    support: np.ndarray | LinkIndex,
    noisy_labels: np.ndarray,
    *,
    backend: str | None = None,
    check_values: bool = True,
) -> Posterior:
    """Return the sparse s-model's E-step (Eq. 3).

    Parameters and errors as for :func:`sparse_s_model_nll`, results as for
    :func:`s_model_posterior`. A class without a link to z_t has posterior zero.

    Examples
    --------
    >>> import numpy as np
    >>> support = np.array([[0, 1], [0, 1], [1, 2]])
    >>> e_step = sparse_s_model_posterior(
    ...     np.zeros((1, 3)), np.zeros((3, 2)), support, np.array([0])
    ... )
    >>> e_step.posterior.round(9).tolist()
    [[0.5, 0.5, 0.0]]
    """
    arrays = _prepare_sparse_s_model(logits, channel_logits, support, noisy_labels, check_values)
    return _backend_for(backend, logits).sparse_s_model_posterior(*arrays)


def sparse_c_model_nll(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    support: np.ndarray | LinkIndex,
    noisy_labels: np.ndarray,
    *,
    backend: str | None = None,
    check_values: bool = True,
) -> CModelNLL:
    """Return the loss and gradient of a c-model whose rows keep l links each.

    Parameters
    ----------
    logits : (n, K) float32 or float64
    hidden : (n, d), same dtype
    channel_weights : (K, l, d), same dtype
        ``channel_weights[i, s]`` is u_ij of the link to j = ``support[i, s]``.
    channel_logits : (K, l), same dtype
    support : (K, l) integer, or LinkIndex
        See :func:`sparse_s_model_nll`.
    noisy_labels : (n,) integer
    backend : {"numpy", "numba", "cupy"}, optional
    check_values : bool
        See the module's contract.

    Returns
    -------
    CModelNLL
        As :func:`c_model_nll`, with ``d_channel_weights`` (K, l, d) and ``d_channel_logits``
        (K, l).

    Raises
    ------
    TypeError, ValueError
        As :func:`c_model_nll` and :func:`sparse_s_model_nll`.

    Notes
    -----
    A sample meets only the rows that link to z_t, l of them on average, with l scores each: about
    n l l d multiplications a product, whatever K is.

    Examples
    --------
    With l = K it is the dense c-model:

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> a, h, U, B = (rng.normal(size=s) for s in ((4, 3), (4, 2), (3, 3, 2), (3, 3)))
    >>> z, every = np.array([0, 2, 1, 2]), np.tile(np.arange(3), (3, 1))
    >>> dense, sparse = c_model_nll(a, h, U, B, z), sparse_c_model_nll(a, h, U, B, every, z)
    >>> bool(np.abs(dense.d_hidden - sparse.d_hidden).max() < 1e-15)
    True
    """
    arrays = _prepare_sparse_c_model(
        logits, hidden, channel_weights, channel_logits, support, noisy_labels, check_values
    )
    return _backend_for(backend, logits).sparse_c_model_nll(*arrays)


def sparse_c_model_posterior(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    support: np.ndarray | LinkIndex,
    noisy_labels: np.ndarray,
    *,
    backend: str | None = None,
    check_values: bool = True,
) -> Posterior:
    """Return the sparse c-model's E-step (Eq. 3).

    Parameters and errors as for :func:`sparse_c_model_nll`, results as for
    :func:`c_model_posterior`. A class without a link to z_t has posterior zero.
    """
    arrays = _prepare_sparse_c_model(
        logits, hidden, channel_weights, channel_logits, support, noisy_labels, check_values
    )
    return _backend_for(backend, logits).sparse_c_model_posterior(*arrays)


def log_softmax(scores: np.ndarray, *, check_values: bool = True) -> np.ndarray:
    """Return the log of the softmax of each row, in plain array operations.

    Parameters
    ----------
    scores : (r, K) float32 or float64
        Complex numbers work too, for complex-step differentiation, and are not looked at.
    check_values : bool
        See the module's contract.

    Returns
    -------
    (r, K), same dtype

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype or shape, NaN, +inf or a row of -inf.

    Examples
    --------
    >>> import numpy as np
    >>> np.exp(log_softmax(np.log([[1.0, 3.0]]))).tolist()
    [[0.25, 0.75]]
    """
    checks.check_array("scores", scores, ("r", "K"))
    if scores.dtype.kind != "c":
        checks.check_floats("scores", scores, ("r", "K"))
    if check_values and scores.dtype.kind != "c":
        checks.check_rows_are_log_weights("scores", scores)
    # Of CuPy's arrays NumPy's functions call CuPy's.
    return get_backend("numpy").log_softmax(scores)


def counts_by_label(
    weights: np.ndarray,
    labels: np.ndarray,
    links: LinkIndex | None = None,
    *,
    check_values: bool = True,
) -> np.ndarray:
    """Return N_ij = sum_t w_ti 1{z_t=j}, summed in float64: (n, K), (n,) -> (K, K), or the links'.

    Parameters
    ----------
    weights : (n, K) float32 or float64
        w_ti, finite.
    labels : (n,) integer
        z_t, 0..K-1.
    links : LinkIndex, optional
        Counts only what a sparse model links: (K, l), in the order of the support.
    check_values : bool
        See the module's contract.

    Returns
    -------
    (K, K) or (K, l) float64

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype or shape, a label out of range, NaN or infinity.

    Examples
    --------
    >>> import numpy as np
    >>> counts_by_label(np.array([[0.75, 0.25], [0.5, 0.5]]), np.array([1, 1])).tolist()
    [[0.0, 1.25], [0.0, 0.75]]
    """
    checks.check_floats("weights", weights, ("n", "K"))
    if links is not None:
        checks.check_array("weights", weights, ("n", links.support.shape[0]))
        checks.check_same_home("links.support", links.support, "weights", weights)
    checks.check_array("labels", labels, weights.shape[:1])
    checks.check_same_home("labels", labels, "weights", weights)
    labels = _prepare_labels("labels", labels, weights, check_values)
    if check_values:
        checks.check_finite("weights", weights)
    backend = get_backend("cupy" if checks.is_on_gpu(weights) else "numpy")
    return backend.counts_by_label(_contiguous(weights), labels, links)


def thread_count() -> int:
    """Return how many threads the parallel kernels use."""
    return get_backend("numba").thread_count()


def limit_threads(n_threads: int) -> int:
    """Let the parallel kernels of this thread use at most so many threads; return their number.

    That is less than ``n_threads`` where Numba was started with fewer. Results do not change.
    Raises ValueError for less than one.
    """
    if n_threads < 1:
        raise ValueError(f"n_threads must be at least 1; found {n_threads}")
    return get_backend("numba").limit_threads(n_threads)
