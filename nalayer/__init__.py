"""Noise adaptation layers with hand-written gradients (Goldberger & Ben-Reuven, ICLR 2017)."""

from nalayer._neighbours import require_own_kernels

require_own_kernels()  # before the first import of kernels

from nalayer.gradient_check import check_gradient  # noqa: E402
from nalayer.label_noise import corrupt_labels, labels_hash, make_noise_matrix  # noqa: E402
from nalayer.models import PlainModel, SModel, SoftTargetModel  # noqa: E402
from nalayer.network import Network, mlp  # noqa: E402
from nalayer.noise_layer import (  # noqa: E402
    channel_logits_of,
    confusion_start,
    log_softmax,
    noise_matrix,
    noise_matrix_error,
    uniform_start,
)
from nalayer.optimisers import SGD, Adam  # noqa: E402
from nalayer.streams import stream  # noqa: E402
from nalayer.training import Training, train  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "Network",
    "PlainModel",
    "SModel",
    "SoftTargetModel",
    "Training",
    "channel_logits_of",
    "check_gradient",
    "confusion_start",
    "corrupt_labels",
    "labels_hash",
    "log_softmax",
    "make_noise_matrix",
    "mlp",
    "noise_matrix",
    "noise_matrix_error",
    "stream",
    "train",
    "uniform_start",
]
