"""The public kernels of images: convolution and pooling, forward and backward.

Images are (n, rows, columns, channels), float32 or float64. As in :mod:`kernels.network_api`
shapes, dtypes and order are checked, and not the numbers. NumPy arrays are computed with Numba,
CuPy arrays on their GPU, which no call waits for. Results do not depend on the number of threads,
bit for bit, and are the same in every run on one kind of device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels import checks
from kernels.api import _backend_for
from kernels.network_api import _check_homes, check_rate, dropout_keys

_MOST_POOL = 16  # places in a window are bytes


def _convolved_shape(
    backend: str | None, images: np.ndarray, weight: np.ndarray, padding: int
) -> tuple[int, ...]:
    """Return the shape of a convolution; refuse images and filters that do not fit."""
    checks.check_work(backend, "images", images, ("n", "H", "W", "C"))
    n, h, w, c = images.shape
    if not images.size:
        raise ValueError(f"images must not be empty; found shape {images.shape}")
    checks.check_work(backend, "weight", weight, ("s", "s", c, "F"), images.dtype)
    _check_homes("images", images, weight=weight)
    size, other = weight.shape[:2]
    if size != other or not weight.size:
        raise ValueError(f"weight must hold square filters; found shape {weight.shape}")
    if padding < 0:
        raise ValueError(f"padding must not be negative; found {padding}")
    if min(h, w) + 2 * padding < size:
        raise ValueError(f"images must be at least as large as the filters; found {images.shape}")
    return n, h + 2 * padding - size + 1, w + 2 * padding - size + 1, weight.shape[3]


def _pooled_shape(shape: tuple[int, ...], pool: int, name: str = "pool") -> tuple[int, ...]:
    if not 1 <= pool <= _MOST_POOL:
        raise ValueError(f"{name} must lie in 1..{_MOST_POOL}; found {pool}")
    n, h, w, c = shape
    return n, h // pool, w // pool, c


def _check_place(
    place: np.ndarray | None, shape: tuple[int, ...], pool: int, written: bool
) -> None:
    """Refuse places that are no bytes of that shape or, where they are read, in no window."""
    checks.check_array("place", place, shape)
    assert place is not None
    if place.dtype != np.uint8 or not place.flags.c_contiguous:
        raise TypeError(f"place must be contiguous and uint8; found {place.dtype}")
    if checks.is_on_gpu(place):
        return  # to look at the numbers is to wait; the kernels there skip what is in no window
    if written and not place.flags.writeable:
        raise ValueError("place is written to and must not be read-only")
    if not written and place.max(initial=0) >= pool * pool:
        raise ValueError(f"place must lie in 0..{pool * pool - 1}; found {place.max()}")


def conv2d(
    images: np.ndarray, weight: np.ndarray, padding: int = 0, backend: str | None = None
) -> np.ndarray:
    r"""Return the correlation of images with filters, what networks call a convolution.

    .. math:: out_{tyxf} = \sum_{a,b,c} images_{t,\,y+a-p,\,x+b-p,\,c}\; weight_{abcf}

    Parameters
    ----------
    images : (n, H, W, C)
    weight : (s, s, C, F)
    padding : int
        p, rows and columns of zeros around each image: 0 is "valid", (s - 1) / 2 is "same".

    Returns
    -------
    (n, H + 2 p - s + 1, W + 2 p - s + 1, F)

    Examples
    --------
    >>> image, weight = np.arange(9.0).reshape(1, 3, 3, 1), np.ones((2, 2, 1, 1))
    >>> conv2d(image, weight)[0, :, :, 0].tolist()
    [[8.0, 12.0], [20.0, 24.0]]
    """
    _convolved_shape(backend, images, weight, padding)
    return _backend_for(backend, images, "images").conv2d(images, weight, padding)


def conv2d_backward(
    images: np.ndarray,
    weight: np.ndarray,
    d_out: np.ndarray,
    padding: int = 0,
    backend: str | None = None,
    *,
    with_images: bool = True,
) -> tuple[np.ndarray | None, np.ndarray]:
    r"""Return the gradients of :func:`conv2d` with respect to images and weight.

    .. math:: d\_weight_{abcf} = \sum_{t,y,x} images_{t,\,y+a-p,\,x+b-p,\,c}\; d\_out_{tyxf}, \qquad
              d\_images_{t,y,x,c} = \sum_{a,b,f} d\_out_{t,\,y-a+p,\,x-b+p,\,f}\; weight_{abcf}

    The first is None without ``with_images``: a network's first layer has no use for it.
    """
    shape = _convolved_shape(backend, images, weight, padding)
    checks.check_work(backend, "d_out", d_out, shape, images.dtype)
    _check_homes("images", images, d_out=d_out)
    kernels = _backend_for(backend, images, "images")
    return kernels.conv2d_backward(images, weight, d_out, padding, with_images)


def conv2d_relu(
    images: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    out: np.ndarray,
    place: np.ndarray | None = None,
    *,
    padding: int = 0,
    pool: int = 1,
    rate: float = 0.0,
    seed: Any = 0,
    backend: str | None = None,
) -> None:
    """Write dropout(max_pool(max(conv2d(images, weight) + bias, 0))) to ``out``, in one pass.

    The same as :func:`conv2d`, :func:`max_pool2d` and :func:`kernels.bias_relu_dropout` one after
    the other; what lies between them is not stored.

    Parameters
    ----------
    images, weight, padding
        See :func:`conv2d`.
    bias : (F,)
    out : (n, Ho // pool, Wo // pool, F)
        Written. Ho and Wo are rows and columns of the convolution.
    place : same shape, uint8
        Written: where each maximum was, see :func:`max_pool2d`. None where ``pool`` is 1.
    pool : int
        Size of the windows, at most 16.
    rate, seed
        Of dropout, see :func:`kernels.dropout_kept`; the array is (n, Ho // pool * Wo // pool * F).
    """
    shape = _pooled_shape(_convolved_shape(backend, images, weight, padding), pool)
    checks.check_work(backend, "bias", bias, shape[3:], images.dtype)
    dtype = checks.dtype_of_all(images, weight, bias)
    checks.check_work(backend, "out", out, shape, dtype, written=True)
    _check_homes("images", images, bias=bias, out=out)
    if place is not None or pool > 1:
        _check_place(place, shape, pool, written=True)
        _check_homes("images", images, place=place)
    keys = dropout_keys(rate, seed, images)
    kernels = _backend_for(backend, images, "images")
    kernels.conv2d_relu(images, weight, bias, padding, pool, rate, keys, out, place)


def conv2d_relu_backward(
    images: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    place: np.ndarray | None,
    d_out: np.ndarray,
    d_images: np.ndarray | None,
    d_weight: np.ndarray,
    d_bias: np.ndarray,
    *,
    padding: int = 0,
    pool: int = 1,
    rate: float = 0.0,
    backend: str | None = None,
) -> None:
    """Write the gradients of :func:`conv2d_relu` to ``d_images`` (unless None) and the other two.

    ``out`` and ``place`` are what the forward pass made: where ``out`` is positive a number was
    active and kept, so no mask is needed.
    """
    check_rate(rate)
    shape = _pooled_shape(_convolved_shape(backend, images, weight, padding), pool)
    checks.check_work(backend, "out", out, shape, images.dtype)
    checks.check_work(backend, "d_out", d_out, shape, images.dtype)
    _check_homes("images", images, out=out, d_out=d_out, d_weight=d_weight, d_bias=d_bias)
    if pool > 1:
        _check_place(place, shape, pool, written=False)
        _check_homes("images", images, place=place)
    dtype = checks.dtype_of_all(images, weight, out, d_out)
    if d_images is not None:
        checks.check_work(backend, "d_images", d_images, images.shape, dtype, written=True)
        _check_homes("images", images, d_images=d_images)
    checks.check_work(backend, "d_weight", d_weight, weight.shape, dtype, written=True)
    checks.check_work(backend, "d_bias", d_bias, shape[3:], dtype, written=True)
    _backend_for(backend, images, "images").conv2d_relu_backward(
        images, weight, out, place, d_out, padding, pool, rate, d_images, d_weight, d_bias
    )


def max_pool2d(
    images: np.ndarray, size: int, backend: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest number of each size x size window, and which one it was.

    Rows and columns that fill no window are left out. Of equal numbers the first in row order is
    taken. Complex numbers are compared by their real parts.

    Parameters
    ----------
    images : (n, H, W, C)
    size : int
        At most 16.

    Returns
    -------
    out : (n, H // size, W // size, C)
    place : same shape, uint8
        Where in the window, in row order: what the backward pass needs.
    """
    checks.check_work(backend, "images", images, ("n", "H", "W", "C"))
    _pooled_shape(images.shape, size, "size")
    return _backend_for(backend, images, "images").max_pool2d(images, size)


def max_pool2d_backward(
    place: np.ndarray,
    d_out: np.ndarray,
    size: int,
    shape: tuple[int, ...],
    backend: str | None = None,
) -> np.ndarray:
    """Return the gradient with respect to images of that shape: each goes where the maximum was."""
    if len(shape) != 4:
        raise ValueError(f"shape must have four numbers; found {shape}")
    _check_place(place, _pooled_shape(tuple(shape), size, "size"), size, written=False)
    checks.check_work(backend, "d_out", d_out, place.shape)
    _check_homes("place", place, d_out=d_out)
    return _backend_for(backend, d_out, "d_out").max_pool2d_backward(place, d_out, size, shape)
