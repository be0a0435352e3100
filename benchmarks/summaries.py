"""What `equivalence` and `accuracy` print: made from their rows, and from nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import bootstrap

from benchmarks.records import Row

BASELINE, JOINT, EM, DAMPED = "baseline", "s-model, joint", "s-model, EM", "s-model, damped EM"
METHODS = (BASELINE, JOINT, EM, DAMPED)
N_RESAMPLES = 1000  # of the bootstrap, as in the paper
MOST_COLUMNS = 10  # methods beside each other in a table


def bootstrap_interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean (percentiles), as in the paper."""
    if len(values) < 2 or len(set(values)) == 1:
        return values[0], values[0]
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=N_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def _column(rows: list[Row], method: str, key: str) -> list[float]:
    return [row[key] for row in rows if row.get("method") == method]


def _mean(rows: list[Row], method: str, key: str) -> float:
    return float(np.mean(_column(rows, method, key)))


def accuracy_table(rows: list[Row]) -> list[str]:
    """Return part (a) of the report: the methods side by side, means over seeds."""
    lines = [
        f"{'method':<20} {'clean-test accuracy [95 %]':<28} {'train L':>8} {'held-out L':>11} "
        f"{'theta error':>12} {'epochs':>7} {'gradients':>10} {'seconds':>8}"
    ]
    for method in METHODS:
        accuracy = _column(rows, method, "test_accuracy")
        low, high = bootstrap_interval(accuracy)
        interval = f"[{low:.3f}, {high:.3f}]" if len(accuracy) > 1 else "(one seed)"
        error = "-" if method == BASELINE else f"{_mean(rows, method, 'noise_matrix_error'):.3f}"
        train_l, held_out_l, epochs, gradients, seconds = (
            _mean(rows, method, key)
            for key in (
                "log_likelihood",
                "validation_log_likelihood",
                "epochs",
                "gradients",
                "seconds",
            )
        )
        lines.append(
            f"{method:<20} {np.mean(accuracy):.3f} {interval:<22} {train_l:>8.4f} "
            f"{held_out_l:>11.4f} {error:>12} {epochs:>7.0f} {gradients:>10.0f} {seconds:>8.2f}"
        )
    return lines


def _residual(row: Row) -> float:
    """Return a row's residual; NaN, which a results file holds as null, counts as infinite."""
    residual = row["residual"]
    return float("inf") if residual is None or np.isnan(residual) else residual


