"""Joint noise layer against EM on real digits: same likelihood, step by step, and who ends where.

For every seed: noisy labels; a baseline network trained on them as if they were clean; from its
weights and its confusion matrix, the s-model trained jointly, the s-model trained by alternating
EM, and EM with a damped noise matrix. Then the statements V1-V13 at the points they reached.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import em_baseline
import kernels
import nalayer
from benchmarks import figures, records, suite, summaries
from benchmarks.placement import require_place, there, with_device
from benchmarks.records import Row
from benchmarks.summaries import BASELINE, DAMPED, EM, JOINT
from em_baseline import statements
from em_baseline.end_points import end_points
from em_baseline.rate import channel_limit, rate_of_convergence
from em_baseline.statements import Point, Statement
from nalayer import PlainModel, SModel, stream
from nalayer.datasets import LOADERS, Dataset, load_dataset, validation_split
from nalayer.devices import to_host
from nalayer.label_noise import KINDS
from nalayer.models import check_pseudo_count
from nalayer.training import hash_of_all

HIDDEN_SIZES = (128, 64)
DROPOUT = 0.5
BATCH_SIZE = 64
PATIENCE = 4
VALIDATION_SHARE = 0.1
# BLAS threads wait for each other by spinning; on matrices this small, beside Numba's threads or a
# busy neighbour, that costs far more than it saves.
BLAS_THREADS = 1
N_COMPONENTS = 4  # features of the small head on which M-steps are exact
# Options that only the fits read
OF_THE_FITS = (
    "start",
    "channel_step",
    "inner_epochs",
    "damping",
    "pseudo_count",
    "epochs",
    "no_early_stopping",
)
N_PLAIN_ROUNDS = 20  # of plain EM with exact M-steps, for V9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.epilog = (
        "Without --models, --heads and --suite, V9, V10, V12 and V13 are judged on a softmax "
        "regression of their own (four principal components, hard start, no pseudo-count), where "
        "M-steps can be exact."
    )

    def option(name: str, help: str, **details: Any) -> None:
        parser.add_argument(name, help=help, **details)

    option(
        "--dataset",
        "data to learn from; with --models, --heads or --suite also others than digits",
        default="digits",
        choices=sorted(LOADERS),
    )
    option("--noise", "share of changed labels", type=float, default=0.4)
    option("--noise-kind", "where changed labels go", default="permutation", choices=KINDS)
    option("--seeds", "run seeds 0 to N-1", type=int, default=5, metavar="N")
    option("--start", "start of theta", default="hard", choices=("hard", "soft", "uniform"))
    option(
        "--channel-step",
        "factor on the step size of theta in joint training",
        type=float,
        default=1.0,
        metavar="F",
    )
    option("--inner-epochs", "epochs of a network M-step", type=int, default=5, metavar="S")
    option(
        "--damping",
        "share of EM's step that theta takes in damped EM",
        type=float,
        default=0.05,
        metavar="ETA",
    )
    option(
        "--pseudo-count",
        "Dirichlet pseudo-count on theta, joint and EM alike; no reported L includes it",
        type=float,
        default=0.0,
        metavar="ALPHA",
    )
    option("--epochs", "at most so many epochs or rounds", type=int, default=200, metavar="N")
    parser.add_argument(
        "--no-early-stopping",
        action="store_true",
        help="run the noise-aware methods through all epochs and keep their last parameters",
    )
    parser.add_argument(
        "--suite",
        action="store_true",
        help="instead: every statement for every model, head and kind of noise, on a small problem",
    )
    option(
        "--models",
        "instead: the certificate in full for these models, on a small problem; of the suite",
        nargs="+",
        choices=suite.MODELS,
    )
    option("--heads", "the same for these networks", nargs="+", choices=list(suite.HEADS))
    option("--backend", "kernels to use (None: the default)", choices=sorted(kernels.BACKENDS))
    option("--json", "also write the rows here", type=Path, metavar="FILE")
    option("--out", "write rows and figure here", type=Path, metavar="DIR")


@dataclass(frozen=True)
class Task:
    """What all methods of one seed share: data, noisy labels, network, start."""

    dataset: Dataset
    seed: int
    noise_matrix: np.ndarray
    x: np.ndarray
    noisy_labels: np.ndarray
    validation: tuple[np.ndarray, np.ndarray]
    network: nalayer.Network

    def held_out(self, early_stopping: bool) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the held-out samples for a method that stops early, None for one that does not."""
        return self.validation if early_stopping else None


