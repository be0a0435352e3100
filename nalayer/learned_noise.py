"""What noise a trained model believes in, as one noise matrix."""

from __future__ import annotations

import numpy as np

from kernels import log_softmax
from nalayer.buffers import Buffers, slices
from nalayer.losses import LinearChannelModel, OneParameterModel
from nalayer.models import CModel, NoiseModel
from nalayer.noise_layer import noise_matrix
from nalayer.support import scatter_links


def learned_noise_matrix(model: NoiseModel, parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
    r"""Return p(z=j | y=i) as the model has it: (K, K) float64, rows are the true class.

    A c-model has one noise matrix for each sample. What is returned is their mean, each row
    weighted by how probable its class is:

    .. math:: \theta_{ij} = \sum_t q_{ti}\, \theta_{t,ij} \Big/ \sum_t q_{ti}

    Parameters
    ----------
    model : SModel, CModel, OneParameterModel or LinearChannelModel
        Dense or sparse.
    parameters : (n_parameters,)
    x : (n, n_in)
        What a c-model is averaged over; at most n x K numbers are held at once, not n x K x K.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.
    FloatingPointError
        If what the network makes of them leaves the range of their dtype.
    """
    model.check_parameters(parameters)
    weights, *channel = model.unpack(parameters)
    if isinstance(model, OneParameterModel | LinearChannelModel):
        theta = model.noise_matrix([values.astype(np.float64) for values in channel])
        return theta / theta.sum(axis=1, keepdims=True)  # which float32 rounded
    if isinstance(model, CModel):
        model.network.check_features(x, parameters.dtype)
        theta = _mean_rows(model, weights, channel, x)
    else:
        theta = noise_matrix(channel[0].astype(np.float64))
    return theta if model.links is None else scatter_links(theta, model.links, missing=0.0)


def _mean_rows(
    model: CModel, weights: np.ndarray, channel: list[np.ndarray], x: np.ndarray
) -> np.ndarray:
    """Return the weighted mean over samples of the c-model's rows: (K, l)."""
    channel_weights, channel_logits = channel
    total_ij = np.zeros(channel_logits.shape, like=x)
    total_i = np.zeros(len(channel_logits), like=x)
    # Weights are relative to the largest so far: a class that all samples speak against counts too.
    top_i = np.full_like(total_i, -np.inf)
    buffers = Buffers()
    for part in slices(len(x)):
        (logits, hidden), _ = model.forward(weights, x[part], buffers=buffers)
        log_q_ti = log_softmax(logits.astype(np.float64), check_values=False)
        new_top_i = np.maximum(top_i, log_q_ti.max(axis=0))
        fade_i, q_ti = np.exp(top_i - new_top_i), np.exp(log_q_ti - new_top_i)
        total_i = total_i * fade_i + q_ti.sum(axis=0)
        total_ij *= fade_i[:, None]
        for i, (u_i, b_i) in enumerate(zip(channel_weights, channel_logits, strict=True)):
            scores_tj = (hidden @ u_i.T + b_i).astype(np.float64)
            total_ij[i] += q_ti[:, i] @ np.exp(log_softmax(scores_tj, check_values=False))
        top_i = new_top_i
    theta = total_ij / total_i[:, None]
    if not np.isfinite(theta).all():
        raise FloatingPointError(
            f"the noise matrix is not finite: parameters and x leave the range of {x.dtype}"
        )
    return theta
