"""Noise adaptation layers with hand-written gradients (Goldberger & Ben-Reuven, ICLR 2017)."""

from typing import TYPE_CHECKING, Any

from nalayer._neighbours import require_own_kernels

require_own_kernels()  # before the first import of kernels

from nalayer.buffers import slices  # noqa: E402
from nalayer.gradient_check import check_gradient  # noqa: E402
from nalayer.image_layers import cnn  # noqa: E402
from nalayer.label_noise import corrupt_labels, labels_hash, make_noise_matrix  # noqa: E402
from nalayer.models import (  # noqa: E402
    CModel,
    NoiseModel,
    PlainModel,
    SModel,
    SoftTargetModel,
    c_start,
    sparse_start,
)
from nalayer.network import Network, mlp  # noqa: E402
from nalayer.noise_layer import (  # noqa: E402
    best_relabelling,
    channel_logits_of,
    clustered_start,
    confusion_start,
    from_cleanlab,
    log_softmax,
    noise_matrix,
    noise_matrix_error,
    to_cleanlab,
    uniform_start,
)
from nalayer.optimisers import SGD, Adam  # noqa: E402
from nalayer.sparse_confusion import confusion_counts, sparse_confusion_start  # noqa: E402
from nalayer.streams import stream  # noqa: E402
from nalayer.support import gather_links, scatter_links, top_support  # noqa: E402
from nalayer.training import Training, train  # noqa: E402

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nalayer.estimator import NoiseAdaptationClassifier

__all__ = [
    "SGD",
    "Adam",
    "CModel",
    "Network",
    "NoiseAdaptationClassifier",
    "NoiseModel",
    "PlainModel",
    "SModel",
    "SoftTargetModel",
    "Training",
    "best_relabelling",
    "c_start",
    "channel_logits_of",
    "check_gradient",
    "clustered_start",
    "cnn",
    "confusion_counts",
    "confusion_start",
    "corrupt_labels",
    "from_cleanlab",
    "gather_links",
    "labels_hash",
    "log_softmax",
    "make_noise_matrix",
    "mlp",
    "noise_matrix",
    "noise_matrix_error",
    "scatter_links",
    "slices",
    "sparse_confusion_start",
    "sparse_start",
    "stream",
    "to_cleanlab",
    "top_support",
    "train",
    "uniform_start",
]


def __getattr__(name: str) -> Any:
    # Importing scikit-learn takes longer than all the rest, and only the estimator needs it.
    if name == "NoiseAdaptationClassifier":
        from nalayer.estimator import NoiseAdaptationClassifier

        return NoiseAdaptationClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
