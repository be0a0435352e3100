"""Layers for images: convolution and max-pooling, and the CNN of the paper's authors.

Between layers an image is a row of rows * columns * channels numbers in that order, so a network
of these layers is used like any other, and flattening takes no layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import kernels
from kernels import checks
from nalayer.buffers import FRESH, Buffers
from nalayer.layers import (
    Dense,
    Hidden,
    Layer,
    Parameters,
    backend_for,
    check_rate,
    new_gradients,
    new_seed,
)
from nalayer.network import Network

ImageShape = tuple[int, int, int]
"""rows, columns, channels"""
PADDINGS = ("valid", "same")


def _check_image_shape(shape: Any) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"image_shape must be rows, columns, channels, each >= 1; found {shape}")


def _check_pool(name: str, size: int, shape: ImageShape) -> None:
    if not 1 <= size <= min(16, *shape[:2]):
        raise ValueError(
            f"{name} must lie between 1 and 16 and fit into the image; found {size} for {shape}"
        )


def _pooled(shape: ImageShape, size: int) -> ImageShape:
    return shape[0] // size, shape[1] // size, shape[2]


@dataclass(frozen=True)
class Conv2d:
    """Filters slid over an image, plus a bias: weight (size, size, C, F), bias (F,).

    Starts from Glorot-uniform weights and zero biases (the paper's code, through Keras).

    Parameters
    ----------
    image_shape : (rows, columns, channels)
    n_filters : int
        F, the channels of the result.
    size : int
        Rows and columns of a filter.
    padding : {"valid", "same"}
        Whether filters stay inside the image or zeros around it keep its size (odd sizes only).
    backend : {"numpy", "numba"}, optional
    """

    image_shape: ImageShape
    n_filters: int
    size: int = 3
    padding: str = "valid"
    backend: str | None = None

    def __post_init__(self) -> None:
        """Refuse what gives no image."""
        _check_image_shape(self.image_shape)
        if self.padding not in PADDINGS:
            raise ValueError(f"padding must be one of {PADDINGS}; found {self.padding!r}")
        if self.padding == "same" and self.size % 2 == 0:
            raise ValueError(f"size must be odd where padding is 'same'; found {self.size}")
        if self.n_filters < 1 or min(self.conv_shape) < 1:
            raise ValueError(
                f"n_filters must be at least 1 and size must fit into the image; found "
                f"{self.n_filters} filters of size {self.size} for {self.image_shape}"
            )

    @property
    def is_parallel(self) -> bool:
        """Whether it works with the compiled kernels' threads."""
        return self.backend != "numpy"

    @property
    def n_in(self) -> int:
        """Numbers of an image."""
        return int(np.prod(self.image_shape))

    @property
    def out_shape(self) -> ImageShape:
        """Rows, columns, channels of the result."""
        return self.conv_shape

    @property
    def conv_shape(self) -> ImageShape:
        """Rows, columns, channels of the convolution."""
        rows, columns, _ = self.image_shape
        lost = self.size - 1 - 2 * self._zeros
        return rows - lost, columns - lost, self.n_filters

    @property
    def _zeros(self) -> int:
        return (self.size - 1) // 2 if self.padding == "same" else 0

    @property
    def parameter_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Weight and bias."""
        return (self.size, self.size, self.image_shape[2], self.n_filters), (self.n_filters,)

    def initial(self, rng: np.random.Generator) -> Parameters:
        """Draw Glorot & Bengio's uniform weights; biases are zero."""
        weight_shape, bias_shape = self.parameter_shapes
        limit = np.sqrt(6 / (self.size**2 * (self.image_shape[2] + self.n_filters)))
        return rng.uniform(-limit, limit, weight_shape), np.zeros(bias_shape)

    def forward(
        self,
        parameters: Parameters,
        x: np.ndarray,
        rng: np.random.Generator | None,
        buffers: Buffers = FRESH,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the output and, for ``backward``, the input."""
        weight, bias = parameters
        images = x.reshape(-1, *self.image_shape)
        out = kernels.conv2d(images, weight, self._zeros, backend_for(self.backend, x, weight))
        out += bias
        return out.reshape(len(x), -1), x

    def backward(
        self,
        parameters: Parameters,
        cache: np.ndarray,
        d_out: np.ndarray,
        d_parameters: Parameters | None = None,
        buffers: Buffers = FRESH,
        first: bool = False,
    ) -> tuple[np.ndarray | None, Parameters]:
        """Return the gradients of the input, the weight, and the bias: its sums over all pixels."""
        weight, _ = parameters
        d_images = d_out.reshape(-1, *self.out_shape)
        images = cache.reshape(-1, *self.image_shape)
        d_x, d_weight = kernels.conv2d_backward(
            images,
            weight,
            d_images,
            self._zeros,
            backend_for(self.backend, d_out, weight),
            with_images=not first,
        )
        d_bias = d_images.sum(axis=(0, 1, 2), dtype=np.result_type(d_out.dtype, np.float64))
        d_parameters = d_parameters or new_gradients(parameters, d_out)
        d_parameters[0][...] = d_weight
        d_parameters[1][...] = d_bias
        return None if d_x is None else d_x.reshape(len(cache), -1), d_parameters


@dataclass(frozen=True)
class ConvBlock(Conv2d):
    """A convolution and what follows: dropout(max_pool(max(convolution + bias, 0))) in one pass.

    The same as :class:`Conv2d`, :class:`~nalayer.layers.ReLU`, :class:`MaxPool2d` and
    :class:`~nalayer.layers.Dropout` in sequence, and what :func:`cnn` is built of.

    Parameters
    ----------
    pool : int
        Size of the windows that the largest number is taken of; 1 takes all.
    rate : float
        Of dropout.
    """

    pool: int = 1
    rate: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what gives no image, and a rate that leaves nothing."""
        super().__post_init__()
        check_rate(self.rate)
        _check_pool("pool", self.pool, self.conv_shape)

    @property
    def out_shape(self) -> ImageShape:
        """Rows, columns, channels of the result."""
        return _pooled(self.conv_shape, self.pool)

    def forward(
        self,
        parameters: Parameters,
        x: np.ndarray,
        rng: np.random.Generator | None,
        buffers: Buffers = FRESH,
    ) -> tuple[np.ndarray, Any]:
        """Return the output and, for ``backward``, the input, the output, the places, the rate."""
        weight, bias = parameters
        shape = (len(x), *self.out_shape)
        out = buffers.take("out", shape, np.result_type(x.dtype, weight.dtype), like=x)
        place = buffers.take("place", shape, np.uint8, like=x) if self.pool > 1 else None
        rate = 0.0 if rng is None else self.rate
        kernels.conv2d_relu(
            x.reshape(-1, *self.image_shape),
            weight,
            bias,
            out,
            place,
            padding=self._zeros,
            pool=self.pool,
            rate=rate,
            seed=new_seed(rng) if rng is not None and rate else 0,
            backend=backend_for(self.backend, x, weight),
        )
        return out.reshape(len(x), -1), (x, out, place, rate)

    def backward(
        self,
        parameters: Parameters,
        cache: Any,
        d_out: np.ndarray,
        d_parameters: Parameters | None = None,
        buffers: Buffers = FRESH,
        first: bool = False,
    ) -> tuple[np.ndarray | None, Parameters]:
        """Return the gradients of the input, the weight, and the bias."""
        weight, _ = parameters
        x, out, place, rate = cache
        shape = (len(x), *self.image_shape)
        dtype = np.result_type(d_out.dtype, weight.dtype)
        d_x = None if first else buffers.take("d_x", shape, dtype, like=d_out)
        d_weight, d_bias = d_parameters or new_gradients(parameters, d_out)
        kernels.conv2d_relu_backward(
            x.reshape(shape),
            weight,
            out,
            place,
            d_out.reshape(out.shape),
            d_x,
            d_weight,
            d_bias,
            padding=self._zeros,
            pool=self.pool,
            rate=rate,
            backend=backend_for(self.backend, d_out, weight),
        )
        return None if d_x is None else d_x.reshape(len(x), -1), (d_weight, d_bias)


@dataclass(frozen=True)
class MaxPool2d:
    """The largest number of each size x size window; what fills no window is left out."""

    image_shape: ImageShape
    size: int = 2
    backend: str | None = None
    parameter_shapes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """Refuse windows that do not fit."""
        _check_image_shape(self.image_shape)
        _check_pool("size", self.size, self.image_shape)

    @property
    def n_in(self) -> int:
        """Numbers of an image."""
        return int(np.prod(self.image_shape))

    @property
    def out_shape(self) -> ImageShape:
        """Rows, columns, channels of the result."""
        return _pooled(self.image_shape, self.size)

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
        """Return the output and, for ``backward``, where each maximum was."""
        images = x.reshape(-1, *self.image_shape)
        out, place = kernels.max_pool2d(images, self.size, backend_for(self.backend, x))
        return out.reshape(len(x), -1), place

    def backward(
        self,
        parameters: Parameters,
        cache: np.ndarray,
        d_out: np.ndarray,
        d_parameters: Parameters | None = None,
        buffers: Buffers = FRESH,
        first: bool = False,
    ) -> tuple[np.ndarray, Parameters]:
        """Send each gradient to where the maximum was."""
        shape = (len(d_out), *self.image_shape)
        d_windows = d_out.reshape(cache.shape)
        d_images = kernels.max_pool2d_backward(
            cache, d_windows, self.size, shape, backend_for(self.backend, d_out)
        )
        return d_images.reshape(len(d_out), -1), ()


def cnn(image_shape: ImageShape, n_classes: int, backend: str | None = None) -> Network:
    """Return the convolutional network of the paper's authors, as their published code has it.

    Two 3x3 convolutions with 32 filters (valid), max-pool 2, dropout .25; two with 64 (same, then
    valid), max-pool 2, dropout .25; a dense layer of 512 with dropout .5; the classifier. ReLU
    after every layer with weights but the last.

    Parameters
    ----------
    image_shape : (rows, columns, channels)
        ``(28, 28, 1)`` for MNIST, ``(32, 32, 3)`` for CIFAR-100; at least 12 rows and columns.
    n_classes : int
    backend : {"numpy", "numba"}, optional
        Of convolution, pooling, and the dense layer's bias, ReLU and dropout.

    Examples
    --------
    >>> cnn((28, 28, 1), 10).n_weights
    889834
    """
    checks.check_n_classes(n_classes)
    layers: list[Layer] = []
    shape = image_shape
    for n_filters, padding, pool, rate in (
        (32, "valid", 1, 0.0),
        (32, "valid", 2, 0.25),
        (64, "same", 1, 0.0),
        (64, "valid", 2, 0.25),
    ):
        block = ConvBlock(shape, n_filters, padding=padding, backend=backend, pool=pool, rate=rate)
        layers.append(block)
        shape = block.out_shape
    n_features = int(np.prod(shape))
    return Network((*layers, Hidden(n_features, 512, 0.5, backend), Dense(512, n_classes)))
