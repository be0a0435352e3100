"""Time every kernel against what a user could pick instead: PyTorch, torch.compile and JAX."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import kernels
from benchmarks import figures, kernel_cases, machine, peers, performance, records, timing
from benchmarks.kernel_cases import KERNELS, SOFTMAX, Case
from benchmarks.records import Row

SIZES = {
    "softmax_nll": ("256x10", "256x100", "256x1000", "4096x100", "4096x1000"),
    "s_model": ("256x10", "256x100", "256x1000", "4096x100", "4096x1000"),
    "sparse_s_model": ("256x100", "256x1000", "256x10000", "256x100000"),
    "c_model": ("256x300x10", "256x512x100", "256x512x300", "256x128x1000"),
    "sparse_c_model": ("256x300x1000", "256x300x10000"),
}
LARGE = {"softmax_nll": ("1024x10000",), "s_model": ("1024x10000",)}
QUICK = {
    "softmax_nll": ("32x10",),
    "s_model": ("32x10",),
    "sparse_s_model": ("32x20", "32x60"),
    "c_model": ("32x6x10",),
    "sparse_c_model": ("32x6x20",),
}
QUICK_SETTINGS = timing.Settings(rounds=3, block_seconds=0.005, budget_seconds=5)
DTYPES = ("float32", "float64")
N_RESAMPLES = 1000
BUSY = 0.5  # load average before the first measurement
METHOD = "rise of VmHWM over VmRSS in one warm call, without the results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.epilog = (
        "Results are compared with float64 NumPy before anything is timed. Ratios are of times in "
        "the same round; low and high are their 10th and 90th percentiles. The machine should "
        "have nothing else to do."
    )
    add_common_arguments(parser)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="only this; repeatable")
    parser.add_argument(
        "--size",
        action="append",
        metavar="NxK",
        help="in place of the usual sizes, NxDxK for c-models; repeatable",
    )
    parser.add_argument("--large", action="store_true", help="also the sizes that need gigabytes")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="float32; repeatable")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `kernels` and `step` have in common."""
    usual = timing.Settings()
    parser.add_argument(
        "--backend", choices=sorted(kernels.BACKENDS), help="whose kernels are ours"
    )
    parser.add_argument(
        "--rounds", type=int, default=usual.rounds, metavar="N", help="of interleaved blocks"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=usual.budget_seconds,
        metavar="S",
        help="fewer rounds where those of one size would take longer than so many seconds",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=usual.timeout_seconds,
        metavar="S",
        help="give up an arm that does not answer for so many seconds",
    )
    parser.add_argument("--quick", action="store_true", help="tiny and few: only to see it work")
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with other libraries",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write rows and figure here")


def settings_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> timing.Settings:
    """Return how long to measure; refuse what cannot be."""
    for name in ("rounds", "budget", "timeout"):
        value = getattr(options, name)
        if not 0 < value < math.inf:
            parser.error(f"--{name} must be positive; found {value}")
    quick = QUICK_SETTINGS
    return timing.Settings(
        min(options.rounds, quick.rounds) if options.quick else options.rounds,
        quick.block_seconds if options.quick else timing.Settings().block_seconds,
        quick.budget_seconds if options.quick else options.budget,
        options.timeout,
    )


def destinations(options: argparse.Namespace, name: str) -> list[Path]:
    """Return the files that the rows go to."""
    in_folder = options.out / f"{name}.jsonl" if options.out else None
    return [path for path in (options.json, in_folder) if path]


