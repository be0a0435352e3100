"""Time a training step of the paper's networks, and an epoch of its MLP, against the peers.

PyTorch, JAX and scikit-learn for the MLP; PyTorch for the CNN of the paper's authors, whose layers
are also timed one by one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from tqdm import tqdm

import kernels
from benchmarks import performance, records, step_layers, timing
from benchmarks.devices import CUDA
from benchmarks.kernel_cases import device_of
from benchmarks.kernels import (
    Keep,
    add_common_arguments,
    destinations,
    exit_status,
    measured_rates,
    run_and_keep,
    settings_of,
)
from benchmarks.records import Row
from benchmarks.step_arms import (
    Problem,
    arms_of,
    gemm_shapes,
    references,
    size_of,
    with_floor,
)

LAYER = "layer"
UNITS = ("step", "epoch", LAYER)
NETWORKS = ("mlp", "cnn")
IMAGES, GPU_IMAGES = 2048, 8192


def step_rows(problem: Problem, unit: str, outcomes: list[timing.Outcome]) -> list[Row]:
    """Return one row for each arm; a step's rows know how much of it the floor would take."""
    sizes = {
        "step": unit,
        "size": size_of(problem),
        "dtype": problem.dtype,
        "batch_size": problem.batch_size,
        "dropout": problem.dropout,
        "n_samples": problem.n_samples,
        "seed": problem.seed,
    }
    rows = with_floor(timing.outcome_rows(outcomes), gemm_shapes(problem))
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


def cnn_problems(quick: bool, n_samples: int) -> list[Problem]:
    """Return the CNN on images of MNIST's and CIFAR-100's sizes, dropout as its authors have it."""
    shapes = [((12, 12, 1), 3)] if quick else [((28, 28, 1), 10), ((32, 32, 3), 100)]
    n_samples, batch_size = (64, 16) if quick else (n_samples, 256)
    return [
        Problem((math.prod(shape), n_classes), shape, n_samples, batch_size)
        for shape, n_classes in shapes
    ]


def chosen_cases(
    options: argparse.Namespace, units: Sequence[str], networks: Sequence[str]
) -> list[tuple[Problem, str]]:
    """Return what is timed: the MLP in these units, and a step of the CNN on two kinds of images.

    On a GPU the data are large enough to be beyond its caches, and all batches of one size: a last
    smaller one would be compiled for once more. Raises ValueError for too few samples.
    """
    on_gpu = device_of(options.backend) == CUDA
    problem = Problem(sizes=(20, 12, 8, 10), batch_size=16, n_samples=64)
    if not options.quick:
        problem = Problem()
        n_samples = getattr(options, "samples", problem.n_samples)
        if n_samples < problem.batch_size:
            raise ValueError(f"--samples must be at least {problem.batch_size}; found {n_samples}")
        ragged = n_samples % problem.batch_size if on_gpu else 0
        problem = replace(problem, n_samples=n_samples - ragged)
    cases = [(problem, unit) for unit in units if "mlp" in networks and unit != LAYER]
    if "cnn" in networks and "step" in units:
        images = cnn_problems(options.quick, GPU_IMAGES if on_gpu else IMAGES)
        cases += [(problem, "step") for problem in images]
    return cases


def layered_problems(
    options: argparse.Namespace, units: Sequence[str], networks: Sequence[str]
) -> list[Problem]:
    """Return the CNNs whose layers are timed one by one; on the CPU only."""
    wanted = LAYER in units and "cnn" in networks and device_of(options.backend) != CUDA
    return cnn_problems(options.quick, IMAGES) if wanted else []


def measure(
    cases: list[tuple[Problem, str]],
    backend: str,
    with_peers: bool,
    pool: timing.Pool,
    keep: Keep,
    progress: Callable[[str], None],
    with_compilers: bool = True,
) -> None:
    """Time a step or an epoch of every network; hand over the rows as they come."""
    for problem, unit in cases:
        outcomes = timing.measure(
            arms_of(problem, unit, backend, with_peers, with_compilers),
            references(problem, pool.settings.device),
            timing.tolerance(problem.dtype),
            pool,
            timing.prefixed(progress, f"{size_of(problem)} {unit}"),
        )
        rows = step_rows(problem, unit, outcomes)
        keep(rows)
        tqdm.write("\n".join(performance.case_table(rows)))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the benchmark; return 1 if one of our own arms is wrong or did not get through."""
    settings = settings_of(options, parser)
    networks, units = options.network or NETWORKS, options.unit or UNITS
    try:
        cases = chosen_cases(options, units, networks)
        layered = layered_problems(options, units, networks)
        if not cases and not layered:
            raise ValueError("nothing to time: layers are those of the CNN, on the CPU")
        for path in destinations(options, "step"):
            records.require_writable(path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    asked = [f"{unit} of {size_of(case)}" for case, unit in cases]
    asked += [f"layers of {size_of(case)}" for case in layered]
    print(
        f"nalayer step: {', '.join(asked)}; up to "
        f"{settings.rounds} rounds, about {settings.budget_seconds:g} s of timing for each.",
        flush=True,
    )
    backend = options.backend or kernels.api.DEFAULT_BACKEND

    def body(pool: timing.Pool, keep: Keep, progress: Callable[[str], None]) -> None:
        measured_rates(["float32"], options, pool, keep)
        measure(cases, backend, options.peers, pool, keep, progress)
        step_layers.measure(layered, backend, options.peers, pool, keep, progress)

    rows = run_and_keep("step", options, settings, body)
    return exit_status(rows)
