"""Every statement for every model: s, c, sparse s and sparse c, two heads, three kinds of noise.

Four classes of the data set, some hundred samples and a few principal components of them: so small
that M-steps can be exact, c-models included, and information matrices whole.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import joblib
import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import em_baseline
import kernels
import nalayer
from benchmarks import summaries
from benchmarks.machine import n_cores
from benchmarks.placement import CUPY, there
from benchmarks.records import Row
from em_baseline import statements
from em_baseline.end_points import end_points
from em_baseline.rate import channel_limit, rate_of_convergence
from em_baseline.statements import Point, Statement
from nalayer import PlainModel, stream
from nalayer.datasets import load_dataset
from nalayer.devices import to_host

MODELS = ("s", "c", "sparse-s", "sparse-c")
HEADS = {"softmax regression": (), "mlp": (6,)}
NOISE_KINDS = ("permutation", "symmetric", "pair-flip")
N_CLASSES, N_SAMPLES, N_COMPONENTS, N_KEPT = 4, 400, 3, 3
N_EPOCHS, BATCH_SIZE = 30, 32  # of the network that all start from
N_COPIES = 5  # of every sample where the model draws labels of its own
N_ROUNDS = 1000  # of exact EM at most
N_CLIMBS, N_ITERATIONS = 10, 50  # rounds of EM with an MLP, and of L-BFGS in each half
ABOUT = ("dataset", "model", "head", "noise_kind")
AT_KINKS = "not judged: an MLP's M-steps end at kinks of its ReLUs, where there is no gradient"
NOT_JUDGED = {
    "V10": AT_KINKS,
    "V12": "not judged: an MLP's features are all but collinear here, and the best U is far away",
    "V13": AT_KINKS,
}
"""why a certificate has no row of a statement"""


@dataclass(frozen=True)
class Configuration:
    """A place where all statements are tried."""

    dataset: str
    model: str
    head: str
    noise_kind: str
    noise: float
    seed: int
    backend: str | None = None


def configurations(options: argparse.Namespace) -> list[Configuration]:
    """Return what was asked for: with ``--suite`` every kind of noise, else the one named."""
    axes = (
        options.models or MODELS,
        options.heads or HEADS,
        NOISE_KINDS if options.suite else [options.noise_kind],
        range(options.seeds),
    )
    return [
        Configuration(options.dataset, model, head, kind, options.noise, seed, options.backend)
        for model, head, kind, seed in itertools.product(*axes)
    ]


def start_of(configuration: Configuration) -> Point:
    """Return the model where training would start: on a trained network, from its confusion."""
    seed = configuration.seed
    data = load_dataset(configuration.dataset)
    of_classes = np.flatnonzero(data.labels_train < N_CLASSES)
    chosen = stream(seed, "subset").permutation(of_classes)[:N_SAMPLES]
    noise_stream = stream(seed, "label noise")
    theta = nalayer.make_noise_matrix(
        configuration.noise_kind, N_CLASSES, configuration.noise, noise_stream
    )
    z = nalayer.corrupt_labels(data.labels_train[chosen], theta, noise_stream)
    centred = data.x_train[chosen] - data.x_train[chosen].mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    x = np.ascontiguousarray(centred @ axes[:N_COMPONENTS].T)
    network = nalayer.mlp(N_COMPONENTS, HEADS[configuration.head], N_CLASSES)
    start = network.initial_weights(stream(seed, "initialisation"))
    trained = nalayer.train(
        PlainModel(network, configuration.backend),
        *there(configuration.backend, start, x, z),
        n_epochs=N_EPOCHS,
        patience=None,
        batch_size=BATCH_SIZE,
        shuffling=stream(seed, "shuffling"),
    )
    weights = to_host(trained.parameters)
    q = np.exp(kernels.log_softmax(network.logits(weights, x)))
    # The floor keeps every entry alive: what is compared are optima, not who starts dead.
    channel = nalayer.confusion_start(q, z, floor=1e-2)
    point = Point(network, weights, channel, x, z, configuration.backend)
    if configuration.model.endswith("c"):
        shape = (N_CLASSES, N_CLASSES, network.n_hidden)
        point = replace(point, channel_weights=0.1 * stream(seed, "directions").normal(size=shape))
    return _sparse(point) if configuration.model.startswith("sparse") else point


def _sparse(point: Point) -> Point:
    links = kernels.link_index(
        nalayer.top_support(nalayer.noise_matrix(point.channel_logits), N_KEPT)
    )
    u = point.channel_weights
    return replace(
        point,
        channel_logits=nalayer.gather_links(point.channel_logits, links),
        channel_weights=None if u is None else nalayer.gather_links(u, links),
        links=links,
    )


def drawn_from(point: Point, rng: np.random.Generator) -> Point:
    """Return the point with labels that the model itself draws, for V12.

    Every link of its noise layer is used, so the best one is near and lies inside. The real labels'
    is often at infinity (some class is never taken for some other), where EM's rate is no property
    of a limit.
    """
    theta = np.exp(kernels.log_softmax(point.channel_logits))
    mixed = np.log(0.5 * theta + 0.5 / theta.shape[1])
    point = replace(point, channel_logits=mixed)
    x = np.tile(point.x, (N_COPIES, 1))
    many = replace(point, x=x, noisy_labels=np.tile(point.noisy_labels, N_COPIES))
    literal = statements.Literal.at(many)
    label_tj = np.einsum("ti,tij->tj", literal.q, np.broadcast_to(
        literal.theta, (many.n, N_CLASSES, N_CLASSES)))  # fmt: skip
    z = (rng.random((many.n, 1)) > label_tj.cumsum(axis=1)[:, :-1]).sum(axis=1)
    return replace(many, noisy_labels=z)


def climb(start: Point) -> em_baseline.EMFit:
    """Return some rounds of EM with M-steps by L-BFGS, the noise layer's as well as it can be."""
    by_lbfgs = em_baseline.LBFGS(max_iterations=N_ITERATIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "L-BFGS stopped", RuntimeWarning)
        return em_baseline.fit(
            *start.there(start.model, start.parameters, start.x, start.noisy_labels),
            network_step=by_lbfgs,
            noise_step=None if start.channel_weights is None else by_lbfgs,
            n_rounds=N_CLIMBS,
            fresh_posterior=True,
            shuffling=stream(0, "shuffling"),
        )


