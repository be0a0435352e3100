"""One run with a checkpoint, in a process of its own that a test can kill.

``python -m tests.checkpointed RUN PATH`` prints a fingerprint of all that the run ends with.
"""

import hashlib
import sys
from dataclasses import asdict

import numpy as np

import em_baseline
from nalayer import SGD, Adam, CModel, SModel, mlp, stream, train
from nalayer.optimisers import Projected, Split

RNG = np.random.default_rng(0)
X, LABELS = RNG.normal(size=(90, 5)), RNG.integers(4, size=90)
TRAIN, HELD_OUT = slice(0, 60), slice(60, 90)


def shrink(parameters):
    parameters *= 0.999


def data_of(model, dtype=np.float64):
    """Return a start with a zero of theta, training data and what is held out."""
    n_channel = model.n_parameters - model.network.n_weights
    rng = np.random.default_rng(1)
    channel = rng.normal(size=n_channel)
    channel[-2] = -np.inf
    parameters = np.concatenate([model.network.initial_weights(rng), channel])
    x = X.astype(dtype)
    return {
        "model": model,
        "parameters": parameters.astype(dtype),
        "x": x[TRAIN],
        "validation": (x[HELD_OUT], LABELS[HELD_OUT]),
    }


def joint(**options):
    """Train an s-model with dropout, Adam and SGD under a projection, early stopping."""
    model = SModel(mlp(5, (7, 6), 4, dropout=0.3, backend="numpy"), backend="numpy")
    rule = Split(Adam(0.03, backend="numpy"), SGD(0.1), model.network.n_weights)
    settings = {
        "targets": LABELS[TRAIN],
        "n_epochs": 30,
        "batch_size": 16,
        "patience": 3,
        "optimiser": Projected(rule, shrink),
        "shuffling": stream(0, "shuffling"),
        "dropout": stream(0, "dropout"),
    }
    return train(**(data_of(model) | settings | options))


def em(letter, dtype=np.float64, **options):
    """Fit an s- or c-model by EM."""
    kind = {"s": SModel, "c": CModel}[letter]
    steps = em_baseline.MiniBatches(1, 16, Adam(0.01, backend="numpy"))
    settings = {
        "noisy_labels": LABELS[TRAIN],
        "network_step": steps,
        "noise_step": steps if letter == "c" else None,
        "n_rounds": 8,
        "damping": 0.7 if letter == "s" else 1.0,
        "shuffling": stream(0, "shuffling"),
    }
    model = kind(mlp(5, (7, 6), 4, backend="numpy"), backend="numpy")
    return em_baseline.fit(**(data_of(model, dtype) | settings | options))


def end_of(result):
    """Return all that a run ends with but the seconds."""
    steps = [asdict(step) for step in (*result.history, result.best)]
    for step in steps:
        del step["seconds"]
    return result.parameters.dtype, result.parameters.tobytes(), steps, result.labels_hash


RUNS = {
    "train": lambda **options: joint(n_epochs=200, patience=None, **options),
    "em": lambda **options: em("c", n_rounds=100, **options),
}


def fingerprint(result):
    return hashlib.sha256(repr(end_of(result)).encode()).hexdigest()


if __name__ == "__main__":
    run, path = sys.argv[1:]
    print(fingerprint(RUNS[run](checkpoint=path)))
