"""Feed damaged files to every reader: each is read, or refused with the reader's own exception.

``python -m tests.fuzz --inputs 1000000`` takes whole files, changes them at random and has them
read, in a process whose memory is limited. Anything but a sound result or the reader's exception, a
tenth of a gigabyte, or a second for one of these small files is a failure. Input number i of a seed
is always the same: ``--first i --inputs 1`` gives it alone.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import re
import resource
import shlex
import struct
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as decode
from safetensors.numpy import save as encode
from tqdm import tqdm

from benchmarks.records import provenance, write_rows
from nalayer import (
    NoiseAdaptationClassifier,
    SModel,
    checkpoints,
    mlp,
    model_files,
    tensor_file,
)
from nalayer.checkpoints import Checkpoint, CheckpointError
from nalayer.data_files import (
    CIFAR_RECORD,
    DataFileError,
    read_cifar100,
    read_cifar100_archive,
    read_idx,
)
from nalayer.optimisers import AdamState
from nalayer.training import BestSoFar, Epoch, Progress, resumed

EXTRA_MEMORY = 100 * 2**20
MOST_SECONDS = 1.0
"""of the processor, for one input"""
TOKEN = re.compile(rb'"[^"]*"|-?\d[\d.e+-]*|null|true|false|\[[^][]*\]|\{[^{}]*\}')
VALUES = (
    *(b"null", b"true", b"false", b"[]", b"{}", b"0", b"-1", b"1", b"0.5", b"1e999", b"NaN"),
    *(b'""', b'"x"', b'["x"]', b'{"x": 1}', b"9" * 40, b"9" * 5000, b"[" * 5000 + b"]" * 5000),
)
NUMBERS = (0, 1, 2, 3, 4, 8, 127, 128, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


class Failure(Exception):  # noqa: N818
    """An input that was neither read nor refused; says which, and how to get it again."""


@dataclass(frozen=True)
class Reader:
    """A reader of files, with whole files to start from."""

    read: Callable[[Path], Any]
    refuses: type[Exception]
    seeds: dict[str, bytes]
    """by file name; one that ends in .gz is changed before it is packed, or after"""
    is_sound: Callable[[Any], bool]
    seal: Callable[[bytes], bytes] = bytes
    """makes a checksum right again after the changes, so that they get past it"""
    is_json: bool = False
    """whether values are replaced, and most changes leave it JSON"""


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def cifar(n: int) -> bytes:
    records = np.random.default_rng(n).integers(0, 20, (n, CIFAR_RECORD), dtype=np.uint8)
    return records.tobytes()


def archive(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def images_and_labels(found: tuple[np.ndarray, np.ndarray]) -> bool:
    images, labels = found
    sound = images.shape == (len(labels), 32, 32, 3) and len(labels) > 0
    return sound and images.dtype == labels.dtype == np.uint8 and int(labels.max()) < 100


def checkpoint(path: Path) -> Checkpoint:
    streams = {"shuffling": np.random.default_rng(0), "dropout": None}
    return Checkpoint(path, streams, settings=(1, 2.5, "words"))


def progress(parameters: np.ndarray, n_epochs: int) -> Progress:
    history = [Epoch(number, 0.5, 0.5 - number, 4 * number, 0.1) for number in range(n_epochs)]
    state = AdamState(parameters + 1, parameters + 2, n_steps=7)
    best = BestSoFar(3, history[-1], parameters + 3)
    return Progress((parameters, state), history, best)


def in_order(data: bytes) -> bytes:
    """Return a safetensors file with its strings in order, which changes from run to run."""
    length = int.from_bytes(data[:8], "little")
    ordered = json.dumps(
        json.loads(data[8 : 8 + length]),
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
    )
    return data[:8] + ordered.encode().ljust(length) + data[8 + length :]


def a_checkpoint() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        progress(np.arange(3.0), 3).save(checkpoint(path))
        return in_order(path.read_bytes())


def with_facts(facts: bytes) -> bytes:
    """Return a checkpoint, whole but for what it holds beside its arrays."""
    arrays = decode(A_CHECKPOINT) | {"facts": np.frombuffer(facts, np.uint8)}
    return tensor_file.encoded({}, arrays, checkpoints.FORMAT)


def read_checkpoint(path: Path) -> Progress | None:
    own = progress(np.zeros(3), 1)
    return resumed(checkpoint(path), own.state, own.best.parameters, Epoch, 3, True)


def same_progress(found: Progress) -> bool:
    own = progress(np.arange(3.0), 3)
    return repr(found) == repr(own)


def consistent_progress(found: Progress) -> bool:
    parameters, moments = found.state
    arrays = parameters, moments.mean, moments.square, found.best.parameters
    sound = all(a.shape == (3,) and a.dtype == float and a.flags.writeable for a in arrays)
    numbers = [epoch.number for epoch in found.history]
    return sound and numbers == list(range(len(numbers))) and found.best.epoch in found.history


def same_model(found: model_files.SavedModel) -> bool:
    return found.model == MODEL and bool((found.parameters == PARAMETERS).all())


def a_model_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        model_files.save(path, MODEL, PARAMETERS, classes=["cat", "dog", "owl"])
        return in_order(path.read_bytes())


def an_estimator() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what the file of a fitted estimator describes, and its arrays."""
    x = np.random.default_rng(0).normal(size=(40, 2))
    clf = NoiseAdaptationClassifier(
        hidden_layer_sizes=(3,), n_baseline_epochs=1, n_epochs=1, random_state=0, backend="numpy"
    ).fit(x, x[:, 0] > 0)
    for epoch in clf.history_:
        epoch["seconds"] = 0.5  # the same inputs on every machine
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        clf.save(path)
        return tensor_file.read(path)


