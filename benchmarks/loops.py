"""The s-model in plain Python: the formulas of the paper, one number at a time."""

from __future__ import annotations

import math


def softmax(scores):
    """Return exp(s_i) / sum_j exp(s_j); the shift by the largest changes nothing but the range."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]


def s_model_nll(logits, channel_logits, noisy_labels):
    """Return the loss, its gradient by the logits and that by the channel logits, from lists."""
    n, k = len(logits), len(channel_logits)
    theta = [softmax(row) for row in channel_logits]  # Eq. 10
    counts = [[0.0] * k for _ in range(k)]
    d_logits, nll = [], 0.0
    for scores, z in zip(logits, noisy_labels, strict=True):
        q = softmax(scores)  # Eq. 7
        joint = [q[i] * theta[i][z] for i in range(k)]
        m = sum(joint)  # Eq. 11
        nll -= math.log(m) / n
        c = [p / m for p in joint]  # Eq. 3
        d_logits.append([(q[i] - c[i]) / n for i in range(k)])
        for i in range(k):
            counts[i][z] += c[i]
    d_channel_logits = []
    for i in range(k):
        n_i = sum(counts[i])
        d_channel_logits.append([(n_i * theta[i][j] - counts[i][j]) / n for j in range(k)])
    return nll, d_logits, d_channel_logits
