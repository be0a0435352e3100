"""Data files: read in every layout, refused when damaged; data sets from a local folder."""

import gzip
import io
import os
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest

from nalayer.data_files import (
    CIFAR_RECORD,
    DataFileError,
    read_cifar100,
    read_cifar100_archive,
    read_idx,
)
from nalayer.datasets import DATA_HOME, load_cifar100, load_mnist


def idx_bytes(array: np.ndarray, code: int = 8) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def cifar_bytes(n: int, seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    records = rng.integers(0, 256, size=(n, CIFAR_RECORD), dtype=np.uint8)
    records[:, 0] %= 20
    records[:, 1] %= 100
    return records.tobytes()


IMAGES = np.random.default_rng(1).integers(0, 256, size=(5, 28, 28), dtype=np.uint8)


def write(folder, name: str, data: bytes):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_is_read_packed_or_not(tmp_path, suffix):
    path = write(tmp_path, f"images{suffix}", idx_bytes(IMAGES))
    assert np.array_equal(read_idx(path, 3), IMAGES)


HUGE = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1)
BAD_IDX = {
    "empty": (b"", "starts with"),
    "something else": (b"<html>not here</html>", "starts with"),
    "floats": (idx_bytes(IMAGES, code=0x0D), "starts with"),
    "labels": (idx_bytes(np.zeros(7)), "has 1 dimensions, not 3"),
    "cut in the header": (idx_bytes(IMAGES)[:10], "ends within its header"),
    "cut": (idx_bytes(IMAGES)[:-1], "promises 3920 bytes"),
    "too long": (idx_bytes(IMAGES) + b"x", "there are more"),
    "a header that promises 8e28 bytes": (HUGE + b"abc", "3 are there"),
}