def statements_of(configuration: Configuration) -> Iterator[Statement]:
    """Yield every statement that the configuration has something to say to.

    V10 and V13 are about ends at which the gradient is zero, and an MLP's M-steps end at kinks of
    its ReLUs: softmax regression. V9 needs no more of an M-step than that it does not lower Q, and
    L-BFGS does not. V12 of the c-models is judged on softmax regression too: an MLP's features are
    all but collinear here, and the best U is far away.
    """
    start, rng = start_of(configuration), stream(configuration.seed, "directions")
    after = start.m_step()
    for point in (start, after):
        yield from statements.same_function(point)
        yield from statements.backward_is_e_step(point, rng)
        yield from statements.fisher_identity(point, rng)
        yield from statements.em_step_is_preconditioned_gradient(point)
        yield from statements.relabelling_invariance(point, rng)
        yield from statements.collapses(point, rng)
    yield from statements.m_step_is_maximiser(start, after, rng)
    yield from statements.exact_ledger("an M-step of the noise layer", [start, after])
    yield from statements.certified("the start", start)
    if not (HEADS[configuration.head] and configuration.model.endswith("c")):
        yield from rate_of_convergence(channel_limit(drawn_from(start, rng)), rng)
    if HEADS[configuration.head]:
        yield from statements.monotone(
            climb(start).history, start.n, every_half_step=True, model=configuration.model
        )
    else:
        limits = statements.find_limits(start, rng, N_ROUNDS)
        yield from statements.monotone(
            limits.history, start.n, every_half_step=True, model=configuration.model
        )
        yield from statements.same_stationary_points(limits, rng)
        yield from end_points(limits)


