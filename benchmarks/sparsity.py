"""How many links a sparse noise layer needs: quality against l, where the true links are known.

Synthetic problems of very many classes: classes come in clusters, and a wrong label is one of its
cluster's. The links are chosen from the baseline's confusion matrix, which is accumulated sparsely.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse
from tqdm import tqdm

import kernels
import nalayer
from benchmarks import records, studies
from benchmarks.cells import Cell, CellError, Store
from benchmarks.machine import n_cores
from benchmarks.methods import Task, s_model_of
from benchmarks.records import Row
from em_baseline import e_step_statistics
from em_baseline.partial import certificate
from kernels import LinkIndex
from nalayer import SModel, stream
from nalayer.buffers import slices

N_IN = 64
CLUSTER = 5  # classes that are taken for each other: the true number of links
WITHIN, SPREAD, SCALE = 0.7, 1.0, 0.5  # of class means around the cluster's; of samples; of all
NOISE = 0.4
HELD_OUT = 0.1
N_TEST = 20_000
DENSE = 0  # stands for all links
BATCH = 256
LEARNING_RATE = 3e-3
PATIENCE = 2
OF_THE_STUDY = ("classes", "kept", "seeds", "per_class", "epochs", "dense_up_to", "jobs", "picture")
"""options that say nothing where cells are taken as they are"""
S_MODELS = ("s", "sparse-s")  # methods of `accuracy`
AT_ONCE = 2**22  # logits held while the confusion is counted
SOURCES = {"hard": 1, "soft": 10}
"""candidates of :func:`nalayer.confusion_counts`: the arg max, or the mass of the ten likeliest"""


@dataclass(frozen=True)
class Problem:
    """One synthetic data set."""

    k: int
    seed: int
    per_class: int = 50
    epochs: int = 15


@dataclass(frozen=True)
class Data:
    """Features with noisy labels, clean ones only for the test; the noise over its true links."""

    x: np.ndarray
    noisy: np.ndarray
    held_out: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    theta: np.ndarray
    links: LinkIndex


def draw(problem: Problem) -> Data:
    """Draw means, samples and noise; float32.

    A class keeps its label with probability 1 - NOISE; the rest is shared out over the other
    classes of its cluster in random proportions (Dirichlet, all ones).
    """
    rng = stream(problem.seed, "synthetic data")
    k, n = problem.k, problem.k * problem.per_class
    mean_i = np.repeat(rng.standard_normal((-(-k // CLUSTER), N_IN)), CLUSTER, axis=0)[:k]
    mean_i = mean_i + WITHIN * rng.standard_normal((k, N_IN))

    def samples(classes: np.ndarray) -> np.ndarray:
        x = mean_i[classes] + SPREAD * rng.standard_normal((classes.size, N_IN))
        return (SCALE * x).astype(np.float32)

    theta, links = true_noise(k, rng)
    clean = rng.permutation(np.repeat(np.arange(k), problem.per_class))
    x = samples(clean)
    noisy = nalayer.corrupt_labels(clean, theta, stream(problem.seed, "label noise"), links=links)
    held = slice(n - int(HELD_OUT * n), n)
    test = rng.integers(k, size=N_TEST)
    return Data(
        x[: held.start],
        noisy[: held.start],
        (x[held], noisy[held]),
        (samples(test), test),
        theta,
        links,
    )


def true_noise(k: int, rng: np.random.Generator) -> tuple[np.ndarray, LinkIndex]:
    """Return the noise over its links: (K, CLUSTER)."""
    support = (np.arange(k) // CLUSTER * CLUSTER)[:, None] + np.arange(CLUSTER)
    own = support == np.arange(k)[:, None]
    theta = np.where(own, 1 - NOISE, 0)
    theta[~own] = NOISE * rng.dirichlet(np.ones(CLUSTER - 1), size=k).ravel()
    return theta, kernels.link_index(support)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""

    def option(name: str, help: str, **details: Any) -> None:
        parser.add_argument(name, help=help, **details)

    option("--classes", "numbers of classes", nargs="+", type=int, default=[100, 1000, 10_000])
    option("--kept", "links per class", nargs="+", type=int, default=[1, 2, 3, 5, 10, 20])
    option("--seeds", "run seeds 0 to N-1", type=int, default=3, metavar="N")
    option("--per-class", "training samples of a class", type=int, default=50, metavar="N")
    option("--epochs", "at most so many, for every fit", type=int, default=15)
    option(
        "--dense-up-to", "fit all K x K links, too, for so many classes", type=int, default=1000,
        metavar="K",
    )  # fmt: skip
    option("--jobs", "problems at a time", type=int, default=n_cores(), metavar="N")
    option("--json", "keep the rows here; a run that was killed goes on from them", type=Path)
    option(
        "--cells", "fit nothing: put the s-models among these cells of `accuracy` into the rows of "
        "--json, with likelihood and certificate", type=Path, metavar="DIR",
    )  # fmt: skip
    option("--picture", "draw the study here (.png or .svg)", type=Path, metavar="FILE")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the study; return 0."""
    if options.cells:
        return certify(options, parser)
    for name in ("classes", "kept"):
        wrong = [value for value in getattr(options, name) if value < (name == "classes") + 1]
        if wrong or any(value % CLUSTER for value in options.classes):
            parser.error(
                f"--classes must be multiples of {CLUSTER} and --kept at least 1; "
                f"found {options.classes} and {options.kept}"
            )
    for name in ("seeds", "per_class", "epochs", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        if options.json:
            records.require_writable(options.json)
        done = finished(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    grid = [
        Problem(k, seed, options.per_class, options.epochs)
        for k in options.classes
        for seed in range(options.seeds)
    ]
    rows = [row for row in done if _problem_of(row) in grid]
    todo = [problem for problem in grid if problem not in map(_problem_of, rows)]
    print(
        f"nalayer sparsity: {len(grid)} problems, {len(grid) - len(todo)} of them finished before"
    )
    base = records.provenance("sparsity", options.command, "numba", 1, 1)
    with joblib.parallel_config(backend="loky", n_jobs=options.jobs, inner_max_num_threads=1):
        found = joblib.Parallel(return_as="generator_unordered")(
            joblib.delayed(rows_of)(problem, options.kept, options.dense_up_to) for problem in todo
        )
        for new in tqdm(found, total=len(todo), disable=None, leave=False, unit="problem"):
            rows += [base | row for row in new]
            if options.json:
                records.write_rows(records.unfinished(options.json), rows)
    rows.sort(key=lambda row: (row["k"], row["seed"]))
    if options.json:
        records.write_rows(options.json, rows)
        records.unfinished(options.json).unlink(missing_ok=True)
    print("\n".join(lines(rows)))
    if options.picture:
        draw_study(rows, options.picture)
        print(f"\nPicture: {options.picture}")
    return 0


def finished(options: argparse.Namespace) -> list[Row]:
    """Return the rows of a run that was killed before its end."""
    if options.json and records.unfinished(options.json).exists():
        return records.read_rows(records.unfinished(options.json))
    return []


def _problem_of(row: Row) -> Problem:
    return Problem(*(row[name] for name in ("k", "seed", "per_class", "epochs")))


def rows_of(problem: Problem, kept: list[int], dense_up_to: int) -> list[Row]:
    """Fit the baseline, then the sparse s-model for every number of links and source of them."""
    data = draw(problem)
    fits = Fits(problem, data)
    rows = [fits.baseline_row()]
    for source in SOURCES:
        for n_kept in kept:
            if n_kept <= problem.k:
                rows.append(fits.sparse_row(source, n_kept))
    rows.append(fits.sparse_row("true", CLUSTER))
    if problem.k <= dense_up_to:
        rows.append(fits.sparse_row("hard", DENSE))
    return rows


class Fits:
    """The fits on one data set; all noise layers start from one baseline."""

    def __init__(self, problem: Problem, data: Data) -> None:
        self.problem, self.data = problem, data
        self.network = nalayer.mlp(N_IN, (), problem.k)
        rng = stream(problem.seed, "initialisation")
        weights = self.network.initial_weights(rng, np.float32)
        self.fit, self.seconds = self._train(nalayer.PlainModel(self.network), weights)
        self.confusions = {
            source: self._confusion(n_candidates) for source, n_candidates in SOURCES.items()
        }

    def _train(self, model: Any, start: np.ndarray) -> tuple[nalayer.Training, float]:
        started = time.perf_counter()
        fit = nalayer.train(
            model,
            start,
            self.data.x,
            self.data.noisy,
            shuffling=stream(self.problem.seed, "shuffling"),
            validation=self.data.held_out,
            n_epochs=self.problem.epochs,
            patience=PATIENCE,
            batch_size=BATCH,
            optimiser=nalayer.Adam(LEARNING_RATE),
            with_loss=False,
        )
        return fit, time.perf_counter() - started

    def _confusion(self, n_candidates: int) -> scipy.sparse.csr_array:
        """Return the baseline's confusion on the training samples, added up slice by slice."""
        n, k = len(self.data.x), self.problem.k
        total = scipy.sparse.csr_array((k, k))
        for part in slices(n, max(1, AT_ONCE // k)):
            logits = self.network.logits(self.fit.parameters, self.data.x[part])
            q = np.exp(nalayer.log_softmax(logits))
            candidates = min(n_candidates, k)
            total = total + nalayer.confusion_counts(q, self.data.noisy[part], candidates)
        return total

    def _row(self, source: str | None, n_kept: int | None, fit: nalayer.Training) -> Row:
        weights = fit.parameters[: self.network.n_weights]
        x, labels = self.data.test
        right = self.network.predict(weights, x) == labels
        return asdict(self.problem) | {
            "noise": NOISE,
            "labels_hash": fit.labels_hash,
            "source": source,
            "n_kept": n_kept,
            "test_accuracy": float(right.mean()),
            "validation_loss": fit.best.validation_loss,
            "epochs_run": fit.history[-1].number,
        }

    def baseline_row(self) -> Row:
        """Return the row of the network without a noise layer."""
        return self._row(None, None, self.fit) | {"seconds": self.seconds}

    def sparse_row(self, source: str, n_kept: int) -> Row:
        """Fit the s-model over links from one source; DENSE of them are all."""
        k = self.problem.k
        confusion = self.confusions.get(source, self.confusions["hard"])
        if source == "true":
            links = self.data.links
        elif n_kept == DENSE:
            links = kernels.link_index(np.tile(np.arange(k), (k, 1)))
        else:
            links = kernels.link_index(nalayer.top_support(confusion, n_kept))
        channel = nalayer.sparse_confusion_start(confusion, links).astype(np.float32)
        model = SModel(self.network, links=links)
        if n_kept == DENSE:  # the same function by the dense kernel
            model = SModel(self.network)
        fit, seconds = self._train(model, model.pack(self.fit.parameters, channel))
        _, channel = model.unpack(fit.parameters)
        learned = as_sparse(nalayer.noise_matrix(channel.astype(np.float64)), links)
        at_end = likelihood_and_certificate(model, fit.parameters, self.data.x, self.data.noisy)
        return self._row(source, n_kept, fit) | {
            **at_end,
            "noise_matrix_error": error_of(learned, as_sparse(self.data.theta, self.data.links)),
            "seconds": seconds,
            **recovered(links, self.data),
        }


def likelihood_and_certificate(
    model: SModel, parameters: np.ndarray, x: np.ndarray, labels: np.ndarray
) -> Row:
    """Return the training loss, and how much of it another noise matrix could take away (V11)."""
    statistics = e_step_statistics(model, parameters, x, labels)
    return {
        "train_loss": -statistics.log_likelihood / statistics.n_samples,
        "certificate": certificate(statistics),
    }


def certify(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Add the s-models that ``accuracy`` kept to the rows of a file; return 0."""
    if not options.json:
        parser.error("--cells needs --json, the file that the rows go to")
    ignored = [
        f"--{name.replace('_', '-')}"
        for name in OF_THE_STUDY
        if getattr(options, name) != parser.get_default(name)
    ]
    if ignored:
        parser.error(f"--cells fits nothing, so {', '.join(ignored)} cannot go with it")
    base = records.provenance("sparsity", options.command, "numba", 1, 1)
    by = {"certified_by": base["command"], "certified_at": base["commit"]}
    try:
        records.require_writable(options.json)
        rows = records.read_rows(options.json) if options.json.exists() else []
        found = {_cell_place(row): row for row in rows}
        paths = sorted(options.cells.glob("*.npz"))
        for path in tqdm(paths, disable=None, leave=False, unit="cell"):
            row = certified(path)
            if row is not None:
                found[_cell_place(row)] = row | by
    except (OSError, ValueError, CellError) as error:
        parser.error(str(error))
    records.write_rows(options.json, [found[place] for place in sorted(found)])
    print(f"{len(found)} rows in {options.json}")
    return 0


def certified(path: Path) -> Row | None:
    """Return a cell's row with likelihood and certificate; None for other methods' cells."""
    with np.load(path, allow_pickle=False) as archive:
        cell = Cell(**json.loads(str(archive["cell"])))
    if cell.method not in S_MODELS:
        return None
    finished, task = Store(path.parent).load(cell), Task(cell)
    model = s_model_of(task, finished.arrays)
    at_end = likelihood_and_certificate(model, finished.arrays["parameters"], task.x, task.z)
    return finished.row | at_end


def _cell_place(row: Row) -> tuple[Any, ...]:
    """Return what a row is of, to sort by: noise, links (dense last) and seed in the end."""
    about = (row[name] for name in ABOUT_CELLS)
    return *about, row["noise"], row.get("n_kept") or row["n_samples"], row["seed"]


def as_sparse(theta: np.ndarray, links: LinkIndex) -> scipy.sparse.csr_array:
    """Return a noise matrix over links as a sparse matrix (K, K)."""
    k, width = theta.shape
    place = (np.repeat(np.arange(k), width), links.support.ravel())
    return scipy.sparse.csr_array((theta.ravel(), place), shape=(k, k))


def error_of(estimate: scipy.sparse.csr_array, truth: scipy.sparse.csr_array) -> float:
    """Return the mean total variation between rows, as :func:`nalayer.noise_matrix_error`."""
    return float(0.5 * abs(estimate - truth).sum() / truth.shape[0])


def recovered(links: LinkIndex, data: Data) -> dict[str, float | None]:
    """Return how many of the links are true, how many true ones are there, and their noise.

    The diagonal, which is always there, does not count.
    """
    found, truth = (as_sparse(np.ones(one.support.shape), one) for one in (links, data.links))
    common = found.multiply(truth)
    k = truth.shape[0]
    noise = as_sparse(data.theta, data.links).multiply(common).sum() - k * (1 - NOISE)
    n_found, n_true, n_common = (int(one.sum()) - k for one in (found, truth, common))
    return {
        "precision": n_common / n_found if n_found else None,
        "recall": n_common / n_true,
        "noise_kept": max(0.0, float(noise)) / (k * NOISE),
    }


FIGURES = {
    "test_accuracy": "accuracy",
    "recall": "recall of links",
    "precision": "precision",
    "noise_kept": "share of the noise kept",
    "noise_matrix_error": "error of theta",
    "train_loss": "training loss (nats)",
    "validation_loss": "held-out loss (nats)",
}
ABOUT_CELLS = ("dataset", "network", "noise_kind", "fraction")  # the same in one table
CELL_FIGURES = ("test_accuracy", "validation_loss", "train_loss")
CERTIFICATE = "certificate V11, worst (nats)"
WORDS = {"hard": "arg max", "soft": "posterior mass", "true": "true links"}


def settings_in(rows: list[Row]) -> list[tuple[str, int]]:
    """Return the sources and numbers of links that there are, dense last."""
    found = {(row["source"], row["n_kept"]) for row in rows if row["source"]}
    return sorted(found, key=lambda one: (one[0] == "true", one[1] == DENSE, one[0], one[1]))


def lines(rows: list[Row]) -> Iterator[str]:
    """Yield a table for each number of classes."""
    for k in sorted({row["k"] for row in rows}):
        here = [row for row in rows if row["k"] == k]
        of_baseline = [row for row in here if row["source"] is None]
        accuracy = studies.values_of(of_baseline, "test_accuracy")
        loss = studies.values_of(of_baseline, "validation_loss")
        yield (
            f"K = {k}, {here[0]['per_class']} samples of each class, {studies.seeds_in(here)}; "
            f"baseline {studies.interval(accuracy)}, held-out loss {np.mean(loss):.3f}"
        )
        yield ""
        body = []
        for source, n_kept in settings_in(here):
            at = {"source": source, "n_kept": n_kept}
            means = [_mean(studies.values_of(here, key, **at)) for key in list(FIGURES)[1:]]
            worst = max(studies.values_of(here, "certificate", **at))
            accuracy = studies.values_of(here, "test_accuracy", **at)
            kept = "all" if n_kept == DENSE else str(n_kept)
            body.append([WORDS[source], kept, studies.interval(accuracy), *means, f"{worst:.1e}"])
        heads = ["links from", "l", *FIGURES.values(), CERTIFICATE]
        yield from studies.table(heads, body)
        yield ""


def cell_lines(rows: list[Row]) -> Iterator[str]:
    """Yield the table of the s-models that ``accuracy`` trained, against their links.

    Rows of other methods but the baseline do not count; of two of one cell the later one does.
    Raises ValueError for rows of two data sets, networks, kinds of noise or shares of the data.
    """
    about = {tuple(row[name] for name in ABOUT_CELLS) for row in rows}
    if len(about) > 1:
        raise ValueError(f"one table cannot have rows of several {ABOUT_CELLS}: {sorted(about)}")
    found = {
        (row["noise"], row["method"], row.get("n_kept"), row["seed"]): row
        for row in rows
        if row["method"] in (*S_MODELS, "baseline")
    }
    here = list(found.values())
    body = []
    for noise, method, n_kept in sorted(
        {place[:3] for place in found},
        key=lambda one: (one[0], one[1] != "baseline", one[2] or np.inf),
    ):
        at = {"noise": noise, "method": method, "n_kept": n_kept}
        accuracy = studies.values_of(here, "test_accuracy", **at)
        losses = [_mean(studies.values_of(here, key, **at)) for key in CELL_FIGURES[1:]]
        bounds = studies.values_of(here, "certificate", **at)
        kept = {"baseline": "no noise layer", "s": "all"}.get(method, str(n_kept))
        worst = f"{max(bounds):.1e}" if bounds else "-"
        body.append(
            [f"{noise:g}", kept, str(len(accuracy)), studies.interval(accuracy), *losses, worst]
        )
    heads = ["noise", "l", "seeds", *(FIGURES[key] for key in CELL_FIGURES), CERTIFICATE]
    yield from studies.table(heads, body)


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" if values else "-"


def draw_study(rows: list[Row], path: Path) -> None:
    """Draw accuracy, recovered links and held-out loss against the number of links."""
    classes = sorted({row["k"] for row in rows})
    shown = ("test_accuracy", "recall", "validation_loss")
    figure, grid = plt.subplots(
        len(shown), len(classes), squeeze=False, sharex=True, layout="constrained",
        figsize=(1 + 4 * len(classes), 8),
    )  # fmt: skip
    for column, k in enumerate(classes):
        here = [row for row in rows if row["k"] == k]
        for line, key in enumerate(shown):
            axes = grid[line, column]
            for source, style in (("hard", "o-"), ("soft", "s--")):
                kept = sorted({row["n_kept"] for row in here if row["source"] == source} - {DENSE})
                groups = [
                    studies.values_of(here, key, source=source, n_kept=n_kept) for n_kept in kept
                ]
                studies.curve(axes, kept, groups, fmt=style, label=WORDS[source])
            for wanted, colour, words in (
                ({"source": None}, "grey", "baseline"),
                ({"source": "true"}, "green", "true links"),
                ({"n_kept": DENSE}, "red", "dense"),
            ):
                values = studies.values_of(here, key, **wanted)
                if values:
                    axes.axhline(float(np.mean(values)), color=colour, lw=1, ls=":", label=words)
            axes.set_xscale("log")
            if column == 0:
                axes.set_ylabel(FIGURES[key])
        grid[0, column].set_title(f"K = {k}")
        grid[-1, column].set_xlabel("links per class, l")
    grid[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"Links per class: mean and 95 % interval over {studies.seeds_in(rows)}; "
        f"the truth has {CLUSTER}"
    )
    studies.save(figure, path)
