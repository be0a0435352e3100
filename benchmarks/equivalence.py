"""Joint noise layer against EM on real digits: same likelihood, step by step, and who ends where.

For every seed: noisy labels; a baseline network trained on them as if they were clean; from its
weights and its confusion matrix, the s-model trained jointly, the s-model trained by alternating
EM, and EM with a damped noise matrix. Then the statements V1-V11 at the points they reached.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import softmax
from tqdm import tqdm

import em_baseline
import kernels
import nalayer
from benchmarks import figures, records, report
from benchmarks.records import Row
from benchmarks.report import BASELINE, DAMPED, EM, JOINT
from em_baseline import statements
from em_baseline.statements import Point, Statement
from nalayer import PlainModel, SModel, stream
from nalayer.datasets import LOADERS, Dataset, load_dataset, validation_split
from nalayer.label_noise import KINDS
from nalayer.models import check_pseudo_count

HIDDEN_SIZES = (128, 64)
DROPOUT = 0.5
BATCH_SIZE = 64
N_EPOCHS = 200
PATIENCE = 4
VALIDATION_SHARE = 0.1
N_COMPONENTS = 4  # features of the small head on which M-steps are exact
N_PLAIN_ROUNDS = 20  # of plain EM with exact M-steps, for V9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--dataset", default="digits", choices=sorted(LOADERS))
    parser.add_argument("--noise", type=float, default=0.4, help="share of changed labels")
    parser.add_argument("--noise-kind", default="permutation", choices=KINDS)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N-1")
    parser.add_argument("--start", default="hard", choices=("hard", "soft", "uniform"))
    parser.add_argument(
        "--channel-step",
        type=float,
        default=1.0,
        metavar="F",
        help="factor on the noise layer's step size in joint training",
    )
    parser.add_argument(
        "--inner-epochs", type=int, default=5, metavar="S", help="epochs of each network M-step"
    )
    parser.add_argument(
        "--damping",
        type=float,
        default=0.05,
        metavar="ETA",
        help="theta moves this share of EM's step in damped EM",
    )
    parser.add_argument(
        "--pseudo-count",
        type=float,
        default=0.0,
        metavar="ALPHA",
        help="Dirichlet pseudo-count on theta, joint and EM alike",
    )
    parser.add_argument(
        "--epochs", type=int, default=N_EPOCHS, metavar="N", help="at most so many epochs or rounds"
    )
    parser.add_argument("--backend", default=None, choices=sorted(kernels.BACKENDS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write rows and figure here")


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

    @property
    def labels_hash(self) -> str:
        """Fingerprint of the noisy training labels."""
        return nalayer.labels_hash(self.noisy_labels)


class Snapshot(NamedTuple):
    """Where a method stood; ``half`` as in em_baseline.HalfStep, "start" or "epoch" otherwise."""

    half: str
    loss: float
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
    labels_hash: str
    loss: float
    validation_loss: float
    gradients: int
    """mini-batch gradients taken until training stopped"""
    seconds: float
    n_epochs: int
    """epochs, or rounds of EM, until training stopped"""
    trace: list[Snapshot]
    """after every epoch or half-step, the start included"""
    drops: list[str] = field(default_factory=list)
    """EM's warnings of a falling likelihood"""

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


def _given(validation_loss: float | None) -> float:
    """Return the loss on the held-out samples, which every method here is given."""
    assert validation_loss is not None
    return validation_loss