def statement_rows(cases: Iterable[Statement], seed: int) -> list[Row]:
    """Return one row per statement: the case closest to its bound, or beyond it."""
    grouped: dict[tuple[str, str], list[Statement]] = {}
    for case in cases:
        grouped.setdefault((case.statement, case.words), []).append(case)
    rows = []
    for group in grouped.values():
        worst = max(group, key=_closeness)
        holds = all(case.holds for case in group)
        rows.append(asdict(worst) | {"holds": holds, "cases": len(group), "seed": seed})
    return rows


def _closeness(case: Statement) -> float:
    """Return how much of its bound a case uses up; NaN, which never holds, comes last."""
    share = case.residual / case.bound
    return np.inf if np.isnan(share) else share


def rows_of(configuration: Configuration) -> list[Row]:
    """Return a row for each statement: the case closest to its bound, or beyond it."""
    kernels.limit_threads(1)
    with threadpool_limits(1):
        found = statement_rows(statements_of(configuration), configuration.seed)
    about = {
        "dataset": configuration.dataset,
        "head": configuration.head,
        "noise_kind": configuration.noise_kind,
        "noise": configuration.noise,
        "model": configuration.model,
    }
    return [row | about for row in found]


def measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield the rows of every configuration, in the grid's order.

    They come from processes in parallel, with the backend "cupy" one by one from this one.
    """
    grid = configurations(options)
    if options.backend == CUPY:
        yield from map(rows_of, tqdm(grid, disable=None, leave=False, unit="configuration"))
        return
    with joblib.parallel_config(backend="loky", n_jobs=n_cores(), inner_max_num_threads=1):
        results = joblib.Parallel(return_as="generator")(
            joblib.delayed(rows_of)(configuration) for configuration in grid
        )
        yield from tqdm(results, total=len(grid), disable=None, leave=False, unit="configuration")


def certificates(rows: list[Row]) -> list[str]:
    """Return every statement for one model, head and kind of noise after the other, in full."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in ABOUT), []).append(row)
    lines = []
    for (dataset, model, head, kind), of_one in found.items():
        seeds = {row["seed"] for row in of_one}
        lines += [
            f"{model}-model, {head}, {dataset}, {of_one[0]['noise']:.0%} {kind} noise, "
            f"{len(seeds)} seed{'s' * (len(seeds) > 1)}",
            "",
            *summaries.statement_table(of_one),
        ]
        judged = {row["statement"] for row in of_one}
        lines += [f"{name}: {why}" for name, why in NOT_JUDGED.items() if name not in judged]
        lines.append("")
    return lines


def table(rows: list[Row]) -> list[str]:
    """Return the statements down and the models across, the residual closest to its bound.

    In Markdown; "-" where a statement has nothing to say of a model.
    """
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        words = row["words"].replace("|", "\\|")
        found.setdefault((row["statement"], words), {}).setdefault(row["model"], []).append(row)
    lines = ["| | statement | bound | " + " | ".join(MODELS) + " |", "|---" * 7 + "|"]
    for (name, words), of_model in sorted(found.items(), key=lambda item: int(item[0][0][1:])):
        bound = max(row["bound"] for seen in of_model.values() for row in seen)
        entries = []
        for model in MODELS:
            seen = of_model.get(model)
            if not seen:
                entries.append("-")
                continue
            worst = max(seen, key=lambda row: row["residual"] / row["bound"])
            n_same = sum(row["detail"].startswith("the same ends") for row in seen)
            n_failed = sum(not row["holds"] for row in seen)
            entry = f"{worst['residual']:.0e}"
            if name == "V13":  # which asks nothing where the ends differ
                entry += f" ({n_same} of {len(seen)} ends the same)"
            if n_failed:
                entry += f" **{n_failed} of {len(seen)} FAIL**"
            entries.append(entry)
        lines.append(f"| {name} | {words} | {bound:.0e} | " + " | ".join(entries) + " |")
    return lines
