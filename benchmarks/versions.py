"""Time one kernel, the s-model's loss and gradients, in four versions: loops to compiled code.

The fourth version, CUDA, is timed on a GPU, by `make gpu`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm import tqdm

import kernels
from benchmarks import kernel_cases, loops, records, timing
from benchmarks.kernel_cases import Case
from benchmarks.kernels import (
    Keep,
    add_timing_arguments,
    destinations,
    exit_status,
    run_and_keep,
    settings_of,
)
from benchmarks.records import Row
from benchmarks.timing import Arm, Outcome
from benchmarks.worker import Arrays, Work

MODULE = "benchmarks.versions"
LOOPS, NUMPY, ONE_THREAD, NUMBA = (
    "nalayer loops",
    "nalayer numpy",
    "nalayer numba, one thread",
    "nalayer numba",
)
SIZES = ("256x10", "256x100", "256x1000", "4096x1000", "65536x1000")
QUICK = ("32x10",)
MOST_LOOPS = 10**7  # numbers that the loops go over; a call takes about a second for two million


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.epilog = (
        "Results are compared with float64 NumPy before anything is timed; versions are timed in "
        "turn. The machine should have nothing else to do."
    )
    add_timing_arguments(parser)
    parser.set_defaults(backend=None)  # every one of the CPU
    parser.add_argument(
        "--size", action="append", metavar="NxK", help="in place of the usual sizes; repeatable"
    )


def build_loops(case: dict[str, Any]) -> Work:
    """Return the plain loops over lists, made beforehand."""
    arrays = kernel_cases.inputs(Case(**case))
    lists = [array.tolist() for array in arrays.values()]

    def results() -> Arrays:
        return tuple(np.array(found) for found in loops.s_model_nll(*lists))

    return Work(lambda: loops.s_model_nll(*lists), results)


def build_one_thread(case: dict[str, Any]) -> Work:
    """Return the Numba kernel on a single thread."""
    kernels.limit_threads(1)
    return kernel_cases.build_ours(case, "numba")


def arms(case: Case) -> list[Arm]:
    """Return the versions in the order in which each builds on the one before."""
    given, ours = {"case": asdict(case)}, f"{kernel_cases.MODULE}:build_ours"
    numbers = case.n * case.k + case.k**2
    skipped: dict[str, Any] = {}
    if numbers > MOST_LOOPS:
        skipped = {"skip": "not run", "detail": f"{numbers:.1e} numbers, one after the other"}
    return [
        Arm(LOOPS, f"{MODULE}:build_loops", given, backend="python", **skipped),
        Arm(NUMPY, ours, given | {"backend": "numpy"}, backend="numpy"),
        Arm(ONE_THREAD, f"{MODULE}:build_one_thread", given, backend="numba"),
        Arm(NUMBA, ours, given | {"backend": "numba"}, backend="numba"),
    ]


def gains(outcomes: list[Outcome]) -> dict[str, Row]:
    """Return by how much each version is faster than the one before, of the same rounds."""
    found = {}
    for before, after in pairwise(outcomes):
        if before.seconds and after.seconds:
            gain, low, high = timing.ratios(before.seconds, after.seconds)
            found[after.arm.name] = {"gain": gain, "gain_low": low, "gain_high": high}
    return found


def rows_of(case: Case, outcomes: list[Outcome]) -> list[Row]:
    """Return one row for each version."""
    gained = gains(outcomes)
    rows = []
    for outcome in outcomes:
        ms = 1e3 * np.array(outcome.seconds)
        low, high = np.percentile(ms, [timing.LOW, timing.HIGH]) if ms.size else (None, None)
        rows.append(
            case.fields()
            | {
                "arm": outcome.arm.name,
                "backend": outcome.arm.backend,
                "status": outcome.status,
                "detail": outcome.detail,
                "median_ms": float(np.median(ms)) if ms.size else None,
                "low_ms": low,
                "high_ms": high,
                "peak_extra_bytes": outcome.peak_extra_bytes,
                "relative_error": outcome.error,
                "rounds": ms.size,
                "busy_elsewhere": outcome.busy_elsewhere,
            }
            | gained.get(outcome.arm.name, {})
        )
    return rows


def measure(
    cases: list[Case],
    pool: timing.Pool,
    keep: Keep,
    progress: Callable[[str], None],
) -> None:
    """Time every size; hand over the rows as they come."""
    for case in cases:
        outcomes = timing.measure(
            arms(case),
            kernel_cases.references(case),
            timing.tolerance(case.dtype),
            pool,
            timing.prefixed(progress, case.size),
        )
        rows = rows_of(case, outcomes)
        keep(rows)
        tqdm.write("\n".join(lines(rows)))


def lines(rows: list[Row]) -> Iterator[str]:
    """Yield the versions of one size as text."""
    yield f"s_model, {rows[0]['size']}, {rows[0]['dtype']}"
    for row in rows:
        said = row["status"] if row["median_ms"] is None else f"{row['median_ms']:.4g} ms"
        gain = f"{row['gain']:.3g} times faster" if "gain" in row else ""
        yield f"  {row['arm']:26s} {said:>14s}  {gain}"


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the benchmark; return 1 if a version is wrong or did not get through."""
    settings = settings_of(options, parser)
    sizes = options.size or (QUICK if options.quick else SIZES)
    try:
        cases = [kernel_cases.case("s_model", size) for size in sizes]
        for path in destinations(options, "versions"):
            records.require_writable(path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rows = run_and_keep(
        "versions",
        options,
        settings,
        lambda pool, keep, progress: measure(cases, pool, keep, progress),
    )
    return exit_status(rows)