def statement_table(rows: list[Row]) -> list[str]:
    """Return part (b): every statement once, with the case that came closest to its bound."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "statement" in row:
            cases.setdefault((row["statement"], row["words"]), []).append(row)
    lines = [f"{'':<4} {'statement':<74} {'cases':>5} {'residual':>9} {'bound':>8}  verdict"]
    for (name, words), seen in sorted(cases.items(), key=lambda case: int(case[0][0][1:])):
        worst = max(seen, key=lambda row: _residual(row) / row["bound"])
        verdict = "holds" if all(row["holds"] for row in seen) else "FAILS"
        cases_seen = sum(row["cases"] for row in seen)
        lines.append(
            f"{name:<4} {words:<74} {cases_seen:>5} {_residual(worst):>9.1e} "
            f"{worst['bound']:>8.1e}  {verdict}"
        )
        explained = name in ("V9", "V10", "V11", "V12", "V13") or verdict == "FAILS"
        if explained and worst["detail"]:
            lines.append(f"{'':<5}  {worst['detail']}")
    return lines


def _difference(rows: list[Row], a: str, b: str, key: str) -> str:
    """Return the mean of a - b over seeds with its interval, as text."""
    pairs = zip(_column(rows, a, key), _column(rows, b, key), strict=True)
    differences = [x - y for x, y in pairs]
    low, high = bootstrap_interval(differences)
    interval = f", interval [{low:+.4f}, {high:+.4f}]" if len(differences) > 1 else ""
    return f"{np.mean(differences):+.4f}{interval}"


def conclusions(rows: list[Row]) -> list[str]:
    """Return what the figures say, in words. Every sentence is chosen by a number above it."""
    ends = [row for row in rows if "test_accuracy" in row]
    accuracy = {method: _mean(rows, method, "test_accuracy") for method in METHODS}
    likelihood = {method: _mean(rows, method, "log_likelihood") for method in METHODS}
    alone = {method: _mean(rows, method, "network_log_likelihood") for method in METHODS}
    diagonal = {method: _mean(rows, method, "noise_matrix_diagonal") for method in (JOINT, EM)}
    moves = {m: _mean(rows, m, "noise_matrix_first_move") for m in (JOINT, EM, DAMPED)}
    truth, eta = 1 - ends[0]["noise"], ends[0]["damping"]
    return [
        *_same_function(rows),
        *_joint_against_baseline(rows, accuracy),
        f"Different path: {'EM' if likelihood[EM] > likelihood[JOINT] else 'joint training'} ends "
        f"with the higher training likelihood ({likelihood[EM]:.4f} for EM, "
        f"{likelihood[JOINT]:.4f} for joint, nats per sample), "
        f"{'EM' if accuracy[EM] > accuracy[JOINT] else 'joint training'} with the better "
        f"classifier ({accuracy[EM]:.3f} for EM, {accuracy[JOINT]:.3f} for joint).",
        "On the held-out noisy labels, EM's log-likelihood minus joint training's is "
        f"{_difference(rows, EM, JOINT, 'validation_log_likelihood')}.",
        f"Speed of theta: it starts {_mean(rows, JOINT, 'noise_matrix_start_error'):.3f} from the "
        f"truth; the first round moves it by {moves[EM]:.3f} in EM, {moves[DAMPED]:.3f} in damped "
        f"EM, {moves[JOINT]:.3f} in joint training (mean total variation of its rows). Its "
        f"diagonal ends at {diagonal[EM]:.2f} in EM and {diagonal[JOINT]:.2f} in joint training; "
        f"the truth is {truth:.2f}.",
        f"Without its noise layer, EM's network gives the noisy training labels {alone[EM]:.3f} "
        f"nats per sample, the baseline's {alone[BASELINE]:.3f}, joint training's "
        f"{alone[JOINT]:.3f}.",
        *_why_they_part(accuracy, alone, diagonal[EM], truth),
        *_damped(accuracy, likelihood[DAMPED], eta, all(row["early_stopping"] for row in ends)),
        *_drops(rows),
    ]


def _same_function(rows: list[Row]) -> list[str]:
    failed = {row["statement"] for row in rows if row.get("holds") is False}
    names = ", ".join(sorted(failed, key=lambda name: int(name[1:])))
    if failed & {f"V{v}" for v in range(1, 7)}:
        return [f"NOT the same function as far as these numbers go: {names} failed."]
    first = (
        "Same function: V1-V6 hold to rounding at the start and the end of every fit (V5 at every "
        "step); the joint gradient is EM's gradient."
    )
    return [first, f"But {names} failed: see (b)."] if failed else [first]


def _joint_against_baseline(rows: list[Row], accuracy: dict[str, float]) -> list[str]:
    seen = {m: _column(rows, m, "test_accuracy") for m in (BASELINE, JOINT)}
    (low, _), (_, high) = bootstrap_interval(seen[JOINT]), bootstrap_interval(seen[BASELINE])
    if len(seen[JOINT]) < 2:
        apart = "one seed, so no interval"
    else:
        apart = "the intervals do not overlap" if low > high else "the intervals overlap"
    ends = "ends above" if accuracy[JOINT] > accuracy[BASELINE] else "does not end above"
    return [
        f"Joint training {ends} the baseline: {accuracy[JOINT]:.3f} against "
        f"{accuracy[BASELINE]:.3f} ({apart})."
    ]


def _why_they_part(
    accuracy: dict[str, float], alone: dict[str, float], diagonal: float, truth: float
) -> list[str]:
    """Return the explanation where the figures bear it out: theta near I, noise in the network."""
    if (
        accuracy[EM] >= accuracy[JOINT]
        or diagonal <= (1 + truth) / 2
        or alone[EM] < alone[BASELINE]
    ):
        return []
    return [
        "So they part because EM's closed form moves theta all the way to what the network "
        "believes now, and the two come to agree that the labels are right: theta ends near the "
        "identity, and EM's network predicts the noisy labels itself, as the baseline "
        f"({accuracy[BASELINE]:.3f}) does. The likelihood cannot object: such a network explains "
        "the labels at least as well."
    ]


def _damped(accuracy: dict[str, float], likelihood: float, eta: float, stopping: bool) -> list[str]:
    end = f"ends at {accuracy[DAMPED]:.3f} (L = {likelihood:.4f})"
    if not stopping:
        return [f"EM with damping {eta:g}, also without early stopping, {end}."]
    if accuracy[DAMPED] - accuracy[EM] > 0.5 * (accuracy[JOINT] - accuracy[EM]) > 0:
        return [
            f"The same EM with theta slowed down (eta = {eta:g}) {end}: same function, same start, "
            "same stopping rule; here the speed of theta makes the difference."
        ]
    return [f"EM with damping {eta:g} {end}."]


def _drops(rows: list[Row]) -> list[str]:
    drops = sum(row["likelihood_drops"] for row in rows if row.get("method") in (EM, DAMPED))
    if not drops:
        return []
    return [
        f"Half-steps of the two EM runs that lowered the likelihood: {drops} (inexact M-steps by "
        "mini-batches, with dropout). V5 accounts for each; V9 is about exact M-steps."
    ]


def variations_table(runs: dict[str, list[Row]]) -> list[str]:
    """Return one line per run: clean-test accuracy of every method with its interval."""
    lines = ["| | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for name, rows in runs.items():
        cells = []
        for method in METHODS:
            low, high = bootstrap_interval(_column(rows, method, "test_accuracy"))
            cells.append(f"{_mean(rows, method, 'test_accuracy'):.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def summary_table(rows: list[Row]) -> list[str]:
    """Return accuracy's means with the 95 % bootstrap interval over seeds, in Markdown.

    A column for each method; where they are many, a line.
    """
    groups: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in rows:
        if row["test_accuracy"] is not None:
            key = (row["dataset"], row["fraction"], row["noise"])
            groups.setdefault(key, {}).setdefault(row["method"], []).append(row["test_accuracy"])
    methods = list(dict.fromkeys(row["method"] for row in rows))
    heads = ["data", "share", "noise", *methods]
    lines = [
        [dataset, f"{fraction:g}", f"{noise:g}", *(_accuracy(found.get(m)) for m in methods)]
        for (dataset, fraction, noise), found in groups.items()
    ]
    if len(methods) > MOST_COLUMNS:
        heads, *lines = map(list, zip(heads, *lines, strict=True))
    return ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)] + [
        "| " + " | ".join(line) + " |" for line in lines
    ]


def _accuracy(values: list[float] | None) -> str:
    if not values:
        return "-"
    low, high = bootstrap_interval(values)
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"


def seed_table(rows: list[Row], noise: float, methods: list[str]) -> list[str]:
    """Return one level with all data seed by seed: accuracy, held-out loss, error of theta."""
    found = {
        (row["method"], row["seed"]): row
        for row in rows
        if row["noise"] == noise and row["fraction"] == 1
    }
    seeds = sorted({seed for _, seed in found})
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"]
    lines.append("|" + "---|" * (1 + len(seeds)))
    for method in methods:
        cells = []
        for seed in seeds:
            row = found[method, seed]
            error = row.get("noise_matrix_error")
            cells.append(
                f"{row['test_accuracy']:.3f}, {row['validation_loss']:.3f}"
                + (f", {error:.3f}" if error is not None else "")
            )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines
