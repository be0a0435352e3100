"""Time a training step of the paper's networks, and an epoch of its MLP, against the peers.

PyTorch, JAX and scikit-learn for the MLP; PyTorch for the CNN of the paper's authors.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

import kernels
from benchmarks import machine, performance, records, timing
from benchmarks.kernels import (
    Keep,
    add_common_arguments,
    destinations,
    exit_status,
    gemm_libraries,
    run_and_keep,
    settings_of,
)
from benchmarks.records import Row
from benchmarks.step_arms import FLOOR, Problem, arms_of, gemm_shapes, references

UNITS = ("step", "epoch")
NETWORKS = ("mlp", "cnn")


def size_of(problem: Problem) -> str:
    """Return the network in a word."""
    if problem.image_shape:
        return f"CNN {'x'.join(map(str, problem.image_shape))}-{problem.sizes[-1]}"
    return "-".join(map(str, problem.sizes))


def step_rows(problem: Problem, unit: str, outcomes: list[timing.Outcome]) -> list[Row]:
    """Return one row for each arm; a step's rows know how much of it the floor would take."""
    rows = timing.outcome_rows(outcomes)
    floors = [row["median_ms"] for row in rows if row["arm"].startswith(FLOOR)]
    floor = min((ms for ms in floors if ms is not None), default=None)
    work = sum(2 * m * k * n for m, k, n in gemm_shapes(problem))
    sizes = {
        "step": unit,
        "size": size_of(problem),
        "dtype": problem.dtype,
        "batch_size": problem.batch_size,
        "dropout": problem.dropout,
        "n_samples": problem.n_samples,
        "seed": problem.seed,
    }
    for row in rows:
        share = floor / row["median_ms"] if floor and row["median_ms"] else None
        row |= {"gemm_floor_ms": floor, "gemm_share": share, "gemm_flops": work}
    return [sizes | row for row in rows]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.epilog = (
        "Losses and parameters after two steps without dropout are compared with float64 NumPy "
        "before anything is timed. Step times are with dropout and Adam on all sides, except that "
        "scikit-learn has no dropout."
    )
    add_common_arguments(parser)
    parser.add_argument(
        "--samples", type=int, default=Problem.n_samples, metavar="N", help="of the data set"
    )
    parser.add_argument("--unit", action="append", choices=UNITS, help="only this; repeatable")
    parser.add_argument(
        "--network", action="append", choices=NETWORKS, help="only this; repeatable"
    )


def cnn_problems(quick: bool) -> list[Problem]:
    """Return the CNN on images of MNIST's and CIFAR-100's sizes, dropout as its authors have it."""
    shapes = [((12, 12, 1), 3)] if quick else [((28, 28, 1), 10), ((32, 32, 3), 100)]
    n_samples, batch_size = (64, 16) if quick else (2048, 256)
    return [
        Problem((math.prod(shape), n_classes), shape, n_samples, batch_size)
        for shape, n_classes in shapes
    ]


def chosen_problem(options: argparse.Namespace) -> Problem:
    """Return the MLP's problem asked for; raise ValueError for too few samples."""
    quick = Problem(sizes=(20, 12, 8, 10), batch_size=16, n_samples=64)
    problem = quick if options.quick else Problem(n_samples=options.samples)
    if problem.n_samples < problem.batch_size:
        raise ValueError(
            f"--samples must be at least {problem.batch_size}; found {problem.n_samples}"
        )
    return problem


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the benchmark; return 1 if one of our own arms is wrong or did not get through."""
    settings = settings_of(options, parser)
    try:
        problem = chosen_problem(options)
        for path in destinations(options, "step"):
            records.require_writable(path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    networks, units = options.network or NETWORKS, options.unit or UNITS
    cases = [(problem, unit) for unit in units if "mlp" in networks]
    if "cnn" in networks and "step" in units:
        cases += [(images, "step") for images in cnn_problems(options.quick)]
    print(
        f"nalayer step: {', '.join(f'{unit} of {size_of(case)}' for case, unit in cases)}; up to "
        f"{settings.rounds} rounds, about {settings.budget_seconds:g} s of timing for each.",
        flush=True,
    )
    backend = options.backend or kernels.api.DEFAULT_BACKEND

    def body(cache: Path | None, keep: Keep, progress: Callable[[str], None]) -> None:
        libraries = gemm_libraries(options)
        rates = machine.measure_machine([problem.dtype], libraries, cache, settings, options.quick)
        keep(rates)
        tqdm.write("\n".join(performance.machine_lines(rates)))
        for case, unit in cases:
            outcomes = timing.measure(
                arms_of(case, unit, backend, options.peers),
                references(case),
                timing.tolerance(case.dtype),
                settings,
                cache,
                timing.prefixed(progress, f"{size_of(case)} {unit}"),
            )
            rows = step_rows(case, unit, outcomes)
            keep(rows)
            tqdm.write("\n".join(performance.case_table(rows)))

    rows = run_and_keep("step", options, settings, body)
    return exit_status(rows)