def provenance(name: str, options: argparse.Namespace, blas: str) -> Row:
    """Return what every row says of where it comes from; each row names its own backend."""
    base = records.provenance(
        name,
        options.command,
        options.backend or kernels.api.DEFAULT_BACKEND,
        machine.n_cores(),
        machine.n_cores(),
        (*records.LIBRARIES, *records.PEERS),
    )
    load, _, _ = os.getloadavg()
    if load > BUSY:
        print(
            f"The machine is busy (load average {load:.1f}): ratios of parallel code will be off.",
            file=sys.stderr,
        )
    return base | {"blas": blas, "load_average": load, "memory_method": METHOD}


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases asked for; raise ValueError for a size that fits no kernel."""
    wanted = options.kernel or KERNELS
    cases = []
    for kernel in wanted:
        sizes: Iterable[str] = QUICK[kernel] if options.quick else SIZES[kernel]
        if options.large:
            sizes = (*sizes, *LARGE.get(kernel, ()))
        for size in options.size or sizes:
            for dtype in options.dtype or ("float32",):
                cases.append(kernel_cases.case(kernel, size, dtype))
    return cases


def case_rows(
    case: Case,
    outcomes: list[timing.Outcome],
    machine_rows: list[Row],
) -> list[Row]:
    """Return one row for each arm of a case."""
    sizes = case.fields()
    moved, work = kernel_cases.bytes_moved(case), kernel_cases.flops(case)
    bandwidth = machine.copy_bandwidth(machine_rows)
    gemm = machine.gemm_rate(machine_rows, case.dtype)
    rows = []
    for row in timing.outcome_rows(outcomes):
        seconds = row["median_ms"] / 1e3 if row["median_ms"] else math.nan
        rows.append(
            sizes
            | row
            | {
                "bytes_moved": moved,
                "flops": work,
                "share_of_copy_bandwidth": 1e-9 * moved / seconds / bandwidth,
                "share_of_gemm_rate": 1e-9 * work / seconds / gemm,
            }
        )
    return rows


def own_seconds(outcomes: list[timing.Outcome]) -> np.ndarray | None:
    """Return our sparse s-model's time without the classifier's softmax, round by round."""
    ours = outcomes[0]
    softmax = next((o for o in outcomes if o.arm.name == SOFTMAX), None)
    if softmax is None or not ours.seconds or not softmax.seconds:
        return None
    return np.subtract(ours.seconds, softmax.seconds)


def fitted_exponent(
    seconds_k: dict[int, np.ndarray], rng: np.random.Generator
) -> tuple[float, float, float]:
    """Return the slope of log time over log k, and its 95 % bootstrap interval over rounds.

    NaN where a median is not positive: the layer's own time is then lost in the spread.

    Examples
    --------
    >>> times = {10: np.full(3, 1.0), 100: np.full(3, 10.0)}
    >>> [round(x, 6) for x in fitted_exponent(times, np.random.default_rng(0))]
    [1.0, 1.0, 1.0]
    """
    log_k = np.log(list(seconds_k))

    def slope(samples: list[np.ndarray]) -> float:
        medians = np.array([np.median(sample) for sample in samples])
        if not (medians > 0).all():
            return math.nan
        return float(np.polyfit(log_k, np.log(medians), 1)[0])

    drawn = [
        slope([rng.choice(sample, sample.size) for sample in seconds_k.values()])
        for _ in range(N_RESAMPLES)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return slope(list(seconds_k.values())), float(low), float(high)


def exponent_rows(own: dict[Case, np.ndarray]) -> list[Row]:
    """Return how the sparse s-model's own time grows with k: each decade alone, then all of them.

    Cases that differ in anything but k are kept apart.
    """
    groups: dict[tuple[int, str], dict[int, np.ndarray]] = {}
    for case, seconds in own.items():
        groups.setdefault((case.n, case.dtype), {})[case.k] = seconds
    rng = np.random.default_rng(0)
    rows = []
    for (n, dtype), found in groups.items():
        ks = sorted(found)
        spans = [ks[index : index + 2] for index in range(len(ks) - 1)]
        for span in spans + ([ks] if len(ks) > 2 else []):
            exponent, low, high = fitted_exponent({k: found[k] for k in span}, rng)
            rows.append(
                {
                    "exponent_of": "sparse_s_model without softmax_nll",
                    "arm": "nalayer",
                    "n": n,
                    "n_kept": kernel_cases.N_KEPT,
                    "dtype": dtype,
                    "exponent": exponent,
                    "low": low,
                    "high": high,
                    "k_from": span[0],
                    "k_to": span[-1],
                }
            )
    return rows


def measure(
    options: argparse.Namespace,
    cases: list[Case],
    settings: timing.Settings,
    cache: Path | None,
    machine_rows: list[Row],
    keep: Callable[[Iterable[Row]], None],
    progress: Callable[[str], None],
) -> None:
    """Time every case; hand over the rows as they come."""
    backend = options.backend or kernels.api.DEFAULT_BACKEND
    own: dict[Case, np.ndarray] = {}
    for case in cases:
        arms = kernel_cases.our_arms(case, backend)
        if options.peers:
            arms += peers.peer_arms(case)
        outcomes = timing.measure(
            arms,
            kernel_cases.references(case),
            timing.tolerance(case.dtype),
            settings,
            cache,
            timing.prefixed(progress, f"{case.kernel} {case.size}"),
        )
        rows = case_rows(case, outcomes, machine_rows)
        keep(rows)
        tqdm.write("\n".join(performance.case_table(rows)))
        seconds = own_seconds(outcomes)
        if seconds is not None:
            own[case] = seconds
    keep(exponent_rows(own))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the benchmark; return 1 if one of our own arms is wrong or did not get through."""
    settings = settings_of(options, parser)
    try:
        cases = chosen_cases(options)
        for path in destinations(options, "kernels"):
            records.require_writable(path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(
        f"nalayer kernels: {len(cases)} case{'s' * (len(cases) != 1)}, up to {settings.rounds} "
        f"rounds, about {settings.budget_seconds:g} s of timing each; first calls and the peers' "
        "compilers take as long again.",
        flush=True,
    )

    def body(cache: Path | None, keep: Keep, progress: Callable[[str], None]) -> None:
        dtypes = sorted({case.dtype for case in cases})
        libraries = gemm_libraries(options)
        rates = machine.measure_machine(dtypes, libraries, cache, settings, options.quick)
        keep(rates)
        tqdm.write("\n".join(performance.machine_lines(rates)))
        measure(options, cases, settings, cache, rates, keep, progress)

    rows = run_and_keep("kernels", options, settings, body)
    tqdm.write("\n".join(performance.exponent_lines(rows)))
    if options.out:
        figures.draw_kernels(rows, options.out / "kernels.png")
        print(f"\nPicture: {options.out / 'kernels.png'}\nRows:    {options.out / 'kernels.jsonl'}")
    return exit_status(rows)


Keep = Callable[[Iterable[Row]], None]


def gemm_libraries(options: argparse.Namespace) -> list[str]:
    """Return whose matrix products stand for the machine's GEMM rate: the best of them counts."""
    return ["numpy"] + ["torch"] * (options.peers and peers.is_installed("torch"))


def run_and_keep(
    name: str,
    options: argparse.Namespace,
    settings: timing.Settings,
    body: Callable[[Path | None, Keep, Callable[[str], None]], None],
) -> list[Row]:
    """Measure with a progress bar, and store the rows after every case: a kill loses one case."""
    paths = destinations(options, name)
    rows: list[Row] = []
    # Stopped workers may hold files in the cache for a moment longer than their death takes.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tqdm(bar_format="{elapsed} {desc}", disable=None, leave=False) as bar,
    ):
        # What is quick is not kept, and need not wait for compilers.
        cache = None if options.quick else Path(folder)
        base = provenance(name, options, machine.blas_name(cache, settings))

        def keep(new: Iterable[Row]) -> None:
            rows.extend(base | row | _backend_of(row, base) for row in new)
            for path in paths:
                records.write_rows(records.unfinished(path), rows)

        try:
            body(cache, keep, lambda words: bar.set_description_str(words))
        except KeyboardInterrupt:
            for path in paths if rows else []:
                tqdm.write(f"Rows so far: {records.unfinished(path)}", file=sys.stderr)
            raise
    for path in paths:
        os.replace(records.unfinished(path), path)
    return rows


def _backend_of(row: Row, base: Row) -> dict[str, Any]:
    return {"backend": row.get("backend") or base["backend"]}


def exit_status(rows: list[Row]) -> int:
    """Return 1 if one of our own arms is wrong, crashed, failed or hung."""
    bad = {timing.WRONG, timing.DIED, timing.FAILED, timing.NO_ANSWER}
    broken = [
        row for row in rows if str(row["arm"]).startswith("nalayer") and row.get("status") in bad
    ]
    for row in broken:
        tqdm.write(f"{row['arm']}: {row['status']} {row['detail']}", file=sys.stderr)
    return int(bool(broken))
