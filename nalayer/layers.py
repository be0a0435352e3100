"""Layers with explicit forward and backward.

A layer holds its sizes and nothing else. ``forward`` takes the parameters and the input and
returns the output together with what ``backward`` will need; ``backward`` takes that back.
Inputs are batches, one sample a row. Complex inputs work too, for complex-step differentiation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Parameters = tuple[np.ndarray, ...]


class Layer(Protocol):
    """What a network needs to know of a layer."""

    @property
    def parameter_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parameters, in the order of the flat vector."""

    def initial(self, rng: np.random.Generator) -> Parameters:
        """Draw the parameters to start from, in float64."""

    def forward(
        self, parameters: Parameters, x: np.ndarray, rng: np.random.Generator | None
    ) -> tuple[np.ndarray, Any]:
        """Return the output and the cache for ``backward``; ``rng`` None means evaluation."""

    def backward(
        self, parameters: Parameters, cache: Any, d_out: np.ndarray
    ) -> tuple[np.ndarray, Parameters]:
        """Return the gradients with respect to the input and the parameters."""


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
        self, parameters: Parameters, x: np.ndarray, rng: np.random.Generator | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the output and, for ``backward``, the input."""
        weight, bias = parameters
        return x @ weight + bias, x

    def backward(
        self, parameters: Parameters, cache: np.ndarray, d_out: np.ndarray
    ) -> tuple[np.ndarray, Parameters]:
        """Return d_x = d_out @ weight.T, d_weight = x.T @ d_out, d_bias = column sums of d_out."""
        weight, _ = parameters
        x = cache
        return d_out @ weight.T, (x.T @ d_out, d_out.sum(axis=0))


@dataclass(frozen=True)
class ReLU:
    """max(x, 0), element by element; the derivative at 0 is taken as 0."""

    parameter_shapes: tuple[tuple[int, ...], ...] = ()

    def initial(self, rng: np.random.Generator) -> Parameters:
        """Return no parameters."""
        return ()

    def forward(
        self, parameters: Parameters, x: np.ndarray, rng: np.random.Generator | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the output and, for ``backward``, where the input was positive."""
        active = x.real > 0
        return np.where(active, x, x.dtype.type(0)), active

    def backward(
        self, parameters: Parameters, cache: np.ndarray, d_out: np.ndarray
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
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must lie in [0, 1); found {self.rate}")

    def initial(self, rng: np.random.Generator) -> Parameters:
        """Return no parameters."""
        return ()

    def forward(
        self, parameters: Parameters, x: np.ndarray, rng: np.random.Generator | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the output and, for ``backward``, the factor of every number (None: no factor)."""
        if rng is None or self.rate == 0:
            return x, None
        kept = rng.random(x.shape, dtype=np.float32) >= self.rate
        factor = kept.astype(x.real.dtype) / x.real.dtype.type(1 - self.rate)
        return x * factor, factor

    def backward(
        self, parameters: Parameters, cache: np.ndarray | None, d_out: np.ndarray
    ) -> tuple[np.ndarray, Parameters]:
        """Multiply the gradient by the factors of the forward pass."""
        return (d_out if cache is None else d_out * cache), ()