@pytest.mark.parametrize("name", BAD_IDX)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_idx_is_named_and_takes_no_memory(tmp_path, name, suffix):
    data, words = BAD_IDX[name]
    path = write(tmp_path, f"images{suffix}", data)
    tracemalloc.start()
    with pytest.raises(DataFileError, match=words) as raised:
        read_idx(path, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(path) in str(raised.value)
    assert "downloaded again" in str(raised.value)
    assert peak < 8 * 2**20


@pytest.mark.parametrize("damage", ["cut", "not packed", "changed"])
def test_damaged_gzip_is_named(tmp_path, damage):
    packed = bytearray(gzip.compress(idx_bytes(IMAGES)))
    if damage == "cut":
        packed = packed[:-20]
    elif damage == "not packed":
        packed = bytearray(idx_bytes(IMAGES))
    else:
        packed[len(packed) // 2] ^= 0xFF
    for name, read in (("i.gz", lambda path: read_idx(path, 3)), ("c.gz", read_cifar100)):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(DataFileError, match="cannot be unpacked"):
            read(tmp_path / name)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_cifar_records_are_turned_to_rows_columns_channels(tmp_path, suffix):
    data = cifar_bytes(3)
    images, labels = read_cifar100(write(tmp_path, f"train.bin{suffix}", data))
    for t in range(3):
        record = data[t * CIFAR_RECORD : (t + 1) * CIFAR_RECORD]
        assert labels[t] == record[1]
        for channel in range(3):
            for row, column in ((0, 0), (0, 31), (31, 0), (13, 7)):
                place = 2 + 1024 * channel + 32 * row + column
                assert images[t, row, column, channel] == record[place]


def test_bad_cifar_files_are_named(tmp_path):
    bad_label = bytearray(cifar_bytes(2))
    bad_label[CIFAR_RECORD + 1] = 100
    for data, words in (
        (b"", "0 bytes"),
        (cifar_bytes(2)[:-1], "no whole records"),
        (bytes(bad_label), "record 1 has labels"),
    ):
        with pytest.raises(DataFileError, match=words) as raised:
            read_cifar100(write(tmp_path, "train.bin", data))
        assert "train.bin" in str(raised.value)


def archive_of(folder, members: dict[str, bytes]):
    path = folder / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(f"cifar-100-binary/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def test_cifar_archive_is_read_without_unpacking_it(tmp_path):
    train, test = cifar_bytes(4, 1), cifar_bytes(2, 2)
    archive_of(tmp_path, {"train.bin": train, "test.bin": test})
    dataset = load_cifar100(np.float32, tmp_path)
    assert dataset.x_train.shape == (4, 3072)
    assert dataset.x_test.shape == (2, 3072)
    assert list(tmp_path.iterdir()) == [tmp_path / "cifar-100-binary.tar.gz"]


def test_bad_archives_are_named(tmp_path):
    path = archive_of(tmp_path, {"train.bin": cifar_bytes(1)})
    with pytest.raises(DataFileError, match="holds no file"):
        read_cifar100_archive(path, "cifar-100-binary/test.bin")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataFileError, match="cannot be unpacked"):
        read_cifar100_archive(path, "cifar-100-binary/train.bin")
    path.write_bytes(b"no archive")
    with pytest.raises(DataFileError, match="cannot be unpacked"):
        read_cifar100_archive(path, "cifar-100-binary/train.bin")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_archive_that_promises_much_takes_no_memory(tmp_path, suffix):
    """tarfile asks for all the bytes of an extended header at once: here 2^32 of them."""
    entry = tarfile.TarInfo("pax")
    entry.type, entry.size = tarfile.XHDTYPE, 2**32
    path = write(tmp_path, f"cifar.tar{suffix}", entry.tobuf(tarfile.GNU_FORMAT) + b"x" * 5000)
    tracemalloc.start()
    with pytest.raises(DataFileError):
        read_cifar100_archive(path, "cifar-100-binary/train.bin")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20


def small_mnist(folder, suffix: str = "", labels_train=range(5)) -> None:
    for part, labels in (("train", labels_train), ("t10k", range(5))):
        write(folder, f"{part}-images-idx3-ubyte{suffix}", idx_bytes(IMAGES))
        write(folder, f"{part}-labels-idx1-ubyte{suffix}", idx_bytes(np.array(list(labels))))


@pytest.mark.parametrize("parent", ["", "mnist"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_from_a_folder_in_every_layout(tmp_path, monkeypatch, parent, suffix):
    small_mnist(tmp_path / parent, suffix)
    dataset = load_mnist(np.float32, tmp_path)
    assert dataset.x_train.dtype == np.float32
    assert np.array_equal(dataset.x_train, IMAGES.reshape(5, -1).astype(np.float32) / 255)
    assert dataset.labels_train.tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setenv(DATA_HOME, str(tmp_path))
    assert np.array_equal(load_mnist(np.float32).x_test, dataset.x_test)


def test_what_is_missing_or_does_not_fit_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="data_home must name a folder; found"):
        load_mnist(data_home=tmp_path / "nowhere")
    monkeypatch.setenv(DATA_HOME, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=f"{DATA_HOME} must name a folder"):
        load_cifar100()
    with pytest.raises(FileNotFoundError, match="no train-images-idx3-ubyte"):
        load_mnist(data_home=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no train\.bin"):
        load_cifar100(data_home=tmp_path)
    small_mnist(tmp_path, labels_train=range(4))
    with pytest.raises(DataFileError, match="4 labels for 5 images"):
        load_mnist(data_home=tmp_path)
    small_mnist(tmp_path, labels_train=[0, 1, 2, 3, 10])
    with pytest.raises(DataFileError, match="a label 10"):
        load_mnist(data_home=tmp_path)
    write(tmp_path, "train-images-idx3-ubyte", idx_bytes(np.zeros((5, 8, 8))))
    with pytest.raises(DataFileError, match="images of shape"):
        load_mnist(data_home=tmp_path)


needs_data = pytest.mark.skipif(
    not os.environ.get(DATA_HOME), reason=f"{DATA_HOME} names no folder with the data sets"
)


@needs_data
def test_the_published_mnist():
    dataset = load_mnist(np.float32)
    assert dataset.x_train.shape == (60000, 784)
    assert dataset.x_test.shape == (10000, 784)
    assert dataset.x_train.max() == 1
    # Counts of the digits 0..9 in the published training set.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(dataset.labels_train).tolist() == counts


@needs_data
def test_the_published_cifar100():
    dataset = load_cifar100(np.float32)
    assert dataset.x_test.shape == (10000, 3072)
    assert np.bincount(dataset.labels_test).tolist() == [100] * 100
    assert dataset.x_train.shape[0] % 100 == 0
    # Means of the red, green and blue of CIFAR-100 are known to be about .507, .487, .441.
    means = dataset.x_test.reshape(-1, 3).mean(axis=0, dtype=np.float64)
    assert np.abs(means - [0.507, 0.487, 0.441]).max() < 0.01
