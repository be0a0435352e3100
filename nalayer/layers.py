"""Layers with explicit forward and backward.

A layer holds its sizes and nothing else. ``forward`` takes the parameters and the input and
returns the output together with what ``backward`` will need; ``backward`` takes that back.
Inputs are batches, one sample a row. Complex inputs work too, for complex-step differentiation.

``buffers`` is where results are put: new memory unless a training loop hands in its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import kernels
from nalayer.buffers import FRESH, Buffers
from nalayer.recorded_steps import StepSeeds

Parameters = tuple[np.ndarray, ...]


class Layer(Protocol):
    """What a network needs to know of a layer."""

    @property
    def parameter_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parameters, in the order of the flat vector."""

    def initial(self, rng: np.random.Generator) -> Parameters:
        """Draw the parameters to start from, in float64."""

    def forward(
        self,
        parameters: Parameters,
        x: np.ndarray,
        rng: np.random.Generator | None,
        buffers: Buffers = FRESH,
    ) -> tuple[np.ndarray, Any]:
        """Return the output and the cache for ``backward``; ``rng`` None means evaluation."""

    def backward(
        self,
        parameters: Parameters,
        cache: Any,
        d_out: np.ndarray,
        d_parameters: Parameters | None = None,
        buffers: Buffers = FRESH,
        first: bool = False,
    ) -> tuple[np.ndarray | None, Parameters]:
        """Return the gradients with respect to the input and the parameters.

        The latter are written to ``d_parameters`` where given. A ``first`` layer has no use for the
        gradient of its input, the data: None.
        """


