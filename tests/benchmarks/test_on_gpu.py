"""``equivalence`` and ``accuracy`` with ``--backend cupy``: what the CPU gives, on few samples."""

import argparse
import functools
import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import equivalence, methods, placement
from benchmarks.__main__ import main
from benchmarks.accuracy import origin_of
from benchmarks.methods import METHODS, cell_of, run_cell
from em_baseline import statements
from nalayer.datasets import load_dataset
from tests.benchmarks.test_accuracy import CELL
from tests.kernels.gpu_fixtures import without_backend

N_SAMPLES, N_TEST = 150, 30


def few_digits(name="digits", dtype="float64"):
    data = load_dataset(name, np.dtype(dtype))
    return replace(
        data,
        x_train=data.x_train[:N_SAMPLES],
        labels_train=data.labels_train[:N_SAMPLES],
        x_test=data.x_test[:N_TEST],
        labels_test=data.labels_test[:N_TEST],
    )


@pytest.fixture(scope="module")
def started():
    """Return where each method starts from, trained on the CPU when first asked for."""
    kept = {}

    def arrays_of(cell):
        origin = origin_of(cell)
        if origin is None:
            return {}
        if origin not in kept:
            kept[origin] = run_cell(origin, arrays_of(origin), keep_parameters=True).arrays
        return kept[origin]

    return arrays_of


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_as_on_the_cpu(cupy, method, started, monkeypatch):
    monkeypatch.setattr(methods, "_dataset", few_digits)
    settings = {"network": "mlp-4", "dtype": "float64", "epochs": 1, "seed": 1}
    cell = replace(cell_of(replace(CELL, **settings, start="hard"), method), backend="numpy")
    start = started(cell)
    expected = run_cell(cell, start, keep_parameters=True)
    found = run_cell(replace(cell, backend="cupy"), start, keep_parameters=True)
    for name, array in expected.arrays.items():
        assert type(found.arrays[name]) is np.ndarray
        assert np.abs(found.arrays[name] - array).max() <= 1e-9
    for name, value in expected.row.items():
        if name in ("seconds", "parameters_hash"):
            continue
        if isinstance(value, float):
            assert abs(found.row[name] - value) <= 1e-9, name
        elif name != "theta":
            assert found.row[name] == value, name


def test_equivalence_fits_as_on_the_cpu_and_its_statements_hold(cupy, monkeypatch):
    monkeypatch.setattr(equivalence, "HIDDEN_SIZES", (4,))
    few_steps = functools.partial(statements.em_on_theta, n_steps=3)
    monkeypatch.setattr(statements, "em_on_theta", few_steps)
    parser = argparse.ArgumentParser()
    equivalence.add_arguments(parser)
    fits = []
    for backend in ("numpy", "cupy"):
        short = ["--epochs", "1", "--inner-epochs", "1", "--backend", backend]
        options = parser.parse_args(short)
        task = equivalence.make_task(options, few_digits(), seed=0)
        equivalence.compile_kernels(options)
        fits.append(equivalence.fit_all(task, options, lambda words: None))
    for expected, found in zip(*fits, strict=True):
        assert found.labels_hash == expected.labels_hash
        for a, b in zip(found.trace, expected.trace, strict=True):
            assert type(a.weights) is np.ndarray
            assert np.abs(a.weights - b.weights).max() <= 1e-9
            if b.channel_logits is not None:
                assert np.abs(np.exp(a.channel_logits) - np.exp(b.channel_logits)).max() <= 1e-9
    rows = list(equivalence.identities(task, fits[1], options))
    assert {row.statement for row in rows} == {f"V{v}" for v in (*range(1, 9), 11)}
    assert not [row for row in rows if not row.holds]


def test_rows_name_the_gpu(monkeypatch):
    runtime = types.SimpleNamespace(getDeviceProperties=lambda number: {"name": b"NVIDIA X1"})
    cuda = types.SimpleNamespace(runtime=runtime, Device=lambda: types.SimpleNamespace(id=0))
    fake = types.SimpleNamespace(cuda=cuda, __version__="14.2")
    monkeypatch.setitem(sys.modules, "cupy", fake)
    base = {"backend": "cupy", "device": "cpu", "versions": "numpy 2"}
    expected = {"backend": "cupy", "device": "NVIDIA X1", "versions": "numpy 2, cupy 14.2"}
    assert placement.with_device(base) == expected
    on_cpu = base | {"backend": "numba"}
    assert placement.with_device(on_cpu) == on_cpu


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["equivalence"], "--backend cupy needs CuPy and a GPU"),
        (["equivalence", "--suite"], "--backend cupy needs CuPy and a GPU"),
        (["accuracy", "--epochs", "1"], "--backend cupy needs CuPy and a GPU"),
        (["accuracy", "--jobs", "2"], "--jobs must be 1 with --backend cupy"),
    ],
)
def test_without_a_gpu_the_commands_say_so(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    without_backend(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*options, "--backend", "cupy"])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
