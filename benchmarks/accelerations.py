"""Who climbs fastest: EM, EM accelerated, and the joint gradient, counted in passes over the data.

First theta alone, on top of a fixed network of digits: L is concave there, so all climb to one
value, V11 says how near they are and V12 how fast EM should be. Then everything at once on a head
so small that M-steps can be exact: there the likelihood has many optima (V13).
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import em_baseline
import kernels
import nalayer
from benchmarks import equivalence, records, studies
from benchmarks.machine import n_cores
from benchmarks.records import Row
from em_baseline import LBFGS, OneGradientStep, minimise
from em_baseline.end_points import NEARLY_ZERO, compare
from em_baseline.rate import ChannelAlone, climb_theta, slowest_rate, theta_steps
from em_baseline.statements import Point, certificate, dead_entries, frozen_network
from em_baseline.steps import MStep, Objective
from nalayer import Adam, stream
from nalayer.datasets import load_dataset
from nalayer.label_noise import KINDS

NOISE = (0.2, 0.4, 0.46)
TOLERANCES = (1e-6, 1e-8)  # of V11's certificate, nats per sample
LIMIT = 1e-12  # the certificate where EM's rate is predicted
PSEUDO_COUNTS = (0.0, 0.01)
NETWORKS = ("baseline", "s-model")
EM, SQUAREM, JOINT, ADAM = "EM", "SQUAREM", "joint, L-BFGS", "joint, Adam"
ADAM_STEP = 0.1  # on theta alone, where the paper's 0.001 has hardly left after 3000 steps
ECM, ONE_STEP = "EM, fresh posterior", "EM, one gradient step"
NETWORK_STEP = 0.01  # Adam's, of EM with one gradient step
EM_TOLERANCE = 1e-7  # of a round, in theta and in nats per sample
MAX_MAPS = 20_000
CURVE_POINTS = 40
LEAD = 1e-9  # nats per sample by which one has to be ahead, everything at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""

    def option(name: str, help: str, **details: Any) -> None:
        parser.add_argument(name, help=help, **details)

    option("--noise", "shares of changed labels", nargs="+", type=float, default=list(NOISE))
    option("--noise-kind", "where they go", choices=KINDS, default="permutation")
    option("--seeds", "run seeds 0 to N-1", type=int, default=5, metavar="N")
    option("--epochs", "of the networks' training, at most", type=int, default=200)
    option(
        "--pseudo-counts", "on theta, everything at once", nargs="+", type=float,
        default=list(PSEUDO_COUNTS), metavar="ALPHA",
    )  # fmt: skip
    option("--rounds", "of EM with exact M-steps, at most", type=int, default=1000)
    option(
        "--gradients", "Adam's steps on theta; rounds of EM with one gradient step", type=int,
        default=3000,
    )  # fmt: skip
    option("--json", "write the rows here", type=Path, metavar="FILE")
    option("--picture", "draw the study here", type=Path, metavar="FILE")


@dataclass
class Trace:
    """How low an arm's figure was after how many passes over the data."""

    evaluations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, evaluations: int, seconds: float, value: float) -> None:
        """Note where the arm stands."""
        self.evaluations.append(evaluations)
        self.seconds.append(seconds)
        self.values.append(value)

    def reaches(self, value: float) -> tuple[int, float] | None:
        """Return evaluations and seconds when it first was that low, None if never."""
        for evaluations, seconds, found in zip(
            self.evaluations, self.seconds, self.values, strict=True
        ):
            if found <= value:
                return evaluations, seconds
        return None

    def best(self, evaluations: np.ndarray) -> np.ndarray:
        """Return the lowest figure after so many evaluations; infinite before the first."""
        lowest = np.concatenate([[np.inf], np.fmin.accumulate(self.values)])
        return lowest[np.searchsorted(self.evaluations, evaluations, side="right")]

    def curve(self) -> Row:
        """Return the best figure at some evaluations on a logarithmic scale, for the picture."""
        last = self.evaluations[-1]
        places = np.unique(np.geomspace(1, max(last, 1), CURVE_POINTS).round().astype(int))
        return {
            "curve_evaluations": [int(place) for place in places],
            "curve": [float(f"{value:.10g}") for value in self.best(places)],
        }


