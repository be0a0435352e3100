"""The kernels in plain NumPy: the version to read beside the paper.

Index letters in the names give the shapes: ``t`` sample, ``i`` true class, ``j`` observed
class. Everything stays in the log domain, so nothing needs an epsilon.
"""

from __future__ import annotations

import numpy as np

from kernels.links import LinkIndex, links_of_samples
from kernels.results import CModelNLL, Posterior, SkippingCModelNLL, SModelNLL, SoftmaxNLL


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Return the log of the softmax of each row: (r, K) -> (r, K)."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _log_sum_exp(scores: np.ndarray) -> np.ndarray:
    """Return log sum_i exp(s_i) of each row: (r, K) -> (r,); a row of -inf gives -inf."""
    top = scores.max(axis=1)
    shift = np.where(top > -np.inf, top, 0)
    with np.errstate(divide="ignore"):
        return shift + np.log(np.exp(scores - shift[:, None]).sum(axis=1))


def _log_posterior(
    log_q_ti: np.ndarray, log_theta_z_ti: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return log m_t (Eqs. 1, 9, 11) and log c_ti (Eq. 3); both from one reduction.

    ``log_theta_z_ti`` is log theta_i,z_t: only column z_t of theta is needed, so it is a gather,
    not a product with theta.
    """
    log_joint_ti = log_q_ti + log_theta_z_ti
    log_m_t = _log_sum_exp(log_joint_ti)
    with np.errstate(invalid="ignore"):  # an unreachable label has no posterior: NaN
        return log_m_t, log_joint_ti - log_m_t[:, None]


def counts_by_label(
    weights_ti: np.ndarray, labels: np.ndarray, index: LinkIndex | None = None
) -> np.ndarray:
    """See :func:`kernels.counts_by_label`."""
    if index is not None:
        k, n_kept = index.support.shape
        sample_p, link_p = links_of_samples(index, labels)
        weights_p = weights_ti[sample_p, link_p // n_kept]
        return np.bincount(link_p, weights=weights_p, minlength=k * n_kept).reshape(k, n_kept)
    k = weights_ti.shape[1]
    counts_ji = np.zeros((k, k))
    np.add.at(counts_ji, labels, weights_ti)
    return counts_ji.T


def _mean(values_t: np.ndarray) -> np.floating:
    """Average in float64, round once to the dtype that came in."""
    return values_t.dtype.type(values_t.mean(dtype=np.float64))


def softmax_nll(logits: np.ndarray, labels: np.ndarray) -> SoftmaxNLL:
    """See :func:`kernels.softmax_nll`."""
    n = logits.shape[0]
    samples = np.arange(n)
    log_q_ti = log_softmax(logits)
    d_logits = np.exp(log_q_ti)
    d_logits[samples, labels] -= 1
    d_logits /= n
    return SoftmaxNLL(_mean(-log_q_ti[samples, labels]), d_logits)


def soft_target_nll(logits: np.ndarray, targets: np.ndarray) -> SoftmaxNLL:
    """See :func:`kernels.soft_target_nll`."""
    log_q_ti = log_softmax(logits)
    with np.errstate(invalid="ignore"):  # 0 * -inf, replaced by 0 log 0 = 0
        terms_ti = np.where(targets > 0, targets * log_q_ti, 0)
    return SoftmaxNLL(_mean(-terms_ti.sum(axis=1)), (np.exp(log_q_ti) - targets) / logits.shape[0])


def s_model_nll(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> SModelNLL:
    """See :func:`kernels.s_model_nll`."""
    n = logits.shape[0]
    log_q_ti = log_softmax(logits)  # Eq. 7
    log_theta_ij = log_softmax(channel_logits)  # Eq. 10
    log_m_t, log_c_ti = _log_posterior(log_q_ti, log_theta_ij.T[noisy_labels])
    c_ti = np.exp(log_c_ti)

    counts_ij = counts_by_label(c_ti, noisy_labels)
    n_i = counts_ij.sum(axis=1, keepdims=True)

    d_logits = (np.exp(log_q_ti) - c_ti) / n
    d_channel_logits = (n_i * np.exp(log_theta_ij) - counts_ij) / n
    return SModelNLL(_mean(-log_m_t), d_logits, d_channel_logits.astype(logits.dtype))


def s_model_posterior(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> Posterior:
    """See :func:`kernels.s_model_posterior`."""
    log_theta_ij = log_softmax(channel_logits)
    log_m_t, log_c_ti = _log_posterior(log_softmax(logits), log_theta_ij.T[noisy_labels])
    return Posterior(log_m_t, np.exp(log_c_ti))


def _sparse_log_theta_z(
    channel_logits: np.ndarray, index: LinkIndex, noisy_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return log theta_is of the links, log theta_i,z_t (-inf where no link), and the pairs."""
    k, n_kept = channel_logits.shape
    log_theta_is = log_softmax(channel_logits)
    sample_p, link_p = links_of_samples(index, noisy_labels)
    log_theta_z_ti = np.full((noisy_labels.size, k), -np.inf, dtype=channel_logits.dtype)
    log_theta_z_ti[sample_p, link_p // n_kept] = log_theta_is.ravel()[link_p]
    return log_theta_is, log_theta_z_ti, sample_p, link_p


def sparse_s_model_nll(
    logits: np.ndarray, channel_logits: np.ndarray, index: LinkIndex, noisy_labels: np.ndarray
) -> SModelNLL:
    """See :func:`kernels.sparse_s_model_nll`."""
    n = logits.shape[0]
    log_q_ti = log_softmax(logits)  # Eq. 7
    log_theta_is, log_theta_z_ti, sample_p, link_p = _sparse_log_theta_z(
        channel_logits, index, noisy_labels
    )
    log_m_t, log_c_ti = _log_posterior(log_q_ti, log_theta_z_ti)
    c_ti = np.exp(log_c_ti)

    counts_is = np.zeros(channel_logits.shape)
    np.add.at(counts_is.ravel(), link_p, c_ti[sample_p, link_p // channel_logits.shape[1]])
    n_i = counts_is.sum(axis=1, keepdims=True)

    d_logits = (np.exp(log_q_ti) - c_ti) / n
    d_channel_logits = (n_i * np.exp(log_theta_is) - counts_is) / n
    return SModelNLL(_mean(-log_m_t), d_logits, d_channel_logits.astype(logits.dtype))


def sparse_s_model_posterior(
    logits: np.ndarray, channel_logits: np.ndarray, index: LinkIndex, noisy_labels: np.ndarray
) -> Posterior:
    """See :func:`kernels.sparse_s_model_posterior`."""
    _, log_theta_z_ti, _, _ = _sparse_log_theta_z(channel_logits, index, noisy_labels)
    log_m_t, log_c_ti = _log_posterior(log_softmax(logits), log_theta_z_ti)
    return Posterior(log_m_t, np.exp(log_c_ti))


# For every true class: the samples that it can have produced, and which of its links leads to z_t.
SamplesOfClass = list[tuple[np.ndarray, np.ndarray]]


def _samples_of_class(k: int, noisy_labels: np.ndarray, index: LinkIndex | None) -> SamplesOfClass:
    """Return all samples for every class, or where links are given those whose label is linked."""
    if index is None:
        return [(np.arange(noisy_labels.size), noisy_labels)] * k
    sample_p, link_p = links_of_samples(index, noisy_labels)
    class_p, place_p = np.divmod(link_p, index.support.shape[1])
    by_class = np.argsort(class_p, kind="stable")
    cuts = np.cumsum(np.bincount(class_p, minlength=k))[:-1]
    return list(
        zip(np.split(sample_p[by_class], cuts), np.split(place_p[by_class], cuts), strict=True)
    )


def _c_log_theta(hidden: np.ndarray, u_jd: np.ndarray, b_j: np.ndarray) -> np.ndarray:
    """Return log theta_t,i of one true class i for every sample (Eq. 8): (n, d) -> (n, K)."""
    return log_softmax(hidden @ u_jd.T + b_j)


def _c_posterior(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    samples_of_class: SamplesOfClass,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return log q_ti, log m_t and log c_ti, one true class at a time."""
    log_q_ti = log_softmax(logits)  # Eq. 7
    log_theta_z_ti = np.full_like(logits, -np.inf)
    for i, (t, z_link) in enumerate(samples_of_class):
        log_theta_tj = _c_log_theta(hidden[t], channel_weights[i], channel_logits[i])
        log_theta_z_ti[t, i] = log_theta_tj[np.arange(t.size), z_link]
    return log_q_ti, *_log_posterior(log_q_ti, log_theta_z_ti)


def c_model_nll(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    index: LinkIndex | None = None,
) -> CModelNLL:
    """See :func:`kernels.c_model_nll`; with ``index`` :func:`kernels.sparse_c_model_nll`."""
    arrays = (logits, hidden, channel_weights, channel_logits, noisy_labels)
    return CModelNLL(*_c_model(*arrays, index, 0.0)[:5])


def c_model_nll_skipping(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    skip_below: float,
) -> SkippingCModelNLL:
    """See :func:`kernels.c_model_nll_skipping`."""
    arrays = (logits, hidden, channel_weights, channel_logits, noisy_labels)
    return SkippingCModelNLL(*_c_model(*arrays, None, skip_below))


def _c_model(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    index: LinkIndex | None,
    skip_below: float,
) -> tuple:
    n, k = logits.shape
    samples_of_class = _samples_of_class(k, noisy_labels, index)
    log_q_ti, log_m_t, log_c_ti = _c_posterior(
        logits, hidden, channel_weights, channel_logits, samples_of_class
    )
    c_ti = np.exp(log_c_ti)

    d_hidden = np.zeros(hidden.shape)
    d_channel_weights = np.empty_like(channel_weights)
    d_channel_logits = np.empty_like(channel_logits)
    missing_i = np.zeros(k)
    for i, (t, z_link) in enumerate(samples_of_class):
        skipped = c_ti[t, i] < skip_below
        # |theta_j - 1{j=z}| sums to at most 2 over j
        missing_i[i] = 2 * c_ti[t[skipped], i].sum(dtype=np.float64) / n
        t, z_link = t[~skipped], z_link[~skipped]
        # theta once more: keeping it for all classes would take n x K x K.
        theta_tj = np.exp(_c_log_theta(hidden[t], channel_weights[i], channel_logits[i]))
        theta_tj[np.arange(t.size), z_link] -= 1
        d_score_tj = c_ti[t, i, None] * theta_tj / n
        d_channel_logits[i] = d_score_tj.sum(axis=0, dtype=np.float64)
        d_channel_weights[i] = d_score_tj.T @ hidden[t]
        d_hidden[t] += d_score_tj @ channel_weights[i]
    return (
        _mean(-log_m_t),
        (np.exp(log_q_ti) - c_ti) / n,
        d_hidden.astype(hidden.dtype),
        d_channel_weights,
        d_channel_logits,
        missing_i,
    )


def c_model_posterior(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    index: LinkIndex | None = None,
) -> Posterior:
    """See :func:`kernels.c_model_posterior`; with ``index`` the sparse one."""
    samples_of_class = _samples_of_class(logits.shape[1], noisy_labels, index)
    _, log_m_t, log_c_ti = _c_posterior(
        logits, hidden, channel_weights, channel_logits, samples_of_class
    )
    return Posterior(log_m_t, np.exp(log_c_ti))


def sparse_c_model_nll(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    index: LinkIndex,
    noisy_labels: np.ndarray,
) -> CModelNLL:
    """See :func:`kernels.sparse_c_model_nll`."""
    return c_model_nll(logits, hidden, channel_weights, channel_logits, noisy_labels, index)


def sparse_c_model_posterior(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    index: LinkIndex,
    noisy_labels: np.ndarray,
) -> Posterior:
    """See :func:`kernels.sparse_c_model_posterior`."""
    return c_model_posterior(logits, hidden, channel_weights, channel_logits, noisy_labels, index)


def dropout_kept(shape: tuple[int, int], keys: tuple[int, int, int]) -> np.ndarray:
    """See :func:`kernels.dropout_kept`."""
    key_1, key_2, least = (np.uint32(key) for key in keys)
    place = np.arange(shape[0] * shape[1]).astype(np.uint32)
    return (_mixed(_mixed(place ^ key_1) ^ key_2) >= least).reshape(shape)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Return the bits of each uint32 well mixed (Wellons' hash lowbias32, a bijection)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def bias_relu_dropout(
    values: np.ndarray, bias: np.ndarray, rate: float, keys: tuple[int, int, int]
) -> None:
    """See :func:`kernels.bias_relu_dropout`; complex numbers count by their real parts."""
    values += bias
    values[~(values.real > 0)] = 0
    if rate:
        values *= dropout_kept(values.shape, keys) / values.real.dtype.type(1 - rate)


def bias_relu_dropout_backward(
    out: np.ndarray, d_out: np.ndarray, rate: float, d_values: np.ndarray, d_bias: np.ndarray
) -> None:
    """See :func:`kernels.bias_relu_dropout_backward`."""
    np.multiply(d_out, (out.real > 0) / out.real.dtype.type(1 - rate), out=d_values)
    column_sums(d_values, d_bias)


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray, transpose: str) -> None:
    """See :func:`kernels.product`: BLAS does it."""
    left = a.T if transpose[0] == "T" else a
    left.dot(b.T if transpose[1] == "T" else b, out=out)


def column_sums(values: np.ndarray, out: np.ndarray) -> None:
    """See :func:`kernels.column_sums`."""
    out[...] = values.sum(axis=0, dtype=np.result_type(values.dtype, np.float64))


def gather_rows(values: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """See :func:`kernels.gather_rows`."""
    # "clip" also spares NumPy a copy that it makes to leave out alone in case of an error
    np.take(values, rows, axis=0, out=out, mode="clip")


def adam_update(
    parameters: np.ndarray,
    gradient: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    factors: np.ndarray,
    settings: tuple[float, ...],
) -> None:
    """See :func:`kernels.adam_update`."""
    keep_1, keep_2, step, correct_1, correct_2, epsilon = settings
    mean += keep_1 * (gradient - mean)
    square += keep_2 * (gradient * gradient - square)
    parameters -= step * factors * (mean * correct_1) / (np.sqrt(square * correct_2) + epsilon)


# Images whose patches are laid out side by side at a time: they should stay in the cache.
_IMAGES = 8


def _padded(images: np.ndarray, padding: int) -> np.ndarray:
    return np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _patches(images: np.ndarray, size: int) -> np.ndarray:
    """Return every size x size patch as a row: (n * Ho * Wo, size * size * C)."""
    windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
    # (n, Ho, Wo, C, size, size): the channels go last, as in the weights
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, size * size * images.shape[3])


def conv2d(images: np.ndarray, weight: np.ndarray, padding: int) -> np.ndarray:
    """See :func:`kernels.conv2d`: one matrix product of patches and filters."""
    size, _, _, n_filters = weight.shape
    padded, filters = _padded(images, padding), weight.reshape(-1, n_filters)
    n, height, width = len(images), padded.shape[1] - size + 1, padded.shape[2] - size + 1
    out = np.empty((n, height, width, n_filters), np.result_type(images, weight))
    for t in range(0, n, _IMAGES):
        some = out[t : t + _IMAGES]
        np.matmul(_patches(padded[t : t + _IMAGES], size), filters, out=some.reshape(-1, n_filters))
    return out


def conv2d_backward(
    images: np.ndarray, weight: np.ndarray, d_out: np.ndarray, padding: int, with_images: bool
) -> tuple[np.ndarray | None, np.ndarray]:
    """See :func:`kernels.conv2d_backward`: a product for each, and patches added where they lay."""
    size, _, n_channels, n_filters = weight.shape
    padded, filters = _padded(images, padding), weight.reshape(-1, n_filters)
    n, height, width, _ = d_out.shape
    d_padded = np.zeros(padded.shape, np.result_type(weight, d_out))
    d_filters = np.zeros(filters.shape, np.result_type(images, d_out))
    for t in range(0, n, _IMAGES):
        some = slice(t, t + _IMAGES)
        d_rows = d_out[some].reshape(-1, n_filters)
        d_filters += _patches(padded[some], size).T @ d_rows
        if not with_images:
            continue
        d_patches = (d_rows @ filters.T).reshape(-1, height, width, size, size, n_channels)
        for a in range(size):
            for b in range(size):
                d_padded[some, a : a + height, b : b + width] += d_patches[:, :, :, a, b]
    d_weight = d_filters.reshape(weight.shape)
    if not with_images:
        return None, d_weight
    rows, columns = images.shape[1:3]
    d_images = d_padded[:, padding : padding + rows, padding : padding + columns]
    return d_images, d_weight


def max_pool2d(images: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """See :func:`kernels.max_pool2d`."""
    n, rows, columns, n_channels = images.shape
    height, width = rows // size, columns // size
    windows = images[:, : height * size, : width * size]
    windows = windows.reshape(n, height, size, width, size, n_channels)
    windows = windows.transpose(0, 1, 3, 5, 2, 4).reshape(n, height, width, n_channels, size**2)
    place = windows.real.argmax(axis=-1)
    out = np.take_along_axis(windows, place[..., None], axis=-1)[..., 0]
    return out, place.astype(np.uint8)


def max_pool2d_backward(
    place: np.ndarray, d_out: np.ndarray, size: int, shape: tuple[int, ...]
) -> np.ndarray:
    """See :func:`kernels.max_pool2d_backward`."""
    d_images = np.zeros(shape, d_out.dtype)
    t, y, x, c = np.ogrid[tuple(slice(length) for length in d_out.shape)]
    d_images[t, y * size + place // size, x * size + place % size, c] = d_out
    return d_images


def conv2d_relu(
    images: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    padding: int,
    pool: int,
    rate: float,
    keys: tuple[int, int, int],
    out: np.ndarray,
    place: np.ndarray | None,
) -> None:
    """See :func:`kernels.conv2d_relu`: one after the other."""
    values = conv2d(images, weight, padding) + bias
    values[~(values.real > 0)] = 0
    if place is not None:
        values, place[...] = max_pool2d(values, pool)
    if rate:
        kept = dropout_kept((len(values), values[0].size), keys).reshape(values.shape)
        values *= kept / values.real.dtype.type(1 - rate)
    out[...] = values


def conv2d_relu_backward(
    images: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    place: np.ndarray | None,
    d_out: np.ndarray,
    padding: int,
    pool: int,
    rate: float,
    d_images: np.ndarray | None,
    d_weight: np.ndarray,
    d_bias: np.ndarray,
) -> None:
    """See :func:`kernels.conv2d_relu_backward`."""
    d_values = d_out * ((out.real > 0) / out.real.dtype.type(1 - rate))
    if place is not None:
        lost = len(weight) - 1 - 2 * padding
        n, rows, columns, _ = images.shape
        shape = (n, rows - lost, columns - lost, weight.shape[3])
        d_values = max_pool2d_backward(place, d_values, pool, shape)
    found, d_weight[...] = conv2d_backward(images, weight, d_values, padding, d_images is not None)
    if d_images is not None:
        d_images[...] = found
    d_bias[...] = d_values.sum(axis=(0, 1, 2), dtype=np.result_type(d_values, np.float64))
