"""What does not fit into memory is refused before it is made; what is in a file need not fit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nalayer
from kernels import checks
from nalayer import memory

ROOT = Path(__file__).parents[2]
K = 10**5


RNG = np.random.default_rng(0)
Q, Z = np.full((1, K), 1 / K), np.zeros(1, int)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nalayer.uniform_start(K, 0.1),
        lambda: nalayer.confusion_start(Q, Z),
        lambda: nalayer.clustered_start(Q, Z, RNG),
        lambda: nalayer.make_noise_matrix("symmetric", K, 0.1, RNG),
        lambda: nalayer.make_noise_matrix("cyclic", K, 0.1, RNG),
    ],
)
def test_dense_layers_of_many_classes_are_refused_with_their_size(make, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 20 * 2**30)
    words = rf"would need {8 * K**2} bytes \(74.5 GiB\); found 20.0 GiB"
    with pytest.raises(MemoryError, match=words):
        make()


def test_dense_c_model_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)
    model = nalayer.SModel(nalayer.mlp(2, (50,), 60))
    with pytest.raises(MemoryError, match=f"channel_weights .* {8 * 60 * 60 * 50} bytes"):
        nalayer.c_start(model, np.zeros(model.n_parameters))


def test_nothing_is_refused_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    memory.require_memory("x", (10**9, 10**9), np.float64, "do without")


@pytest.mark.parametrize("bad", [0, 6, 19])
def test_every_piece_of_a_large_array_is_looked_at(bad, monkeypatch):
    monkeypatch.setattr(checks, "CHECKED_AT_ONCE", 7)
    x = np.ones((10, 2))
    checks.check_finite("x", x)
    x.flat[bad] = np.nan
    with pytest.raises(ValueError, match=rf"found nan at \({bad // 2}, {bad % 2}\)"):
        checks.check_finite("x", x)


def test_the_system_tells():
    assert memory.available_bytes() > 0


# The bound is on what a process may write to (RLIMIT_DATA); pages of a file mapped for reading are
# the system's to drop. A first copy of the data must fail, or the bound bounds nothing.
BOUNDED = """
import resource, sys
import numpy as np
import em_baseline, nalayer
from threadpoolctl import threadpool_limits

path, n, n_in, bound = sys.argv[1], *map(int, sys.argv[2:])
x = np.memmap(path, np.float32, "r", shape=(n, n_in))
z = np.random.default_rng(0).integers(3, size=n)
network = nalayer.mlp(n_in, (8,), 3, backend="numpy")
plain = nalayer.PlainModel(network, "numpy")
model = nalayer.SModel(network, backend="numpy")
weights = network.initial_weights(nalayer.stream(0, "initialisation"), np.float32)
resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
try:
    np.array(x)
except MemoryError:
    print("no copy fits")
with threadpool_limits(1):
    settings = dict(n_epochs=1, batch_size=4096, shuffling=nalayer.stream(0, "shuffling"))
    weights = nalayer.train(plain, weights, x, z, **settings).parameters
    counts = sum(
        nalayer.confusion_counts(network.logits(weights, x[part]), z[part])
        for part in (slice(n // 2), slice(n // 2, n))
    )
    theta = counts.toarray() + 1
    theta /= theta.sum(axis=1, keepdims=True)
    start = model.pack(weights, np.log(theta).astype(np.float32))
    parameters = nalayer.train(model, start, x, z, **settings).parameters
    statistics = em_baseline.e_step_statistics(model, parameters, x, z)
print("trained on", statistics.n_samples, round(float(statistics.counts.sum())))
"""


def test_training_on_a_file_larger_than_the_memory_allowed(tmp_path):
    n, n_in = 200_000, 1000  # 800 MB
    path = tmp_path / "x.f32"
    x = np.memmap(path, np.float32, "w+", shape=(n, n_in))
    x[:: n // 50] = np.random.default_rng(0).normal(size=(50, n_in))  # the rest stays a hole
    x.flush()
    del x
    bound = 600 * 2**20
    assert path.stat().st_size > bound
    found = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(path), str(n), str(n_in), str(bound)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["no copy fits", f"trained on {n} {n}"]