class Snapshot(NamedTuple):
    """Where a method stood; ``half`` as in em_baseline.HalfStep, "start" or "epoch" otherwise."""

    half: str
    gradients: int
    weights: np.ndarray
    channel_logits: np.ndarray | None


@dataclass
class Fit:
    """One method's result on one task, with a snapshot after every epoch or half-step."""

    method: str
    weights: np.ndarray
    channel_logits: np.ndarray | None
    best: int
    """index in ``trace`` of these parameters"""
    early_stopping: bool
    labels_hash: str
    gradients: int
    """mini-batch gradients taken until training stopped"""
    seconds: float
    n_epochs: int
    """epochs, or rounds of EM, until training stopped"""
    trace: list[Snapshot]
    """after every epoch or half-step, the start included"""
    n_drops: int = 0
    """how often EM warned of a falling likelihood"""

    def ends(self) -> list[Snapshot]:
        """Return the snapshots after whole epochs or rounds, the start first."""
        return [snapshot for snapshot in self.trace if snapshot.half != "noise matrix"]


def make_task(options: argparse.Namespace, dataset: Dataset, seed: int) -> Task:
    """Corrupt the labels, hold out a part, choose the network."""
    noise_stream = stream(seed, "label noise")
    theta = nalayer.make_noise_matrix(
        options.noise_kind, dataset.n_classes, options.noise, noise_stream
    )
    noisy = nalayer.corrupt_labels(dataset.labels_train, theta, noise_stream)
    kept, held_out = validation_split(noisy.size, noisy, VALIDATION_SHARE, stream(seed, "split"))
    return Task(
        dataset,
        seed,
        theta,
        dataset.x_train[kept],
        noisy[kept],
        (dataset.x_train[held_out], noisy[held_out]),
        nalayer.mlp(dataset.x_train.shape[1], HIDDEN_SIZES, dataset.n_classes, DROPOUT),
    )


