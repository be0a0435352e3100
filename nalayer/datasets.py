"""Data sets: the digits that scikit-learn ships, MNIST and CIFAR-100.

MNIST and CIFAR-100 are read from a folder of yours, or downloaded once, by checksum, into the
user's cache. The folder is the argument ``data_home``, else the environment variable
``NALAYER_DATA``; if either is given, nothing is downloaded. It holds, in any mixture,

- ``mnist/train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and both ``t10k-...``;
- ``cifar-100-binary/train.bin`` and ``test.bin``, of any number of records, or the published
  ``cifar-100-binary.tar.gz``;

each packed (``.gz``) or not, with or without the folder in between.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits as _load_digits
from sklearn.model_selection import train_test_split

from kernels import checks
from nalayer.data_files import (
    N_FINE,
    DataFileError,
    read_cifar100,
    read_cifar100_archive,
    read_idx,
)

N_TEST_DIGITS = 500
DATA_HOME = "NALAYER_DATA"
CIFAR_ARCHIVE = "cifar-100-binary.tar.gz"
# Two places that serve the four original files, and their checksums.
_MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/" + CIFAR_ARCHIVE
_CIFAR_MD5 = "03b5dce01913d631647c71ecec9e9cb8"


@dataclass(frozen=True)
class Dataset:
    """Features in [0, 1], one sample a row, and clean labels. Test labels choose nothing."""

    name: str
    x_train: np.ndarray
    labels_train: np.ndarray
    x_test: np.ndarray
    labels_test: np.ndarray
    n_classes: int
    image_shape: tuple[int, int, int]
    """rows, columns, channels: what a row of features is, in C order"""


def load_digits(dtype: Any = np.float64) -> Dataset:
    """Return the 1797 8x8 digits of Alpaydin & Kaynak (UCI, 1998): 1297 to train, 500 to test.

    The split is stratified by class and always the same.
    """
    digits = _load_digits()
    x_train, x_test, labels_train, labels_test = train_test_split(
        (digits.data / 16).astype(dtype),
        digits.target.astype(np.int64),
        test_size=N_TEST_DIGITS,
        stratify=digits.target,
        random_state=0,
    )
    return Dataset("digits", x_train, labels_train, x_test, labels_test, 10, (8, 8, 1))


def data_folder(data_home: str | Path | None) -> Path | None:
    """Return the folder that data sets are to be read from; None if they are to be downloaded.

    Raises
    ------
    FileNotFoundError
        If the folder named is not there.
    """
    named = data_home if data_home is not None else os.environ.get(DATA_HOME) or None
    if named is None:
        return None
    folder = Path(named)
    if not folder.is_dir():
        what = "data_home" if data_home is not None else f"the environment variable {DATA_HOME}"
        raise FileNotFoundError(f"{what} must name a folder; found {str(named)!r}")
    return folder


def _find(folder: Path, parent: str, name: str) -> Path | None:
    """Return a file of that name, packed or not, in the folder or in ``parent`` within it."""
    for place in (folder / parent, folder):
        for candidate in (place / name, place / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    return None


def _required(folder: Path, parent: str, name: str) -> Path:
    path = _find(folder, parent, name)
    if path is None:
        raise FileNotFoundError(
            f"no {name} or {name}.gz in {folder / parent} or {folder}; put it there, or unset "
            f"data_home and {DATA_HOME} to have the data set downloaded"
        )
    return path


def _fetched(name: str, md5: str, mirrors: tuple[str, ...]) -> Path:
    # Imported here: most programs download nothing, and this takes a while.
    import pooch

    from nalayer.download import RemoteFile, fetch

    return fetch(RemoteFile(name, f"md5:{md5}", mirrors), Path(pooch.os_cache("nalayer")))


def _scaled(images: np.ndarray, dtype: Any) -> np.ndarray:
    """Return bytes as one row of numbers in [0, 1] for each image."""
    x = images.reshape(len(images), -1).astype(dtype)
    x /= 255
    return x


def _mnist_part(part: str, folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (n, 28, 28) and labels of one part, and check that they belong together."""
    paths = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        if folder is None:
            packed = f"{name}.gz"
            mirrors = tuple(mirror + packed for mirror in _MNIST_MIRRORS)
            paths.append(_fetched(packed, _MNIST_MD5[packed], mirrors))
        else:
            paths.append(_required(folder, "mnist", name))
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if images.shape[1:] != (28, 28) or len(images) == 0:
        raise DataFileError(paths[0], f"it holds images of shape {images.shape}")
    if len(labels) != len(images):
        raise DataFileError(paths[1], f"it holds {len(labels)} labels for {len(images)} images")
    if labels.max() > 9:
        raise DataFileError(paths[1], f"it holds a label {labels.max()}; digits are 0..9")
    return images, labels


