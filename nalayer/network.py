"""A sequential network whose parameters are one flat vector.

The network object holds the layers' sizes; the weights are handed in. So checking the gradient
of a whole net, running L-BFGS on it or saving it needs nothing more than a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from kernels import checks
from nalayer.buffers import FRESH, Buffers, slice_size, slices
from nalayer.layers import Dense, Hidden, Layer, Parameters
from nalayer.thread_pools import one_blas_thread


@dataclass(frozen=True)
class Network:
    """Layers in sequence, from features (n, n_in) to logits (n, K).

    Parameters
    ----------
    layers : sequence of Layer
        The last one is a :class:`~nalayer.layers.Dense`; its input is the paper's h(x) and its
        parameters are u_i and b_i of Eq. 7.
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        """Refuse a network that does not end in the classifier's affine map."""
        if not self.layers or type(self.layers[-1]) is not Dense:
            raise ValueError("layers must end in a Dense layer, which yields the logits")

    @property
    def n_in(self) -> int:
        """Number of features: what the first layer that has a size of its own takes."""
        return next(layer.n_in for layer in self.layers if hasattr(layer, "n_in"))

    @property
    def n_classes(self) -> int:
        """K, the number of logits."""
        return self.layers[-1].n_out  # type: ignore[attr-defined]

    @property
    def n_weights(self) -> int:
        """Length of the flat vector."""
        return sum(prod(shape) for layer in self.layers for shape in layer.parameter_shapes)

    def initial_weights(self, rng: np.random.Generator, dtype: Any = np.float64) -> np.ndarray:
        """Draw the weights to start from: (n_weights,)."""
        parts = [part.ravel() for layer in self.layers for part in layer.initial(rng)]
        return np.concatenate(parts).astype(dtype)

    def unpack(self, weights: np.ndarray) -> Iterator[Parameters]:
        """Yield each layer's parameters as views into the flat vector."""
        start = 0
        for layer in self.layers:
            views = []
            for shape in layer.parameter_shapes:
                stop = start + prod(shape)
                views.append(weights[start:stop].reshape(shape))
                start = stop
            yield tuple(views)

    def _unpacked(self, weights: np.ndarray) -> list[Parameters]:
        return list(self.unpack(weights))

    def forward(
        self,
        weights: np.ndarray,
        x: np.ndarray,
        rng: np.random.Generator | None = None,
        buffers: Buffers = FRESH,
    ) -> tuple[np.ndarray, list[Any]]:
        """Return the logits (n, K) and what :meth:`backward` needs.

        Parameters
        ----------
        weights : (n_weights,)
        x : (n, n_in)
        rng : Generator, optional
            Seeds the dropout of each layer; None evaluates without dropout.
        buffers : Buffers, optional
            Where the results are put; new memory by default.
        """
        caches = []
        # The kernels take contiguous arrays; of these nothing is copied.
        weights, x = _contiguous(weights), _contiguous(x)
        parameters = buffers.views("weights", weights, self._unpacked)
        with one_blas_thread(not checks.is_on_gpu(x) and self._has_parallel_layers):
            for index, layer in enumerate(self.layers):
                x, cache = layer.forward(parameters[index], x, rng, buffers.part(index))
                caches.append(cache)
        return x, caches

    @property
    def _has_parallel_layers(self) -> bool:
        """Whether layers keep the threads of compiled kernels busy, between which BLAS is called.

        A second BLAS thread then made a step of :func:`~nalayer.cnn` a quarter slower, or more.
        """
        return any(getattr(layer, "is_parallel", False) for layer in self.layers)

    @property
    def n_hidden(self) -> int:
        """d, the width of the last hidden layer."""
        return self.layers[-1].n_in  # type: ignore[attr-defined]

    def hidden(self, caches: Sequence[Any]) -> np.ndarray:
        """Return h(x), (n, d), which the logits are made of, out of what :meth:`forward` kept."""
        return caches[-1]

    def backward(
        self,
        weights: np.ndarray,
        caches: Sequence[Any],
        d_logits: np.ndarray,
        d_hidden: np.ndarray | None = None,
        out: np.ndarray | None = None,
        buffers: Buffers = FRESH,
    ) -> np.ndarray:
        """Return the gradient with respect to the flat weights, given that of the logits.

        ``d_hidden`` (n, d) is what else reaches h(x): a c-model's noise layer reads it too. The
        gradient is written to ``out`` (n_weights,) where given.
        """
        if out is None:
            out = np.empty(weights.shape, d_logits.dtype, like=d_logits)
        parameters = buffers.views("weights", weights, self._unpacked)
        d_parameters = buffers.views("d_weights", out, self._unpacked)
        d_out: Any = d_logits
        with one_blas_thread(not checks.is_on_gpu(d_logits) and self._has_parallel_layers):
            for index in reversed(range(len(self.layers))):
                d_out, _ = self.layers[index].backward(
                    parameters[index],
                    caches[index],
                    d_out,
                    d_parameters[index],
                    buffers.part(index),
                    first=index == 0,
                )
                if d_hidden is not None and index == len(self.layers) - 1 and index > 0:
                    d_out += d_hidden
        return out

    def logits(self, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the logits without dropout: (n, K).

        Computed slice by slice: the layers' outputs take memory for one slice only.
        """
        buffers = Buffers()
        shape, dtype = (x.shape[0], self.n_classes), np.result_type(weights.dtype, x.dtype)
        logits = np.empty(shape, dtype, like=x)
        for part in slices(x.shape[0], slice_size(x)):
            logits[part] = self.forward(weights, x[part], buffers=buffers)[0]
        return logits

    def check_features(self, x: np.ndarray, dtype: Any) -> None:
        """Refuse features of another shape or dtype, NaN or infinity, and no samples at all."""
        checks.check_floats("x", x, ("n", self.n_in), dtype)
        if x.shape[0] < 1:
            raise ValueError(f"x must hold at least one sample; found shape {x.shape}")
        checks.check_finite("x", x)

    def predict(self, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return arg max_i q_ti: (n,). The paper's test phase, the noise layer dropped.

        Raises TypeError or ValueError for weights or features that do not fit.
        """
        checks.check_floats("weights", weights, (self.n_weights,))
        self.check_features(x, weights.dtype)
        return self.logits(weights, x).argmax(axis=1)


def _contiguous(array: np.ndarray) -> np.ndarray:
    return array if array.flags.c_contiguous else array.copy()


def mlp(
    n_in: int,
    hidden_sizes: Sequence[int],
    n_classes: int,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Network:
    """Return a multi-layer perceptron: a Hidden layer for each hidden size, then Dense.

    Parameters
    ----------
    n_in, n_classes : int
    hidden_sizes : sequence of int
        Empty gives softmax regression. The paper's network is ``mlp(784, (500, 300), 10, 0.5)``.
    dropout : float
        Rate after each hidden layer.
    backend : {"numpy", "numba"}, optional
        Of bias, ReLU and dropout.

    Examples
    --------
    >>> mlp(784, (500, 300), 10, dropout=0.5).n_weights
    545810
    """
    checks.check_n_classes(n_classes)
    layers: list[Layer] = []
    for size_in, size_out in pairwise((n_in, *hidden_sizes)):
        layers.append(Hidden(size_in, size_out, dropout, backend))
    layers.append(Dense((n_in, *hidden_sizes)[-1], n_classes))
    return Network(tuple(layers))