def _train(
    method: str,
    task: Task,
    model: PlainModel | SModel,
    start: np.ndarray,
    options: argparse.Namespace,
    step_factors: np.ndarray | float = 1.0,
) -> Fit:
    """Train by mini-batch Adam; baseline and joint method differ in the model alone."""
    trace: list[Snapshot] = []

    def unpack(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return model.unpack(parameters) if isinstance(model, SModel) else (parameters, None)

    result = nalayer.train(
        model,
        start,
        task.x,
        task.noisy_labels,
        validation=task.validation,
        n_epochs=options.epochs,
        patience=PATIENCE,
        batch_size=BATCH_SIZE,
        step_factors=step_factors,
        on_epoch=lambda epoch, parameters: trace.append(
            Snapshot("epoch", epoch.loss, epoch.gradients, *unpack(parameters.copy()))
        ),
        shuffling=stream(task.seed, "shuffling"),
        dropout=stream(task.seed, "dropout"),
    )
    last = result.history[-1]
    return Fit(
        method,
        *unpack(result.parameters),
        result.best.number,
        result.labels_hash,
        result.best.loss,
        _given(result.best.validation_loss),
        last.gradients,
        last.seconds,
        last.number,
        trace,
    )


def fit_baseline(task: Task, options: argparse.Namespace) -> Fit:
    """Train the network on the noisy labels as if they were clean."""
    weights = task.network.initial_weights(stream(task.seed, "initialisation"))
    return _train(BASELINE, task, PlainModel(task.network, options.backend), weights, options)


def starting_channel(task: Task, baseline: Fit, options: argparse.Namespace) -> np.ndarray:
    """Return the channel logits that joint training and EM both start from."""
    if options.start == "uniform":
        return nalayer.uniform_start(task.dataset.n_classes, init_noise=0.1)
    probabilities = softmax(task.network.logits(baseline.weights, task.x), axis=1)
    return nalayer.confusion_start(probabilities, task.noisy_labels, options.start)


def fit_joint(task: Task, baseline: Fit, options: argparse.Namespace) -> Fit:
    """Train network and noise layer together (Section 3 of the paper)."""
    model = SModel(task.network, options.pseudo_count, task.x.shape[0], options.backend)
    start = model.pack(baseline.weights, starting_channel(task, baseline, options))
    return _train(JOINT, task, model, start, options, model.step_factors(options.channel_step))


def fit_em(
    method: str, task: Task, baseline: Fit, options: argparse.Namespace, damping: float
) -> Fit:
    """Alternate E-step and M-steps (Eqs. 3-6) from the same start."""
    trace: list[Snapshot] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", em_baseline.LikelihoodDropWarning)
        result = em_baseline.fit(
            task.network,
            baseline.weights,
            starting_channel(task, baseline, options),
            task.x,
            task.noisy_labels,
            network_step=em_baseline.MiniBatches(options.inner_epochs, BATCH_SIZE),
            n_rounds=options.epochs,
            patience=PATIENCE,
            validation=task.validation,
            damping=damping,
            pseudo_count=options.pseudo_count,
            backend=options.backend,
            on_half_step=lambda step, weights, channel_logits: trace.append(
                Snapshot(
                    step.half, step.loss, step.gradients, weights.copy(), channel_logits.copy()
                )
            ),
            shuffling=stream(task.seed, "shuffling"),
            dropout=stream(task.seed, "dropout"),
        )
    last = result.history[-1]
    return Fit(
        method,
        result.weights,
        result.channel_logits,
        2 * result.best.round,
        result.labels_hash,
        result.best.loss,
        _given(result.best.validation_loss),
        last.gradients,
        last.seconds,
        last.round,
        trace,
        [str(w.message) for w in caught],
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
        if fit.labels_hash != task.labels_hash:
            raise RuntimeError(
                f"{fit.method}, seed {task.seed}: trained on labels {fit.labels_hash}, but the "
                f"noisy labels of this seed are {task.labels_hash}"
            )


def identities(task: Task, fits: list[Fit], options: argparse.Namespace) -> Iterator[Statement]:
    """Yield V1-V8 and V11 at the points that the methods reached."""
    rng = stream(task.seed, "directions")
    for fit in fits:
        points = [
            Point(task.network, weights, channel, task.x, task.noisy_labels, options.backend)
            for _, _, _, weights, channel in fit.trace
            if channel is not None
        ]
        if not points:
            continue
        here = points[fit.best]
        for point in (points[0], here):
            yield from statements.same_function(point)
            yield from statements.backward_is_e_step(point, rng)
            yield from statements.fisher_identity(point)
            yield from statements.em_step_is_preconditioned_gradient(point)
            yield from statements.m_step_is_maximiser(point, point.m_step(), rng)
            yield from statements.relabelling_invariance(point, rng)
            yield from statements.collapses(point, rng)
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
    weights, _ = em_baseline.minimise(
        PlainModel(network, options.backend),
        network.initial_weights(stream(task.seed, "initialisation")),
        features,
        task.noisy_labels,
    )
    channel = nalayer.confusion_start(
        softmax(network.logits(weights, features), axis=1), task.noisy_labels
    )
    return Point(network, weights, channel, features, task.noisy_labels, options.backend)


def at_the_optimum(task: Task, options: argparse.Namespace) -> Iterator[Statement]:
    """Yield V9 and V10: EM with exact M-steps on the small head, run to its limit."""
    start, rng = small_head(task, options), stream(task.seed, "shuffling")
    plain = em_baseline.fit(
        start.network,
        start.weights,
        start.channel_logits,
        start.x,
        start.noisy_labels,
        network_step=em_baseline.LBFGS(),
        n_rounds=N_PLAIN_ROUNDS,
        shuffling=rng,
        backend=options.backend,
    )
    yield from statements.monotone(plain.history, start.n, every_half_step=False)
    limits = statements.find_limits(start, rng)
    yield from statements.monotone(limits.history, start.n, every_half_step=True)
    yield from statements.same_stationary_points(limits, rng)


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
        "log_likelihood": -fit.loss,
        "validation_log_likelihood": -fit.validation_loss,
        **_noise_matrix_figures(task, fit),
        "epochs": fit.n_epochs,
        "gradients": fit.gradients,
        "seconds": round(fit.seconds, 3),
        "likelihood_drops": len(fit.drops),
        "labels_hash": fit.labels_hash,
    }


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
        for number, (_, loss, gradients, weights, channel) in enumerate(fit.ends()):
            assert channel is not None
            point = Point(task.network, weights, channel, task.x, task.noisy_labels)
            row = {
                "curve": fit.method,
                "seed": task.seed,
                "epoch": number,
                "gradients": gradients,
                "log_likelihood": -loss,
            }
            if previous is not None:
                entry = statements.ledger(previous, point)
                row |= {name: value / point.n for name, value in asdict(entry).items()}
            previous = point
            yield row


def statement_rows(cases: Iterable[Statement], seed: int) -> list[Row]:
    """Return one row per statement: the case closest to its bound, or beyond it."""
    grouped: dict[tuple[str, str], list[Statement]] = {}
    for case in cases:
        grouped.setdefault((case.statement, case.words), []).append(case)
    rows = []
    for group in grouped.values():
        worst = max(group, key=_closeness)
        row = asdict(worst) | {"holds": all(case.holds for case in group)}
        if not np.isfinite(worst.residual):
            row["residual"] = None  # JSON knows no NaN
        rows.append(row | {"cases": len(group), "seed": seed})
    return rows


def _closeness(case: Statement) -> float:
    """Return how much of its bound a case uses up; NaN, which never holds, comes last."""
    share = case.residual / case.bound
    return np.inf if np.isnan(share) else share


def _compile_kernels(options: argparse.Namespace) -> float:
    """Call every kernel once; return the seconds that compiling (or loading) them took."""
    started = time.perf_counter()
    logits, labels = np.zeros((2, 2)), np.array([0, 1])
    kernels.softmax_nll(logits, labels, backend=options.backend)
    kernels.soft_target_nll(logits, np.full((2, 2), 0.5), backend=options.backend)
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
    if not options.channel_step >= 0:
        parser.error(f"--channel-step must be at least 0; found {options.channel_step}")
    try:
        dataset = load_dataset(options.dataset)
        nalayer.make_noise_matrix(
            options.noise_kind, dataset.n_classes, options.noise, stream(0, "label noise")
        )
        check_pseudo_count(options.pseudo_count)
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
) -> None:
    """Fit every method on every seed and judge them; hand over the rows as they come."""
    for seed in range(options.seeds):
        task = make_task(options, dataset, seed)
        fits = fit_all(task, options, progress)
        progress(f"seed {seed}: statements")
        keep(accuracy_row(task, fit, options) for fit in fits)
        keep(statement_rows(identities(task, fits, options), seed))
        if seed == 0:
            keep(curve_rows(task, fits))
    progress("exact M-steps to the limit")
    keep(statement_rows(at_the_optimum(make_task(options, dataset, 0), options), seed=0))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the benchmark; return 0 if every statement holds, else 1."""
    dataset = _checked(options, parser)
    print(
        f"nalayer equivalence: {options.dataset}, {options.noise:.0%} {options.noise_kind} noise, "
        f"{options.seeds} seed{'s' * (options.seeds > 1)}, {len(report.METHODS)} methods each; "
        f"about {15 + 6 * options.seeds} s on two cores, and up to 20 s once to compile kernels.",
        flush=True,
    )
    compile_seconds = _compile_kernels(options)
    started = time.perf_counter()
    backend = options.backend or kernels.api.DEFAULT_BACKEND
    base = records.provenance("equivalence", backend, kernels.thread_count())
    rows: list[Row] = []

    def keep(new: Iterable[Row]) -> None:
        rows.extend(base | row for row in new)
        for path in _destinations(options):
            records.write_rows(path, rows)

    steps = (len(report.METHODS) + 1) * options.seeds + 1
    with tqdm(total=steps, disable=None, leave=False) as bar:

        def progress(words: str) -> None:
            bar.update()
            bar.set_description(words)

        measure(options, dataset, keep, progress)

    _print_report(rows, compile_seconds, time.perf_counter() - started)
    if options.out:
        picture = options.out / "equivalence.png"
        figures.draw_equivalence(rows, picture)
        print(f"\nPicture: {picture}\nRows:    {options.out / 'equivalence.jsonl'}")
    return 0 if all(row["holds"] for row in rows if "statement" in row) else 1


def _print_report(rows: list[Row], compile_seconds: float, seconds: float) -> None:
    print("\n(a) Who ends where (means over seeds; L in nats per sample, higher is better)\n")
    print("\n".join(report.accuracy_table(rows)))
    print("\n(b) What ties them together (the case closest to its bound)\n")
    print("\n".join(report.statement_table(rows)))
    print("\n(c) In words\n")
    print("\n".join(report.conclusions(rows)))
    print(f"\nTook {seconds:.0f} s, and {compile_seconds:.0f} s to compile the kernels.")