def load_mnist(dtype: Any = np.float64, data_home: str | Path | None = None) -> Dataset:
    """Return MNIST (LeCun, Cortes & Burges): 60,000 digits of 28x28 to train, 10,000 to test.

    Parameters
    ----------
    dtype : float32 or float64
    data_home : path, optional
        Folder to read it from; see the module.

    Raises
    ------
    FileNotFoundError
        If the folder or a file in it is not there.
    DataFileError
        If a file is not what it should be.
    DownloadError
        If no mirror gives the file.
    """
    folder = data_folder(data_home)
    (x, labels), (x_test, labels_test) = (_mnist_part(part, folder) for part in ("train", "t10k"))
    return Dataset(
        "mnist",
        _scaled(x, dtype),
        labels.astype(np.int64),
        _scaled(x_test, dtype),
        labels_test.astype(np.int64),
        10,
        (28, 28, 1),
    )


def _cifar_part(part: str, folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    if folder is None:
        archive: Path | None = _fetched(CIFAR_ARCHIVE, _CIFAR_MD5, (_CIFAR_URL,))
    else:
        path = _find(folder, "cifar-100-binary", f"{part}.bin")
        archive = _find(folder, "cifar-100-binary", CIFAR_ARCHIVE)
        if path is not None or archive is None:
            return read_cifar100(path or _required(folder, "cifar-100-binary", f"{part}.bin"))
    assert archive is not None
    return read_cifar100_archive(archive, f"cifar-100-binary/{part}.bin")


def load_cifar100(dtype: Any = np.float64, data_home: str | Path | None = None) -> Dataset:
    """Return CIFAR-100 (Krizhevsky 2009) with fine labels: 50,000 and 10,000 images of 32x32x3.

    A local copy may hold fewer. Parameters and errors as :func:`load_mnist`.
    """
    folder = data_folder(data_home)
    (x, labels), (x_test, labels_test) = (_cifar_part(part, folder) for part in ("train", "test"))
    return Dataset(
        "cifar100",
        _scaled(x, dtype),
        labels.astype(np.int64),
        _scaled(x_test, dtype),
        labels_test.astype(np.int64),
        N_FINE,
        (32, 32, 3),
    )


LOADERS: dict[str, Callable[..., Dataset]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "cifar100": load_cifar100,
}


def load_dataset(name: str, dtype: Any = np.float64) -> Dataset:
    """Return a data set by name; raises ValueError for an unknown one."""
    if name not in LOADERS:
        raise ValueError(f"dataset must be one of {sorted(LOADERS)}; found {name!r}")
    return LOADERS[name](dtype)


def validation_split(
    n: int, labels: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices to train on and those held out, stratified by the (noisy) labels.

    Parameters
    ----------
    n : int
        Number of samples.
    labels : (n,) integer
        The labels that training sees; clean ones have no business here.
    share : float
        Part to hold out, in (0, 1).
    rng : Generator

    Raises
    ------
    TypeError, ValueError
        For labels that are not n integers, or of which a class or a part is too small to split.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1); found {share}")
    checks.check_generator("rng", rng)
    checks.check_array("labels", labels, (n,))
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers; found {labels.dtype}")
    seed = int(rng.integers(2**32))
    try:
        kept, held_out = train_test_split(
            np.arange(n), test_size=share, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise ValueError(f"labels cannot be split by class: {error}") from None
    return np.sort(kept), np.sort(held_out)
