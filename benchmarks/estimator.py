"""The estimator on digits: accuracy beside MLPClassifier, label errors beside cleanlab.

Accuracy is on clean test digits after training on noisy labels. Label errors are looked for in the
noisy training set by cross-validation, so that no sample is judged by a network that was trained on
its label; precision and recall count the labels that were really changed. cleanlab is given the
probabilities of the very same folds, and those of a plain network as well.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

import kernels
import nalayer
from benchmarks import records, studies
from benchmarks.records import Row
from nalayer.datasets import Dataset, load_digits
from nalayer.label_noise import labels_hash

OURS, MLP, MLP_STOPPED = "nalayer", "MLPClassifier", "MLPClassifier, early stopping"
OUR_ERRORS = "find_label_errors"
CLEANLAB = "cleanlab, "
N_FOLDS = 5
HIDDEN_SIZES = (128, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "--noise", type=float, default=0.4, help="share of changed labels, accuracy"
    )
    parser.add_argument(
        "--noise-in-search", type=float, default=0.3, help="share of changed labels to be found"
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="run seeds 0 to N-1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run both parts and print their tables."""
    try:
        if options.seeds < 1:
            raise ValueError(f"--seeds must be at least 1; found {options.seeds}")
        if options.json:
            records.require_writable(options.json)
        for noise in (options.noise, options.noise_in_search):
            nalayer.make_noise_matrix("permutation", 10, noise, nalayer.stream(0, "label noise"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if find_spec("cleanlab") is None:
        print("cleanlab is not installed: its rows are left out (pip install -e '.[peers]').")
    base = records.provenance(
        "estimator",
        options.command,
        kernels.api.DEFAULT_BACKEND,
        kernels.thread_count(),
        1,
        (*records.LIBRARIES, "cleanlab"),
    )
    base |= {"dataset": "digits", "network": "mlp", "noise_kind": "permutation", "fraction": 1.0}
    rows: list[Row] = []
    with threadpool_limits(1, user_api="blas"):
        for seed in range(options.seeds):
            for found in (accuracy(seed, options.noise), search(seed, options.noise_in_search)):
                rows += [base | {"seed": seed} | row for row in found]
                if options.json:
                    records.write_rows(options.json, rows)
    print("\n".join(lines(rows)))
    return 0


def _noisy(data: Dataset, noise: float, seed: int) -> np.ndarray:
    """Return the training labels, that share of them changed: every class has one wrong class."""
    rng = nalayer.stream(seed, "label noise")
    theta = nalayer.make_noise_matrix("permutation", data.n_classes, noise, rng)
    return nalayer.corrupt_labels(data.labels_train, theta, rng)


def _ours(seed: int, **settings: Any) -> nalayer.NoiseAdaptationClassifier:
    return nalayer.NoiseAdaptationClassifier(
        hidden_layer_sizes=HIDDEN_SIZES, random_state=seed, **settings
    )


def accuracy(seed: int, noise: float) -> Iterator[Row]:
    """Yield each classifier's accuracy on clean test labels; all are trained on the same ones."""
    data = load_digits()
    z = _noisy(data, noise, seed)
    classifiers = {
        OURS: _ours(seed),
        MLP: MLPClassifier(HIDDEN_SIZES, random_state=seed),
        MLP_STOPPED: MLPClassifier(HIDDEN_SIZES, random_state=seed, early_stopping=True),
    }
    for method, classifier in classifiers.items():
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # MLPClassifier's default of epochs
            classifier.fit(data.x_train, z)
        yield {
            "method": method,
            "noise": noise,
            "labels_hash": labels_hash(z),
            "test_accuracy": float(classifier.score(data.x_test, data.labels_test)),
            "seconds": round(time.perf_counter() - started, 2),
        }


def search(seed: int, noise: float) -> Iterator[Row]:
    """Yield how well each way finds the labels that were changed."""
    data = load_digits()
    x, z = data.x_train, _noisy(data, noise, seed)
    wrong = z != data.labels_train
    found: dict[str, np.ndarray] = {OUR_ERRORS: np.zeros(z.size, dtype=bool)}
    probabilities = {
        name: np.empty((z.size, 10)) for name in ("p(z given x)", "p(y given x)", "plain network")
    }
    folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed)
    for kept, held_out in folds.split(x, z):
        clf = _ours(seed).fit(x[kept], z[kept])
        errors = clf.find_label_errors(x[held_out], z[held_out])
        found[OUR_ERRORS][held_out[errors]] = True
        probabilities["p(z given x)"][held_out] = clf.predict_noisy_proba(x[held_out])
        probabilities["p(y given x)"][held_out] = clf.predict_proba(x[held_out])
        plain = _ours(seed, noise_model="none").fit(x[kept], z[kept])
        probabilities["plain network"][held_out] = plain.predict_proba(x[held_out])
    if find_spec("cleanlab") is not None:
        find_label_issues = _cleanlab()
        for name, p in probabilities.items():
            found[CLEANLAB + name] = find_label_issues(z, p, n_jobs=1)
    for method, issues in found.items():
        hits = int((issues & wrong).sum())
        yield {
            "method": method,
            "noise": noise,
            "labels_hash": labels_hash(z),
            "n_wrong": int(wrong.sum()),
            "n_found": int(issues.sum()),
            "precision": hits / max(int(issues.sum()), 1),
            "recall": hits / int(wrong.sum()),
        }


def _cleanlab() -> Callable[..., np.ndarray]:
    from cleanlab.filter import find_label_issues

    return find_label_issues


def lines(rows: list[Row]) -> list[str]:
    """Return both tables: means over seeds with their 95 % bootstrap intervals."""
    found = []
    for keys in (("test_accuracy",), ("precision", "recall")):
        own = [row for row in rows if keys[0] in row]
        methods = list(dict.fromkeys(row["method"] for row in own))
        found += [
            f"digits, {own[0]['noise']:g} permutation noise, {studies.seeds_in(own)}",
            "",
            *studies.table(
                ["", *(key.replace("_", " ") for key in keys)],
                [
                    [
                        method,
                        *(studies.interval(studies.values_of(own, k, method=method)) for k in keys),
                    ]
                    for method in methods
                ],
            ),
            "",
        ]
    return found