def _unpack(
    model: PlainModel | SModel, parameters: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the network's weights and the channel logits, None for the baseline."""
    if isinstance(model, PlainModel):
        return parameters, None
    weights, channel_logits = model.unpack(parameters)
    return weights, channel_logits


def _train(
    method: str,
    task: Task,
    model: PlainModel | SModel,
    start: np.ndarray,
    options: argparse.Namespace,
    early_stopping: bool,
    step_factors: np.ndarray | float = 1.0,
) -> Fit:
    """Train by mini-batch Adam; baseline and joint method differ in the model alone."""
    trace: list[Snapshot] = []
    held_out = task.held_out(early_stopping)
    placed = there(options.backend, start, task.x, task.noisy_labels, held_out)
    start, x, noisy_labels, held_out = placed
    result = nalayer.train(
        model,
        start,
        x,
        noisy_labels,
        validation=held_out,
        n_epochs=options.epochs,
        patience=PATIENCE,
        batch_size=BATCH_SIZE,
        step_factors=step_factors,
        on_epoch=lambda epoch, parameters: trace.append(
            Snapshot("epoch", epoch.gradients, *_unpack(model, to_host(parameters.copy())))
        ),
        shuffling=stream(task.seed, "shuffling"),
        dropout=stream(task.seed, "dropout"),
    )
    last = result.history[-1]
    return Fit(
        method,
        *_unpack(model, to_host(result.parameters)),
        result.best.number,
        early_stopping,
        result.labels_hash,
        last.gradients,
        last.seconds,
        last.number,
        trace,
    )


def fit_baseline(task: Task, options: argparse.Namespace) -> Fit:
    """Train the network on the noisy labels as if they were clean."""
    weights = task.network.initial_weights(stream(task.seed, "initialisation"))
    model = PlainModel(task.network, options.backend)
    return _train(BASELINE, task, model, weights, options, early_stopping=True)


def starting_channel(task: Task, baseline: Fit, options: argparse.Namespace) -> np.ndarray:
    """Return the channel logits that joint training and EM both start from."""
    if options.start == "uniform":
        return nalayer.uniform_start(task.dataset.n_classes, init_noise=0.1)
    probabilities = softmax(task.network.logits(baseline.weights, task.x), axis=1)
    return nalayer.confusion_start(probabilities, task.noisy_labels, options.start)


def noisy_start(
    task: Task, baseline: Fit, options: argparse.Namespace
) -> tuple[SModel, np.ndarray]:
    """Return the s-model and the parameters that joint training and EM both start from."""
    model = SModel(task.network, options.pseudo_count, task.x.shape[0], options.backend)
    return model, model.pack(baseline.weights, starting_channel(task, baseline, options))


def fit_joint(task: Task, baseline: Fit, options: argparse.Namespace) -> Fit:
    """Train network and noise layer together (Section 3 of the paper)."""
    model, start = noisy_start(task, baseline, options)
    return _train(
        JOINT,
        task,
        model,
        start,
        options,
        early_stopping=not options.no_early_stopping,
        step_factors=model.step_factors(options.channel_step),
    )


def fit_em(
    method: str, task: Task, baseline: Fit, options: argparse.Namespace, damping: float
) -> Fit:
    """Alternate E-step and M-steps (Eqs. 3-6) from the same start."""
    trace: list[Snapshot] = []
    model, start = noisy_start(task, baseline, options)
    held_out = task.held_out(not options.no_early_stopping)
    placed = there(options.backend, start, task.x, task.noisy_labels, held_out)
    start, x, noisy_labels, held_out = placed
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", em_baseline.LikelihoodDropWarning)
        result = em_baseline.fit(
            model,
            start,
            x,
            noisy_labels,
            network_step=em_baseline.MiniBatches(options.inner_epochs, BATCH_SIZE),
            n_rounds=options.epochs,
            patience=PATIENCE,
            validation=held_out,
            damping=damping,
            on_half_step=lambda step, parameters: trace.append(
                Snapshot(step.half, step.gradients, *_unpack(model, to_host(parameters.copy())))
            ),
            shuffling=stream(task.seed, "shuffling"),
            dropout=stream(task.seed, "dropout"),
        )
    last = result.history[-1]
    return Fit(
        method,
        *_unpack(model, to_host(result.parameters)),
        2 * result.best.round,
        not options.no_early_stopping,
        result.labels_hash,
        last.gradients,
        last.seconds,
        last.round,
        trace,
        len(caught),
    )


def fit_all(task: Task, options: argparse.Namespace, progress: Callable[[str], None]) -> list[Fit]:
    """Run every method on one task, the later ones from the baseline."""
    progress(f"seed {task.seed}: {BASELINE}")
    baseline = fit_baseline(task, options)
    progress(f"seed {task.seed}: {JOINT}")
    joint = fit_joint(task, baseline, options)
    progress(f"seed {task.seed}: {EM}")
    em = fit_em(EM, task, baseline, options, damping=1.0)
    progress(f"seed {task.seed}: {DAMPED}")
    damped = fit_em(DAMPED, task, baseline, options, damping=options.damping)
    fits = [baseline, joint, em, damped]
    require_noisy_labels(task, fits)
    return fits


def require_noisy_labels(task: Task, fits: list[Fit]) -> None:
    """Refuse results of which any was trained on other labels than the task's noisy ones.

    Each fit carries the fingerprint that its trainer took from the labels it was given.
    """
    for fit in fits:
        expected = hash_of_all(task.noisy_labels, task.held_out(fit.early_stopping))
        if fit.labels_hash != expected:
            raise RuntimeError(
                f"{fit.method}, seed {task.seed}: trained on labels {fit.labels_hash}, but the "
                f"noisy labels of this seed are {expected}"
            )


def identities(task: Task, fits: list[Fit], options: argparse.Namespace) -> Iterator[Statement]:
    """Yield V1-V8 and V11 at the points that the methods reached."""
    rng = stream(task.seed, "directions")
    for fit in fits:
        points = [
            Point(task.network, weights, channel, task.x, task.noisy_labels, options.backend)
            for _, _, weights, channel in fit.trace
            if channel is not None
        ]
        if not points:
            continue
        here = points[fit.best]
        for point in (points[0], here):
            yield from statements.same_function(point)
            yield from statements.backward_is_e_step(point, rng)
            yield from statements.fisher_identity(point, rng)
            yield from statements.em_step_is_preconditioned_gradient(point)
            yield from statements.m_step_is_maximiser(point, point.m_step(), rng)
            yield from statements.relabelling_invariance(point, rng)
            yield from statements.collapses(point, rng)
        if fit.method == EM and not options.pseudo_count:
            # What the fit itself stored: from the start, and from the last round.
            for before in (0, 2 * fit.n_epochs - 2):
                yield from statements.m_step_is_maximiser(points[before], points[before + 1], rng)
        step = "epoch" if fit.method == JOINT else "half-step"
        yield from statements.exact_ledger(f"every {step} of {fit.method}", points)
        yield from statements.certified(fit.method, here)


def small_head(task: Task, options: argparse.Namespace) -> Point:
    """Return a start for exact M-steps: softmax regression on a few principal components.

    Few features and noisy labels keep the maximiser of S(w) finite.
    """
    centred = task.x - task.x.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    features = np.ascontiguousarray(centred @ axes[:N_COMPONENTS].T)
    network = nalayer.mlp(N_COMPONENTS, (), task.dataset.n_classes)
    start = network.initial_weights(stream(task.seed, "initialisation"))
    placed = there(options.backend, start, features, task.noisy_labels)
    weights, _ = to_host(em_baseline.minimise(PlainModel(network, options.backend), *placed))
    channel = nalayer.confusion_start(
        softmax(network.logits(weights, features), axis=1), task.noisy_labels
    )
    return Point(network, weights, channel, features, task.noisy_labels, options.backend)


def at_the_optimum(
    task: Task, options: argparse.Namespace, describe: Callable[[str], None] = lambda words: None
) -> Iterator[Statement]:
    """Yield V9, V10, V12 and V13: EM with exact M-steps on the small head, run to its limit.

    ``describe`` is told how far it has got.
    """
    start, rng = small_head(task, options), stream(task.seed, "shuffling")
    plain = em_baseline.fit(
        *start.there(start.model, start.parameters, start.x, start.noisy_labels),
        network_step=em_baseline.LBFGS(),
        n_rounds=N_PLAIN_ROUNDS,
        shuffling=rng,
    )
    yield from statements.monotone(plain.history, start.n, every_half_step=False)
    limits = statements.find_limits(
        start, rng, on_half_step=lambda step, *_: describe(f"exact EM: round {step.round}")
    )
    yield from statements.monotone(limits.history, start.n, every_half_step=True)
    yield from statements.same_stationary_points(limits, rng)
    yield from end_points(limits)
    describe("rate of EM on theta")
    yield from rate_of_convergence(channel_limit(limits.em), rng)


def accuracy_row(task: Task, fit: Fit, options: argparse.Namespace) -> Row:
    """Return one method's figures on one seed. Clean test labels are used here and only here."""
    predicted = task.network.predict(fit.weights, task.dataset.x_test)
    layer_sizes = (task.x.shape[1], *HIDDEN_SIZES, task.dataset.n_classes)
    return {
        "dataset": task.dataset.name,
        "network": "mlp " + "-".join(map(str, layer_sizes)),
        "method": fit.method,
        "noise": options.noise,
        "noise_kind": options.noise_kind,
        "start": options.start,
        "inner_epochs": options.inner_epochs,
        "damping": options.damping,
        "pseudo_count": options.pseudo_count,
        "fraction": 1.0,
        "seed": task.seed,
        "test_accuracy": float((predicted == task.dataset.labels_test).mean()),
        "log_likelihood": _log_likelihood(task, fit, task.x, task.noisy_labels),
        "validation_log_likelihood": _log_likelihood(task, fit, *task.validation),
        "network_log_likelihood": -PlainModel(task.network).nll(
            fit.weights, task.x, task.noisy_labels
        ),
        **_noise_matrix_figures(task, fit),
        "epochs": fit.n_epochs,
        "gradients": fit.gradients,
        "seconds": round(fit.seconds, 3),
        "early_stopping": fit.early_stopping,
        "likelihood_drops": fit.n_drops,
        "labels_hash": hash_of_all(task.noisy_labels, task.validation),
    }


def _log_likelihood(task: Task, fit: Fit, x: np.ndarray, labels: np.ndarray) -> float:
    """Return the log-likelihood of noisy labels, nats per sample, without pseudo-counts."""
    if fit.channel_logits is None:
        return -PlainModel(task.network).nll(fit.weights, x, labels)
    model = SModel(task.network)
    return -model.nll(model.pack(fit.weights, fit.channel_logits), x, labels)


def _noise_matrix_figures(task: Task, fit: Fit) -> Row:
    """Return how far theta ends from the truth, how far it went, and how sure of the labels it is.

    Distances are means over rows of the total variation.
    """
    if fit.channel_logits is None:
        return {}
    start, first, *_ = (
        nalayer.noise_matrix(snapshot.channel_logits)
        for snapshot in fit.ends()
        if snapshot.channel_logits is not None
    )
    end = nalayer.noise_matrix(fit.channel_logits)
    return {
        "noise_matrix_error": nalayer.noise_matrix_error(end, task.noise_matrix),
        "noise_matrix_start_error": nalayer.noise_matrix_error(start, task.noise_matrix),
        "noise_matrix_first_move": nalayer.noise_matrix_error(first, start),
        "noise_matrix_diagonal": float(np.diag(end).mean()),
    }


def curve_rows(task: Task, fits: list[Fit]) -> Iterator[Row]:
    """Yield what the figure needs: likelihood curves, noise matrices, ledger."""
    yield {
        "matrix": "true",
        "seed": task.seed,
        "theta": [round(float(p), 6) for p in task.noise_matrix.ravel()],
    }
    for fit in fits:
        if fit.channel_logits is None:
            continue
        theta = nalayer.noise_matrix(fit.channel_logits)
        yield {
            "matrix": fit.method,
            "seed": task.seed,
            "theta": [round(float(p), 6) for p in theta.ravel()],
        }
        previous = None
        for number, (_, gradients, weights, channel) in enumerate(fit.ends()):
            assert channel is not None
            point = Point(task.network, weights, channel, task.x, task.noisy_labels)
            row = {
                "curve": fit.method,
                "seed": task.seed,
                "epoch": number,
                "gradients": gradients,
                "log_likelihood": float(point.e_step().log_likelihood_t.mean()),
            }
            if previous is not None:
                entry = statements.ledger(previous, point)
                row |= {name: value / point.n for name, value in asdict(entry).items()}
            previous = point
            yield row


def compile_kernels(options: argparse.Namespace) -> float:
    """Call every kernel once; return the seconds that compiling (or loading) them took."""
    started = time.perf_counter()
    placed = there(options.backend, np.zeros((2, 2)), np.array([0, 1]), np.full((2, 2), 0.5))
    logits, labels, halves = placed
    kernels.softmax_nll(logits, labels, backend=options.backend)
    kernels.soft_target_nll(logits, halves, backend=options.backend)
    kernels.s_model_nll(logits, logits, labels, backend=options.backend)
    kernels.s_model_posterior(logits, logits, labels, backend=options.backend)
    return time.perf_counter() - started


def _checked(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Dataset:
    """Refuse options that cannot work, before anything runs; return the data set."""
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1; found {options.seeds}")
    if options.inner_epochs < 1 or options.epochs < 1:
        parser.error("--inner-epochs and --epochs must be at least 1")
    if not 0 < options.damping <= 1:
        parser.error(f"--damping must lie in (0, 1]; found {options.damping}")
    if not 0 <= options.channel_step < np.inf:
        parser.error(f"--channel-step must be at least 0; found {options.channel_step}")
    if options.suite or options.models or options.heads:
        without_use = [*OF_THE_FITS, "noise_kind"] if options.suite else OF_THE_FITS
        for name in without_use:
            if getattr(options, name) != parser.get_default(name):
                parser.error(
                    f"--{name.replace('_', '-')} has no meaning with --suite"
                    f"{'' if options.suite else ', --models or --heads'}"
                )
    elif options.dataset != "digits":
        parser.error(
            f"--dataset {options.dataset} needs --models, --heads or --suite: the fits are made "
            "for digits"
        )
    try:
        dataset = load_dataset(options.dataset)
        nalayer.make_noise_matrix(
            options.noise_kind, dataset.n_classes, options.noise, stream(0, "label noise")
        )
        check_pseudo_count(options.pseudo_count)
        require_place(options.backend)
        for path in _destinations(options):
            records.require_writable(path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return dataset


def _destinations(options: argparse.Namespace) -> list[Path]:
    """Return the files that the rows go to."""
    in_folder = options.out / "equivalence.jsonl" if options.out else None
    return [path for path in (options.json, in_folder) if path]


def measure(
    options: argparse.Namespace,
    dataset: Dataset,
    keep: Callable[[Iterable[Row]], None],
    progress: Callable[[str], None],
    describe: Callable[[str], None],
) -> None:
    """Fit every method on every seed and judge them; hand over the rows as they come.

    ``progress`` is told of every finished part, ``describe`` of what goes on within one.
    """
    for seed in range(options.seeds):
        task = make_task(options, dataset, seed)
        fits = fit_all(task, options, progress)
        progress(f"seed {seed}: statements")
        keep(accuracy_row(task, fit, options) for fit in fits)
        keep(suite.statement_rows(identities(task, fits, options), seed))
        if seed == 0:
            keep(curve_rows(task, fits))
    progress("exact EM")
    first = make_task(options, dataset, seed=0)
    keep(suite.statement_rows(at_the_optimum(first, options, describe), seed=0))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the benchmark; return 0 if every statement holds, else 1."""
    dataset = _checked(options, parser)
    if options.suite or options.models or options.heads:
        return run_suite(options)
    print(
        f"nalayer equivalence: {options.dataset}, {options.noise:.0%} {options.noise_kind} noise, "
        f"{options.seeds} seed{'s' * (options.seeds > 1)}, {len(summaries.METHODS)} methods each; "
        f"with the default options about {15 + 8 * options.seeds} s on two idle cores, and up to "
        "10 s once to compile kernels.",
        flush=True,
    )
    compile_seconds = compile_kernels(options)
    started = time.perf_counter()
    backend = options.backend or kernels.api.DEFAULT_BACKEND
    base = with_device(
        records.provenance(
            "equivalence", options.command, backend, kernels.thread_count(), BLAS_THREADS
        )
    )
    rows: list[Row] = []

    def keep(new: Iterable[Row]) -> None:
        rows.extend(base | row for row in new)
        for path in _destinations(options):
            records.write_rows(records.unfinished(path), rows)

    steps = (len(summaries.METHODS) + 1) * options.seeds + 1
    with tqdm(total=steps, disable=None, leave=False) as bar:

        def progress(words: str) -> None:
            bar.update()
            bar.set_description(words)

        try:
            with threadpool_limits(BLAS_THREADS, user_api="blas"):
                measure(options, dataset, keep, progress, bar.set_description)
        except KeyboardInterrupt:
            for path in _destinations(options) if rows else []:
                tqdm.write(f"Rows so far: {records.unfinished(path)}", file=sys.stderr)
            raise
    for path in _destinations(options):
        os.replace(records.unfinished(path), path)

    _print_report(rows, compile_seconds, time.perf_counter() - started)
    if options.out:
        picture = options.out / "equivalence.png"
        figures.draw_equivalence(rows, picture)
        print(f"\nPicture: {picture}\nRows:    {options.out / 'equivalence.jsonl'}")
    return 0 if all(row["holds"] for row in rows if "statement" in row) else 1


def run_suite(options: argparse.Namespace) -> int:
    """Try every statement for all models, heads and noise asked for; return 0 if all hold, else 1.

    ``--suite`` prints one table, otherwise each configuration has its certificate.
    """
    name = "suite" if options.suite else "certificates"
    grid = suite.configurations(options)
    print(f"nalayer equivalence, {name}: {len(grid)} configurations.\n", flush=True)
    backend = options.backend or kernels.api.DEFAULT_BACKEND
    base = with_device(records.provenance(name, options.command, backend, 1, 1))
    path = options.json or (options.out / f"{name}.jsonl" if options.out else None)
    rows: list[Row] = []
    for found in suite.measure(options):
        rows += [base | row for row in found]
        if path:
            records.write_rows(records.unfinished(path), rows)
    if path:
        os.replace(records.unfinished(path), path)
    print("\n".join(suite.table(rows) if options.suite else suite.certificates(rows)))
    failed = [row for row in rows if not row["holds"]]
    for row in failed:
        print(
            f"FAILS: {row['statement']}, {row['words']}: {row['model']}, {row['head']}, "
            f"{row['noise_kind']}, seed {row['seed']}: {row['residual']:.1e} {row['detail']}"
        )
    return 1 if failed else 0


def _print_report(rows: list[Row], compile_seconds: float, seconds: float) -> None:
    print("\n(a) Who ends where (means over seeds; L in nats per sample, higher is better)\n")
    print("\n".join(summaries.accuracy_table(rows)))
    print("\n(b) What ties them together (the case closest to its bound)\n")
    print("\n".join(summaries.statement_table(rows)))
    print("\n(c) In words\n")
    print("\n".join(summaries.conclusions(rows)))
    print(f"\nTook {seconds:.0f} s, and {compile_seconds:.0f} s to compile the kernels.")
