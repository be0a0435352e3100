"""Time kernels, training steps and growing numbers of classes on a GPU, what matters most first.

The rows of `kernels`, `step` and `scaling` with `--backend cupy`, in one run that ends in time:
what there is no time for gets a row that says so.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

import kernels
from benchmarks import (
    devices,
    gpu_tables,
    kernel_cases,
    performance,
    records,
    scaling,
    step,
    timing,
)
from benchmarks import kernels as kernel_benchmark
from benchmarks.kernels import Keep, measured_rates
from benchmarks.records import Row

SECONDS = 270.0
Pairs = tuple[tuple[str, str], ...]
# What tells the cases of a benchmark apart, in their rows.
NAMES = {"kernels": ("kernel", "size"), "step": ("step", "size"), "scaling": ("series", "k")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.epilog = "Needs a GPU and CuPy; PyTorch and JAX are compared with where installed."
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help="begin nothing after these"
    )
    parser.add_argument(
        "--go-on",
        type=Path,
        metavar="FILE",
        help="keep the rows of an earlier run on this device, and measure only what it had no "
        "time for",
    )
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with other libraries",
    )
    parser.add_argument("--quick", action="store_true", help="tiny and few: only to see it work")
    parser.add_argument(
        "--backend",
        choices=sorted(kernels.BACKENDS),
        default="cupy",
        help="another one shows without a GPU that the run gets through; use it with --quick",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="measure nothing, but put the committed rows' tables into this file, between its "
        "`gpu` markers",
    )
    parser.set_defaults(rounds=timing.Settings().rounds, budget=None, timeout=None, out=None)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Time everything; return 1 if one of our own arms is wrong or did not get through."""
    if options.write:
        return write_tables(options.write, parser)
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds must be positive; found {options.seconds}")
    settings = kernel_benchmark.settings_of(options, parser)
    settings = replace(settings, deadline=time.monotonic() + options.seconds)
    try:
        for path in kernel_benchmark.destinations(options, "gpu"):
            records.require_writable(path)
        earlier = earlier_rows(options.go_on, settings.device) if options.go_on else []
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows = kernel_benchmark.run_and_keep(
        "gpu", options, settings, partial(measure, options, earlier), shared=True
    )
    print("\n".join(scaling.exponent_lines(rows)))
    left_out = sum(row.get("detail") == timing.NO_TIME for row in rows)
    if left_out:
        print(f"No time was left for {left_out} of the rows.", file=sys.stderr)
    return kernel_benchmark.exit_status(rows)


def write_tables(path: Path, parser: argparse.ArgumentParser) -> int:
    """Replace the block in a file and print it."""
    try:
        block = gpu_tables.gpu_block(gpu_tables.committed_rows())
        markers = gpu_tables.BEGIN, gpu_tables.END
        path.write_text(performance.with_block(path.read_text(), block, *markers))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(block))
    return 0


def _case_of(row: Row) -> tuple[str, ...]:
    return row["benchmark"], *(row[name] for name in NAMES[row["benchmark"]])


def earlier_rows(path: Path, device: str) -> list[Row]:
    """Return an earlier run's rows, but for the cases that it had no time for.

    What was fitted over its sizes is left out too: it is fitted anew, over all there are then.

    Raises ValueError for rows of another device: beside ours they would say nothing.
    """
    rows = records.read_rows(path)
    here = devices.device_facts()["device"] if device == devices.CUDA else "cpu"
    others = {row["device"] for row in rows} - {here}
    if others:
        raise ValueError(f"--go-on {path}: rows of {', '.join(sorted(others))}, not of {here}")
    cut_off = {_case_of(row) for row in rows if row.get("detail") == timing.NO_TIME}
    timed = [row for row in rows if "theory" not in row and "own_ms" not in row]
    return [row for row in timed if "status" not in row or _case_of(row) not in cut_off]


def measure(
    options: argparse.Namespace,
    earlier: list[Row],
    pool: timing.Pool,
    keep: Keep,
    progress: Callable[[str], None],
) -> None:
    """Time what the targets name, then what else there is time for; not what is there already."""
    given = options.backend, options.peers, pool
    keep(earlier)
    done = {_case_of(row) for row in earlier if "status" in row}

    def keep_as(benchmark: str) -> Keep:
        return lambda rows: keep({"benchmark": benchmark} | row for row in rows)

    # The shares in one file are of the same rates.
    rates = [row for row in earlier if "machine_rate" in row]
    rates = rates or measured_rates(["float32"], options, pool, keep_as("kernels"))

    def time_kernels(pairs: Pairs) -> None:
        cases = [kernel_cases.case(*pair) for pair in pairs if ("kernels", *pair) not in done]
        kernel_benchmark.measure(cases, *given, rates, keep_as("kernels"), progress)

    def time_steps(units: tuple[str, ...], networks: tuple[str, ...]) -> None:
        cases = [
            (problem, unit)
            for problem, unit in step.chosen_cases(options, units, networks)
            if ("step", unit, step.size_of(problem)) not in done
        ]
        step.measure(cases, *given, keep_as("step"), progress, with_compilers=False)

    first: Pairs
    later: Pairs
    first, later = kernel_benchmark.GPU_TARGETS, kernel_benchmark.GPU_OTHERS
    if options.quick:
        quick = [
            (kernel, size) for kernel, sizes in kernel_benchmark.QUICK.items() for size in sizes
        ]
        first, later = tuple(quick[:2]), tuple(quick[2:])
    time_kernels(first)
    time_steps(("step",), ("mlp", "cnn"))
    time_steps(("epoch",), ("mlp",))
    time_kernels(later)
    tqdm.write("")
    sizes = [
        (series, case)
        for series, case in scaling.all_sizes(options.backend, options.quick)
        if ("scaling", series.name, case.k) not in done
    ]
    before = [row for row in earlier if row["benchmark"] == "scaling"]
    scaling.measure(sizes, *given, keep_as("scaling"), progress, before)