def with_description(text: bytes) -> bytes:
    """Return the file of an estimator, whole but for its description."""
    words = text.decode(errors="replace")
    strings = {
        "format": tensor_file.FORMAT,
        "version": tensor_file.VERSION,
        "description": words,
        "sha256": tensor_file._checksum(words, AN_ESTIMATOR[1]),
    }
    return in_order(encode(AN_ESTIMATOR[1], strings))


def can_predict(clf: NoiseAdaptationClassifier) -> bool:
    x = np.zeros((2, clf.n_features_in_))
    clf.__dict__.pop("feature_names_in_", None)  # which x has not; scikit-learn would warn
    return clf.predict(x).shape == (2,) and clf.predict_proba(x).shape == (2, len(clf.classes_))


def consistent_model(found: model_files.SavedModel) -> bool:
    model, classes = found.model, found.classes
    sound = found.parameters.shape == (model.n_parameters,)
    return sound and (classes is None or classes.shape == (model.network.n_classes,))


def sealed(data: bytes) -> bytes:
    """Return a file with the checksum of what is in it; as it is if that cannot be told."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    try:
        text = json.loads(header)["__metadata__"]["description"]
        right = tensor_file._checksum(text, decode(data))
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return data
    header = re.sub(rb'(?<="sha256":")[0-9a-f]{64}(?=")', right.encode(), header)
    return data[:8] + header + data[8 + length :]


MODEL = SModel(mlp(2, (3,), 3, dropout=0.5))
PARAMETERS = np.arange(float(MODEL.n_parameters))
A_CHECKPOINT = a_checkpoint()
AN_ESTIMATOR = an_estimator()
LABELS = np.arange(7, dtype=np.uint8)
IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
MEMBER = "cifar-100-binary/train.bin"

READERS = {
    "idx": Reader(
        lambda path: read_idx(path, 3 if path.name.startswith("images") else 1),
        DataFileError,
        {f"{name}{end}": idx(a) for name, a in (("images", IMAGES), ("labels", LABELS))
         for end in ("", ".gz")},
        lambda found: found.dtype == np.uint8 and found.ndim in (1, 3),
    ),
    "cifar": Reader(
        read_cifar100,
        DataFileError,
        {"one.bin": cifar(1), "two.bin": cifar(2), "two.bin.gz": cifar(2)},
        images_and_labels,
    ),
    "cifar archive": Reader(
        lambda path: read_cifar100_archive(path, MEMBER),
        DataFileError,
        {name: archive({"cifar-100-binary/test.bin": cifar(1), MEMBER: cifar(2)})
         for name in ("cifar.tar", "cifar.tar.gz")},
        images_and_labels,
    ),
    "checkpoint": Reader(
        read_checkpoint,
        CheckpointError,
        {"run": A_CHECKPOINT},
        same_progress,
    ),
    "sealed checkpoint": Reader(
        read_checkpoint,
        CheckpointError,
        {"run": A_CHECKPOINT},
        consistent_progress,
        sealed,
    ),
    "facts of a checkpoint": Reader(
        read_checkpoint,
        CheckpointError,
        {"run": decode(A_CHECKPOINT)["facts"].tobytes()},
        consistent_progress,
        with_facts,
        is_json=True,
    ),
    "model file": Reader(
        model_files.load,
        model_files.ModelFileError,
        {"model.safetensors": a_model_file()},
        same_model,
    ),
    "sealed model file": Reader(
        model_files.load,
        model_files.ModelFileError,
        {"model.safetensors": a_model_file()},
        consistent_model,
        sealed,
    ),
    "description of an estimator": Reader(
        NoiseAdaptationClassifier.load,
        model_files.ModelFileError,
        {"model.safetensors": json.dumps(AN_ESTIMATOR[0], sort_keys=True).encode()},
        can_predict,
        with_description,
        is_json=True,
    ),
}  # fmt: skip


def changed(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return the file with a few changes; one in a hundred stays as it is."""
    new = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8)) if rng.random() > 0.01 else 0):
        # Most of what a reader believes stands at the start of a file.
        size = len(new) if rng.random() < 0.5 else min(len(new), 24)
        at = rng.randrange(size + 1)
        n = min(rng.choice((1, 2, 4, 16, 512, CIFAR_RECORD)), len(new) - at)
        kind = rng.randrange(9)
        if kind == 0 and at < len(new):
            new[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(new):
            new[at] = rng.randrange(256)
        elif kind == 2:
            order = rng.choice(("<", ">"))
            new[at : at + 4] = struct.pack(f"{order}I", rng.choice(NUMBERS))
        elif kind == 3:
            del new[at:]
        elif kind == 4:
            del new[at : at + n]
        elif kind == 5:
            new[at:at] = new[at : at + n]
        elif kind == 6:
            new[at:at] = rng.randbytes(n)
        elif kind == 7:
            other = rng.choice(others)
            new[at:] = other[rng.randrange(len(other)) :]
        elif kind == 8:  # a number that is written out, as in a header of JSON
            number = re.compile(rb"\d+").search(new, at)
            if number:
                new[slice(*number.span())] = str(rng.choice(NUMBERS)).encode()
    return bytes(new)


def changed_json(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return JSON with a few values replaced by others; one in four is changed as any file is."""
    if rng.random() < 0.25:
        return changed(data, others, rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        tokens = list(TOKEN.finditer(data))
        token = rng.choice(tokens)
        values = (*VALUES, rng.choice(tokens)[0])
        if data[token.end() :].startswith(b":"):  # a key
            values = tuple(value for value in values if value.startswith(b'"'))
        value = rng.choice(values)
        data = data[: token.start()] + value + data[token.end() :]
    return data


def make_input(name: str, seed: int, number: int) -> tuple[str, bytes]:
    """Return the file name and the bytes of an input: the same for the same three."""
    reader, rng = READERS[name], random.Random(f"{name} {seed} {number}")
    others = list(reader.seeds.values())
    file = rng.choice(list(reader.seeds))
    data, packed = reader.seeds[file], file.endswith(".gz")
    if not packed or rng.random() < 0.5:
        change = changed_json if reader.is_json else changed
        data = reader.seal(change(data, others, rng))
    if not packed:
        return file, data
    data = gzip.compress(data, 1, mtime=0)
    return file, changed(data, others, rng) if rng.random() < 0.5 else data


@dataclass
class Outcome:
    """What came of the inputs of a reader."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """by the words that the refusal starts with"""
    slowest: float = 0.0


def words_of(error: Exception, path: Path) -> str:
    """Return what a message says, after the file's name, up to its first number or name."""
    said = str(error).replace(str(path), "").removeprefix("checkpoint ")
    said = re.sub(r"^ \(.*?\)", "", said).lstrip(" :")
    return re.sub(r"( b['\"]|, with other |[^a-z, ]).*", "", said).rstrip(" ,")


def fuzz(name: str, numbers: range, seed: int, folder: Path, quiet: bool = True) -> Outcome:
    """Have a reader read these inputs; raise :class:`Failure` for the first that it fails on."""
    reader, outcome = READERS[name], Outcome()
    for number in tqdm(numbers, name, disable=quiet, mininterval=5):
        file, data = make_input(name, seed, number)
        path = folder / file
        path.write_bytes(data)
        started = time.process_time()
        again = f"{name}, seed {seed}, input {number} ({file}, {len(data)} bytes)"
        try:
            found = reader.read(path)
            if not reader.is_sound(found):
                raise Failure(f"{again}: read, but unsound")
            outcome.accepted += 1
        except reader.refuses as error:
            outcome.refused[words_of(error, path)] += 1
        except Failure:
            raise
        except BaseException as error:
            raise Failure(f"{again}: {type(error).__name__}: {error}") from error
        seconds = time.process_time() - started
        if seconds > MOST_SECONDS:
            raise Failure(f"{again}: took {seconds:.1f} s")
        outcome.slowest = max(outcome.slowest, seconds)
    return outcome


def limit_memory() -> None:
    """Let this process have so much more address space than it has now, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + EXTRA_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def rows_of(name: str, outcome: Outcome, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row with the totals and one for every kind of refusal."""
    common = common | {"reader": name}
    refused = [
        common | {"refusal": words, "count": count}
        for words, count in outcome.refused.most_common()
    ]
    totals = {
        "accepted": outcome.accepted,
        "refused": outcome.refused.total(),
        "slowest_ms": round(1e3 * outcome.slowest, 3),
    }
    return [common | totals, *refused]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="for each reader")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, nargs="+", default=list(READERS))
    parser.add_argument("--json", type=Path, help="where to write what came of them")
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "tests.fuzz", *arguments])
    common = provenance("fuzz", command, "numpy", 1, 1) | {
        "seed": options.seed,
        "inputs": options.inputs,
        "extra_memory_bytes": EXTRA_MEMORY,
    }
    rows = []
    limit_memory()
    in_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None) as folder:
        for name in options.reader:
            started = time.perf_counter()
            numbers = range(options.first, options.first + options.inputs)
            try:
                outcome = fuzz(name, numbers, options.seed, Path(folder), not sys.stderr.isatty())
            except Failure as failure:
                print(failure, file=sys.stderr)
                return 1
            seconds = round(time.perf_counter() - started, 1)
            rows += rows_of(name, outcome, common | {"seconds": seconds})
            refused = outcome.refused.total()
            print(f"{name}: {outcome.accepted} read, {refused} refused, {seconds} s", flush=True)
            for words, count in outcome.refused.most_common():
                print(f"    {count:8d}  {words}", flush=True)
    if options.json:
        write_rows(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