@dataclass(frozen=True)
class Dense:
    """Affine map ``x @ weight + bias``: weight (n_in, n_out), bias (n_out,).

    Starts from Glorot-uniform weights and zero biases (the paper's code, through Keras).
    """

    n_in: int
    n_out: int

    @property
    def parameter_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Weight and bias."""
        return (self.n_in, self.n_out), (self.n_out,)

    def initial(self, rng: np.random.Generator) -> Parameters:
        """Draw Glorot & Bengio's uniform weights; biases are zero."""
        limit = np.sqrt(6 / (self.n_in + self.n_out))
        return rng.uniform(-limit, limit, (self.n_in, self.n_out)), np.zeros(self.n_out)

    def forward(
        self,
        parameters: Parameters,
        x: np.ndarray,
        rng: np.random.Generator | None,
        buffers: Buffers = FRESH,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the output and, for ``backward``, the input."""
        weight, bias = parameters
        out = self._product(x, weight, buffers)
        out += bias
        return out, x

    def backward(
        self,
        parameters: Parameters,
        cache: np.ndarray,
        d_out: np.ndarray,
        d_parameters: Parameters | None = None,
        buffers: Buffers = FRESH,
        first: bool = False,
    ) -> tuple[np.ndarray | None, Parameters]:
        """Return d_x = d_out @ weight.T, d_weight = x.T @ d_out, d_bias = column sums of d_out."""
        weight, _ = parameters
        d_weight, d_bias = d_parameters or new_gradients(parameters, d_out)
        kernels.product(cache, d_out, d_weight, "TN", backend_for(None, cache, d_out))
        kernels.column_sums(d_out, d_bias, backend_for(None, d_out))
        return self._d_x(weight, d_out, buffers, first), (d_weight, d_bias)

    def _product(self, x: np.ndarray, weight: np.ndarray, buffers: Buffers) -> np.ndarray:
        dtype = np.result_type(x.dtype, weight.dtype)
        out = buffers.take("out", (x.shape[0], self.n_out), dtype, like=x)
        kernels.product(x, weight, out, backend=backend_for(None, x, weight))
        return out

    def _d_x(
        self, weight: np.ndarray, d_out: np.ndarray, buffers: Buffers, first: bool
    ) -> np.ndarray | None:
        if first:
            return None
        dtype = np.result_type(d_out.dtype, weight.dtype)
        d_x = buffers.take("d_x", (d_out.shape[0], self.n_in), dtype, like=d_out)
        kernels.product(d_out, weight, d_x, "NT", backend_for(None, d_out, weight))
        return d_x


@dataclass(frozen=True)
class Hidden(Dense):
    """A hidden layer: dropout(max(x @ weight + bias, 0)), what follows the product in one pass.

    The same as :class:`Dense`, :class:`ReLU` and :class:`Dropout` in sequence, and what
    :func:`~nalayer.network.mlp` builds. ``rate`` is the dropout's; without a generator there is
    none.
    """

    rate: float = 0.0
    backend: str | None = None

    def __post_init__(self) -> None:
        """Refuse a rate that leaves nothing."""
        check_rate(self.rate)

    def forward(
        self,
        parameters: Parameters,
        x: np.ndarray,
        rng: np.random.Generator | None,
        buffers: Buffers = FRESH,
    ) -> tuple[np.ndarray, Any]:
        """Return the output and, for ``backward``, the input, the output and the rate."""
        weight, bias = parameters
        out = self._product(x, weight, buffers)
        rate = 0.0 if rng is None else self.rate
        seed = new_seed(rng) if rng is not None and rate else 0
        kernels.bias_relu_dropout(out, bias, rate, seed, backend_for(self.backend, out))
        return out, (x, out, rate)

    def backward(
        self,
        parameters: Parameters,
        cache: Any,
        d_out: np.ndarray,
        d_parameters: Parameters | None = None,
        buffers: Buffers = FRESH,
        first: bool = False,
    ) -> tuple[np.ndarray | None, Parameters]:
        """Return d_x, and d_weight and d_bias; where the output is zero nothing comes through."""
        weight, _ = parameters
        x, out, rate = cache
        d_weight, d_bias = d_parameters or new_gradients(parameters, d_out)
        d_values = buffers.take("d_values", d_out.shape, d_out.dtype, like=d_out)
        kernels.bias_relu_dropout_backward(
            out, d_out, d_values, d_bias, rate, backend_for(self.backend, d_out)
        )
        kernels.product(x, d_values, d_weight, "TN", backend_for(None, x, d_values))
        return self._d_x(weight, d_values, buffers, first), (d_weight, d_bias)


@dataclass(frozen=True)
class ReLU:
    """max(x, 0), element by element; the derivative at 0 is taken as 0."""

    parameter_shapes: tuple[tuple[int, ...], ...] = ()

    def initial(self, rng: np.random.Generator) -> Parameters:
        """Return no parameters."""
        return ()

    def forward(
        self,
        parameters: Parameters,
        x: np.ndarray,
        rng: np.random.Generator | None,
        buffers: Buffers = FRESH,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the output and, for ``backward``, where the input was positive."""
        active = x.real > 0
        return np.where(active, x, x.dtype.type(0)), active

    def backward(
        self,
        parameters: Parameters,
        cache: np.ndarray,
        d_out: np.ndarray,
        d_parameters: Parameters | None = None,
        buffers: Buffers = FRESH,
        first: bool = False,
    ) -> tuple[np.ndarray, Parameters]:
        """Let the gradient through where the input was positive."""
        return np.where(cache, d_out, d_out.dtype.type(0)), ()


@dataclass(frozen=True)
class Dropout:
    """In training, zero each number with probability ``rate`` and divide the others by 1 - rate.

    In evaluation (``rng`` None) it does nothing.
    """

    rate: float
    parameter_shapes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """Refuse a rate that leaves nothing."""
        check_rate(self.rate)

    def initial(self, rng: np.random.Generator) -> Parameters:
        """Return no parameters."""
        return ()

    def forward(
        self,
        parameters: Parameters,
        x: np.ndarray,
        rng: np.random.Generator | None,
        buffers: Buffers = FRESH,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the output and, for ``backward``, the factor of every number (None: no factor)."""
        if rng is None or self.rate == 0:
            return x, None
        kept = kernels.dropout_kept(x.shape, self.rate, new_seed(rng), like=x)
        factor = kept.astype(x.real.dtype) / x.real.dtype.type(1 - self.rate)
        return x * factor, factor

    def backward(
        self,
        parameters: Parameters,
        cache: np.ndarray | None,
        d_out: np.ndarray,
        d_parameters: Parameters | None = None,
        buffers: Buffers = FRESH,
        first: bool = False,
    ) -> tuple[np.ndarray, Parameters]:
        """Multiply the gradient by the factors of the forward pass."""
        return (d_out if cache is None else d_out * cache), ()


def new_gradients(parameters: Parameters, d_out: np.ndarray) -> Parameters:
    """Return arrays for the gradients of a layer's parameters, with any content."""
    return tuple(np.empty(part.shape, d_out.dtype, like=d_out) for part in parameters)


def backend_for(backend: str | None, *arrays: np.ndarray) -> str | None:
    """Return the backend for these arrays; the complex step is the plain version's business."""
    for array in arrays:
        if array.dtype.kind == "c":
            return "numpy"
    return backend


def check_rate(rate: float) -> None:
    """Refuse a dropout rate that leaves nothing."""
    if not 0 <= rate < 1:
        raise ValueError(f"rate must lie in [0, 1); found {rate}")


def new_seed(rng: np.random.Generator | StepSeeds) -> Any:
    """Draw the seed of one layer's dropout for one batch."""
    return rng.seed() if isinstance(rng, StepSeeds) else int(rng.integers(2**63))