def overtakes(arm: Trace, em: Trace, lead: float) -> int | None:
    """Return from how many evaluations on the arm's best is below EM's, at all times after.

    None if it ends behind, or nowhere ahead by more than ``lead``.
    """
    places = np.unique(arm.evaluations + em.evaluations)
    difference = arm.best(places) - em.best(places)
    behind = np.flatnonzero(difference > lead)
    after = behind[-1] + 1 if behind.size else 0
    ahead = np.flatnonzero(difference[after:] < -lead)
    return int(places[after + ahead[0]]) if ahead.size else None


@dataclass
class Watched:
    """An objective that keeps where it was evaluated, and when."""

    objective: Objective
    seen: list[tuple[float, float, np.ndarray]] = field(default_factory=list)
    """seconds since the first was asked for, loss, parameters"""
    started: float = field(default_factory=time.perf_counter)

    def loss_and_gradient(
        self, parameters: np.ndarray, x: np.ndarray, targets: Any, *others: Any
    ) -> tuple[float, np.ndarray]:
        """Return the loss and its gradient."""
        loss, gradient = self.objective.loss_and_gradient(parameters, x, targets, *others)
        self.seen.append((time.perf_counter() - self.started, loss, parameters.copy()))
        return loss, gradient


# --- theta alone -----------------------------------------------------------------------------


def theta_by_em(start: Point, accelerate: bool) -> Trace:
    """Follow EM on theta, or SQUAREM, to the last tolerance; the clock stands for certificates."""
    trace, seconds = Trace(), 0.0
    steps = theta_steps(start, accelerate)
    while True:
        started = time.perf_counter()
        at, n_maps, n_e_steps = next(steps)
        seconds += time.perf_counter() - started
        trace.add(n_e_steps, seconds, certificate(at))
        if trace.values[-1] <= TOLERANCES[-1] or n_maps >= MAX_MAPS:
            return trace


def theta_by_gradients(start: Point, n_steps: int | None) -> Trace:
    """Follow the joint gradient in the channel logits: Adam's steps, or L-BFGS where None."""
    at = frozen_network(start)
    watched = Watched(ChannelAlone(at))
    parameters = at.channel_logits.ravel().copy()
    if n_steps is None:
        minimise(watched, parameters, at.x, at.noisy_labels, tolerance=0.0)
    else:
        adam = Adam(ADAM_STEP)
        state = adam.initial_state(parameters)
        for _ in range(n_steps):
            _, gradient = watched.loss_and_gradient(parameters, at.x, at.noisy_labels)
            adam.update(parameters, gradient, state)
    trace = Trace()
    for number, (seconds, _, logits) in enumerate(watched.seen, start=1):
        here = at.with_parameters(
            at.model.pack(at.weights, logits.reshape(at.channel_logits.shape))
        )
        # A line search may try a theta without a way to some label; its certificate is NaN.
        with np.errstate(divide="ignore", invalid="ignore"):
            trace.add(number, seconds, certificate(here))
    return trace


