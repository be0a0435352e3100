"""What `equivalence` prints: tables and sentences made from its rows, nothing else."""

from __future__ import annotations

import numpy as np
from scipy.stats import bootstrap

from benchmarks.records import Row

BASELINE, JOINT, EM, DAMPED = "baseline", "s-model, joint", "s-model, EM", "s-model, damped EM"
METHODS = (BASELINE, JOINT, EM, DAMPED)
N_RESAMPLES = 1000  # of the bootstrap, as in the paper


def _interval(values: list[float]) -> tuple[float, float]:
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
        low, high = _interval(accuracy)
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
    """Return a row's residual; JSON has no NaN, so a missing one was not finite."""
    return float("inf") if row["residual"] is None else row["residual"]


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
        if name in ("V9", "V10", "V11") or verdict == "FAILS":
            lines.append(f"{'':<5}  {worst['detail']}")
    return lines


def conclusions(rows: list[Row]) -> list[str]:
    """Return what the figures say, in words. Every sentence is chosen by a number above it."""
    seen = {
        method: (
            float(np.mean(_column(rows, method, "test_accuracy"))),
            _interval(_column(rows, method, "test_accuracy")),
            float(np.mean(_column(rows, method, "log_likelihood"))),
        )
        for method in METHODS
    }
    (base, (_, base_high), _) = seen[BASELINE]
    (joint, (joint_low, _), joint_l) = seen[JOINT]
    (em, _, em_l) = seen[EM]
    (damped, _, damped_l) = seen[DAMPED]
    failed = sorted({row["statement"] for row in rows if row.get("holds") is False})
    identities_hold = not set(failed) & {f"V{v}" for v in range(1, 7)}
    n_seeds = len(_column(rows, BASELINE, "test_accuracy"))
    lines = [
        "Same function: V1-V6 hold to rounding at every point visited; the joint gradient is "
        "EM's gradient."
        if identities_hold
        else f"NOT the same function as far as these numbers go: {', '.join(failed)} failed."
    ]
    if n_seeds < 2:
        apart = "one seed, so no interval"
    elif joint_low > base_high:
        apart = "the intervals do not overlap"
    else:
        apart = "the intervals overlap"
    lines.append(
        f"Joint training ends {'above' if joint > base else 'not above'} the baseline: "
        f"{joint:.3f} against {base:.3f} ({apart})."
    )
    higher = "EM" if em_l > joint_l else "joint training"
    better = "EM" if em > joint else "joint training"
    lines.append(
        f"Different path: {higher} ends with the higher training likelihood ({em_l:.4f} for EM, "
        f"{joint_l:.4f} for joint, nats per sample), {better} with the better classifier "
        f"({em:.3f} for EM, {joint:.3f} for joint)."
    )
    held_out = {m: _mean(rows, m, "validation_log_likelihood") for m in (JOINT, EM)}
    lines.append(
        f"The held-out noisy labels prefer {higher} too ({held_out[EM]:.4f} for EM, "
        f"{held_out[JOINT]:.4f} for joint)."
        if (held_out[EM] > held_out[JOINT]) == (em_l > joint_l)
        else f"The held-out noisy labels disagree ({held_out[EM]:.4f} for EM, "
        f"{held_out[JOINT]:.4f} for joint)."
    )
    moves = {m: _mean(rows, m, "noise_matrix_first_move") for m in (JOINT, EM, DAMPED)}
    diagonal = {m: _mean(rows, m, "noise_matrix_diagonal") for m in (JOINT, EM)}
    truth = 1 - rows[0]["noise"]
    lines.append(
        f"Speed of theta: it starts {_mean(rows, JOINT, 'noise_matrix_start_error'):.3f} from the "
        f"truth; the first round moves it by {moves[EM]:.3f} in EM, {moves[DAMPED]:.3f} in damped "
        f"EM, {moves[JOINT]:.3f} in joint training (mean total variation of its rows). Its "
        f"diagonal ends at {diagonal[EM]:.2f} in EM and {diagonal[JOINT]:.2f} in joint training; "
        f"the truth is {truth:.2f}."
    )
    if em < joint and diagonal[EM] > (1 + truth) / 2:
        lines.append(
            "Why they part: EM's closed form moves theta all the way to what the network believes "
            "now, and the two agree ever more that the labels are right. With theta near the "
            f"identity the network itself predicts the noisy labels, as the baseline ({base:.3f}) "
            "does. The likelihood cannot object: such a network explains the labels as well."
        )
    lines.append(
        f"The same EM with theta slowed down (eta = {rows[0]['damping']:g}) ends at {damped:.3f} "
        f"(L = {damped_l:.4f})"
        + (
            ": the speed of theta decides, not the function that is climbed."
            if em < joint and damped - em > 0.5 * (joint - em)
            else "."
        )
    )
    drops = sum(row["likelihood_drops"] for row in rows if row.get("method") in (EM, DAMPED))
    if drops:
        lines.append(
            f"In the two EM runs {drops} half-steps lowered the likelihood (inexact M-steps by "
            "mini-batches, with dropout): V5 accounts for each; V9 is about exact M-steps."
        )
    return lines