def theta_rows(network: str, start: Point, options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each way to climb in theta alone, and EM's predicted rate."""
    traces = {
        EM: theta_by_em(start, accelerate=False),
        SQUAREM: theta_by_em(start, accelerate=True),
        JOINT: theta_by_gradients(start, None),
        ADAM: theta_by_gradients(start, options.gradients),
    }
    rate = slowest_rate(climb_theta(start, accelerate=True, tolerance=LIMIT).point)
    for arm, trace in traces.items():
        row: Row = {"study": "theta alone", "network": network, "arm": arm}
        for tolerance in TOLERANCES:
            evaluations, seconds = trace.reaches(tolerance) or (None, None)
            row |= {f"evaluations_{tolerance:g}": evaluations, f"seconds_{tolerance:g}": seconds}
        if arm == EM:
            row |= {"rate": rate, "predicted": np.log(TOLERANCES[1] / TOLERANCES[0]) / np.log(rate)}
        else:
            row |= {
                "overtakes": overtakes(trace, traces[EM], TOLERANCES[-1]),
                "overtaken": overtakes(traces[EM], trace, TOLERANCES[-1]),
            }
        yield row | {"certificate": min(trace.values)} | trace.curve()


# --- everything at once ----------------------------------------------------------------------


def fit_by_em(
    start: Point,
    pseudo_count: float,
    step: MStep,
    n_rounds: int,
    fresh: bool,
    seed: int,
) -> tuple[Point, Trace]:
    """Follow alternating EM; an E-step and a gradient are one pass over the data each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", em_baseline.LikelihoodDropWarning)
        found = em_baseline.fit(
            start.objective(pseudo_count),
            start.parameters,
            start.x,
            start.noisy_labels,
            network_step=step,
            n_rounds=n_rounds,
            fresh_posterior=fresh,
            tolerance=EM_TOLERANCE,
            shuffling=stream(seed, "shuffling"),
        )
    trace = Trace()
    for half in found.history:
        trace.add(half.gradients + (1 + fresh) * half.round, half.seconds, half.loss)
    return start.with_parameters(found.parameters), trace


def fit_jointly(start: Point, pseudo_count: float) -> tuple[Point, Trace]:
    """Follow L-BFGS on the joint likelihood."""
    watched, trace = Watched(start.objective(pseudo_count)), Trace()
    parameters, _ = minimise(
        watched, start.parameters, start.x, start.noisy_labels, EM_TOLERANCE / 10
    )
    for number, (seconds, loss, _) in enumerate(watched.seen, start=1):
        trace.add(number, seconds, loss)
    return start.with_parameters(parameters), trace


def everything_rows(
    start: Point, pseudo_count: float, options: argparse.Namespace, seed: int
) -> Iterator[Row]:
    """Yield a row for each way to climb in everything at once."""
    exact, n_rounds = LBFGS(EM_TOLERANCE / 10), options.rounds
    found = {
        EM: fit_by_em(start, pseudo_count, exact, n_rounds, False, seed),
        ECM: fit_by_em(start, pseudo_count, exact, n_rounds, True, seed),
        ONE_STEP: fit_by_em(
            start,
            pseudo_count,
            OneGradientStep(Adam(NETWORK_STEP)),
            options.gradients,
            False,
            seed,
        ),
        JOINT: fit_jointly(start, pseudo_count),
    }
    model, (first, em) = start.objective(pseudo_count), found[EM]
    for arm, (end, trace) in found.items():
        loss, gradient = model.loss_and_gradient(end.parameters, end.x, end.noisy_labels)
        row: Row = {"study": "everything", "pseudo_count": pseudo_count, "arm": arm}
        row |= {"evaluations": trace.evaluations[-1], "seconds": trace.seconds[-1]}
        row |= {"log_likelihood": -loss, "gradient": float(np.abs(gradient).max())}
        row |= {"certificate": certificate(end, pseudo_count)}
        row |= {"dead_entries": dead_entries(end, NEARLY_ZERO)}
        if arm != EM:
            ends = compare(first, end, pseudo_count)
            row |= {
                "overtakes": overtakes(trace, em, LEAD),
                "overtaken": overtakes(em, trace, LEAD),
                "same_as_em": ends.agree,
                "behind_em": ends.likelihood_gap,
                "same_predictions": ends.same_predictions,
            }
        yield row | trace.curve()


# --- the run ---------------------------------------------------------------------------------


def rows_of(options: argparse.Namespace, noise: float, seed: int) -> list[Row]:
    """Return all rows of one seed at one noise level."""
    kernels.limit_threads(1)
    with threadpool_limits(1):
        settings = fitting_options(options, noise)
        equivalence.compile_kernels(settings)
        task = equivalence.make_task(settings, load_dataset("digits"), seed)
        baseline = equivalence.fit_baseline(task, settings)
        fits = (baseline, equivalence.fit_joint(task, baseline, settings))
        rows: list[Row] = []
        for network, fit in zip(NETWORKS, fits, strict=True):
            channel = equivalence.starting_channel(task, fit, settings)
            start = Point(task.network, fit.weights, channel, task.x, task.noisy_labels)
            rows += theta_rows(network, start, options)
        head = equivalence.small_head(task, settings)
        for pseudo_count in options.pseudo_counts:
            rows += everything_rows(head, pseudo_count, options, seed)
    return [{"noise": noise, "seed": seed} | row for row in rows]


def fitting_options(options: argparse.Namespace, noise: float) -> argparse.Namespace:
    """Return the options with which ``equivalence`` makes its data and networks."""
    parser = argparse.ArgumentParser()
    equivalence.add_arguments(parser)
    given = ["--noise", str(noise), "--noise-kind", options.noise_kind]
    return parser.parse_args([*given, "--epochs", str(options.epochs)])


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the study."""
    for name in ("seeds", "epochs", "rounds", "gradients"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1; found {getattr(options, name)}")
    try:
        for noise in options.noise:
            nalayer.make_noise_matrix(options.noise_kind, 10, noise, stream(0, "label noise"))
        for pseudo_count in options.pseudo_counts:
            nalayer.models.check_pseudo_count(pseudo_count)
        for path in (options.json, options.picture):
            if path:
                records.require_writable(path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    base = records.provenance(
        "accelerations", options.command, kernels.api.DEFAULT_BACKEND, threads=1, blas_threads=1
    )
    base |= {"dataset": "digits", "noise_kind": options.noise_kind}
    grid = list(itertools.product(options.noise, range(options.seeds)))
    rows: list[Row] = []
    n_jobs = min(n_cores(), len(grid))
    with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
        found = joblib.Parallel(return_as="generator")(
            joblib.delayed(rows_of)(options, noise, seed) for noise, seed in grid
        )
        for new in tqdm(found, total=len(grid), disable=None, leave=False, unit="problem"):
            rows += [base | row for row in new]
            if options.json:
                records.write_rows(options.json, rows)
    print("\n".join(lines(rows)))
    if options.picture:
        draw(rows, options.picture)
        print(f"\nPicture: {options.picture}")
    return 0


# --- what is shown ---------------------------------------------------------------------------


def span(values: list[float], form: Callable[[float], str] = "{:.0f}".format) -> str:
    """Return a median and, where they differ, the least and the largest."""
    if not values:
        return "-"
    low, middle, high = (form(float(v)) for v in np.quantile(values, [0, 0.5, 1]))
    return middle if low == high else f"{middle} ({low} to {high})"


def _values(rows: list[Row], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _of_how_many(rows: list[Row], values: list[float]) -> str:
    return "" if len(values) == len(rows) else f", {len(values)} of {len(rows)}"


def lines(rows: list[Row]) -> list[str]:
    """Return the tables: theta alone, EM's rate, everything at once."""
    seeds = studies.seeds_in(rows)
    theta = [row for row in rows if row["study"] == "theta alone"]
    everything = [row for row in rows if row["study"] == "everything"]
    counted = f"median over {seeds} (least to largest), and in how many if not in all"
    found = [f"Theta alone: passes over the data until the certificate is that low, {counted}", ""]
    body, rates = [], []
    for network, noise, here in _groups(theta, "network", "noise"):
        for arm, of_arm in ((arm, [r for r in here if r["arm"] == arm]) for arm in _arms(here)):
            entries = []
            keys = [f"evaluations_{t:g}" for t in TOLERANCES]
            for key in [*keys, "overtakes", "overtaken"]:
                values = _values(of_arm, key)
                entries.append(span(values) + _of_how_many(of_arm, values))
            entries[-2:] = ["", ""] if arm == EM else entries[-2:]
            seconds = _values(of_arm, f"seconds_{TOLERANCES[-1]:g}")
            milliseconds = span([1e3 * s for s in seconds])
            left = span(_values(of_arm, "certificate"), "{:.0e}".format)
            body.append([network, f"{noise:g}", arm, *entries, milliseconds, left])
        em = [r for r in here if r["arm"] == EM]
        first, last = ([r[f"evaluations_{t:g}"] for r in em] for t in TOLERANCES)
        seen = [b - a for a, b in zip(first, last, strict=True) if a and b]
        rate = span(_values(em, "rate"), "{:.3f}".format)
        rates.append([network, f"{noise:g}", rate, span(_values(em, "predicted")), span(seen)])
    goals = [f"{t:g} nats" for t in TOLERANCES]
    heads = ["network", "noise", "way", *goals, "overtakes EM after",
             "EM overtakes after", "ms to the last",
             "least certificate"]  # fmt: skip
    found += studies.table(heads, body)
    found += ["", f"EM's steps on theta from {goals[0]} to {goals[1]}, {seeds}", ""]
    found += studies.table(["network", "noise", "rate (V12)", "predicted", "taken"], rates)
    found += ["", f"Everything at once, {counted}", ""]
    body = []
    for noise, pseudo_count, here in _groups(everything, "noise", "pseudo_count"):
        for arm, of_arm in ((arm, [r for r in here if r["arm"] == arm]) for arm in _arms(here)):
            ahead, behind = (_values(of_arm, key) for key in ("overtakes", "overtaken"))
            same = f"{sum(_values(of_arm, 'same_as_em'))} of {len(of_arm)}"
            body.append([
                f"{noise:g}", f"{pseudo_count:g}", arm,
                f"{np.mean(_values(of_arm, 'log_likelihood')):.4f}",
                span(_values(of_arm, "evaluations")),
                span(_values(of_arm, "seconds"), "{:.1f}".format),
                f"{max(_values(of_arm, 'gradient')):.0e}",
                span(_values(of_arm, "certificate"), "{:.0e}".format),
                span(_values(of_arm, "dead_entries")),
                "" if arm == EM else same,
                "" if arm == EM else span(ahead) + _of_how_many(of_arm, ahead),
                "" if arm == EM else span(behind) + _of_how_many(of_arm, behind),
            ])  # fmt: skip
    heads = ["noise", "alpha", "way", "mean L", "passes", "seconds", "largest gradient",
             "certificate", "dead entries", "ends where EM does", "overtakes EM after",
             "EM overtakes after"]  # fmt: skip
    return found + studies.table(heads, body)


def _groups(rows: list[Row], *keys: str) -> Iterator[tuple]:
    for values in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        yield *values, [row for row in rows if tuple(row[key] for key in keys) == values]


def _arms(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


COLOURS = {
    EM: "#0072B2", SQUAREM: "#009E73", JOINT: "#D55E00", ADAM: "#CC79A7",
    ECM: "#56B4E9", ONE_STEP: "#E69F00",
}  # fmt: skip


def draw(rows: list[Row], path: Path) -> None:
    """Draw certificates and likelihoods against passes over the data, seed 0 bold."""
    levels = list(dict.fromkeys(row["noise"] for row in rows))
    figure, grid = plt.subplots(
        3, len(levels), squeeze=False, figsize=(1 + 5 * len(levels), 11), layout="constrained",
        sharey="row",
    )  # fmt: skip
    for column, noise in enumerate(levels):
        here = [row for row in rows if row["noise"] == noise]
        for axes, network in zip(grid[:2, column], NETWORKS, strict=True):
            _curves(axes, [row for row in here if row.get("network") == network], {})
            axes.set_ylim(TOLERANCES[-1] / 3, None)
            axes.set_ylabel("certificate, nats per sample")
            axes.set_title(f"theta alone, the {network}'s network, {noise:.0%} noise", fontsize=10)
        plain = [row for row in here if row.get("pseudo_count") == 0]
        best = {
            seed: max(row["log_likelihood"] for row in plain if row["seed"] == seed)
            for seed in {row["seed"] for row in plain}
        }
        _curves(grid[2, column], plain, best)
        grid[2, column].set_ylim(1e-6, None)
        grid[2, column].set_ylabel("behind the best end, nats per sample")
        grid[2, column].set_title(f"everything at once, {noise:.0%} noise", fontsize=10)
        grid[2, column].set_xlabel("passes over the data (E-steps, gradients)")
    grid[0, 0].legend(fontsize=8)
    grid[2, 0].legend(fontsize=8)
    figure.suptitle(
        f"Joint gradient, EM and accelerated EM ({rows[0]['dataset']}): {studies.seeds_in(rows)}"
    )
    studies.save(figure, path)


def _curves(axes: Axes, rows: list[Row], best: dict[int, float]) -> None:
    """Draw each row's curve, less the seed's best where there is one."""
    for row in rows:
        bold = row["seed"] == min(r["seed"] for r in rows)
        values = np.array([np.nan if v is None else v for v in row["curve"]])
        axes.plot(
            row["curve_evaluations"],
            values + best.get(row["seed"], 0.0),
            color=COLOURS[row["arm"]],
            linewidth=1.8 if bold else 0.5,
            label=row["arm"] if bold else None,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
