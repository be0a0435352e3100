"""Time every kernel against what a user could pick instead: PyTorch, torch.compile and JAX."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import kernels
from benchmarks import (
    devices,
    figures,
    kernel_cases,
    machine,
    peers,
    performance,
    records,
    timing,
)
from benchmarks.devices import CPU, CUDA
from benchmarks.kernel_cases import KERNELS, SOFTMAX, Case, device_of
from benchmarks.records import Row
from kernels import cuda_launch

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
# On a GPU what the targets name comes first, with everything that takes time to compile.
GPU_TARGETS = (
    ("s_model", "65536x1000"),
    ("c_model", "4096x512x1000"),
    ("sparse_s_model", "256x1000000"),
)
GPU_OTHERS = (
    ("s_model", "256x10"),
    ("c_model", "256x512x300"),
    ("s_model", "256x100"),
    ("s_model", "256x1000"),
    ("s_model", "4096x1000"),
    ("s_model", "1024x10000"),
    ("sparse_s_model", "256x1000"),
    ("sparse_s_model", "256x10000"),
    ("sparse_s_model", "256x100000"),
    ("c_model", "256x512x100"),
    ("sparse_c_model", "256x300x10000"),
    ("softmax_nll", "256x10"),
    ("softmax_nll", "65536x1000"),
)
GPU_COMPILED = (GPU_TARGETS[0], GPU_OTHERS[0])
QUICK_SETTINGS = timing.Settings(rounds=3, block_seconds=0.005, budget_seconds=5)
GPU_SETTINGS = timing.Settings(
    block_seconds=0.02, budget_seconds=2, timeout_seconds=90, device=devices.CUDA
)
DTYPES = ("float32", "float64")
N_RESAMPLES = 1000
BUSY = 0.5  # load average before the first measurement
METHODS = {
    CPU: "rise of VmHWM over VmRSS in one warm call, without the results",
    CUDA: "taken by a memory pool of one warm call's own (CuPy), rise of max_memory_allocated "
    "(PyTorch), without the results",
}


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
    parser.add_argument(
        "--backend",
        choices=sorted(kernels.BACKENDS),
        help="whose kernels are ours; with cupy everyone is on the GPU",
    )
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with other libraries",
    )
    add_timing_arguments(parser)


def add_timing_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how long is measured and where the rows go."""
    usual, gpu = timing.Settings(), GPU_SETTINGS
    parser.add_argument(
        "--rounds", type=int, default=usual.rounds, metavar="N", help="of interleaved blocks"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="S",
        help="fewer rounds where those of one size would take longer than so many seconds; "
        f"{usual.budget_seconds:g} if not given, {gpu.budget_seconds:g} on a GPU",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help="give up an arm that does not answer for so many seconds; "
        f"{usual.timeout_seconds:g} if not given, {gpu.timeout_seconds:g} on a GPU",
    )
    parser.add_argument("--quick", action="store_true", help="tiny and few: only to see it work")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write rows and figure here")


def settings_of(
    options: argparse.Namespace, parser: argparse.ArgumentParser, usual_budget: float | None = None
) -> timing.Settings:
    """Return how long to measure; refuse what cannot be, and a GPU that is not there."""
    device = device_of(options.backend)
    usual = GPU_SETTINGS if device == CUDA else timing.Settings()
    if usual_budget and device == CPU:
        usual = replace(usual, budget_seconds=usual_budget)
    given = {"rounds": options.rounds, "budget": options.budget, "timeout": options.timeout}
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} must be positive; found {value}")
    if device == CUDA:
        require_gpu(parser)
    if options.quick:
        quick = replace(QUICK_SETTINGS, device=device)
        return replace(
            quick,
            rounds=min(options.rounds, quick.rounds),
            timeout_seconds=options.timeout or usual.timeout_seconds,
        )
    return replace(
        usual,
        rounds=options.rounds,
        budget_seconds=options.budget or usual.budget_seconds,
        timeout_seconds=options.timeout or usual.timeout_seconds,
    )


def require_gpu(parser: argparse.ArgumentParser) -> None:
    """Stop with a message where there is no GPU to measure on."""
    try:
        devices.device_facts()
    except Exception as error:  # no CuPy, no driver, no device: each its own class
        parser.error(f"no GPU to measure on: {type(error).__name__}: {error}")


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
    device = device_of(options.backend)
    facts = {"blas": blas, "load_average": load, "memory_method": METHODS[device]}
    return base | facts | (_gpu_provenance(base) if device == CUDA else {})


def _gpu_provenance(base: Row) -> Row:
    facts = devices.device_facts()
    return {"device": facts["device"], "versions": f"{base['versions']}, {facts['versions']}"}


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases asked for; raise ValueError for a size that fits no kernel."""
    wanted = options.kernel or KERNELS
    pairs: list[tuple[str, str]] = []
    if device_of(options.backend) == CUDA and not (options.quick or options.size):
        pairs = [pair for pair in (*GPU_TARGETS, *GPU_OTHERS) if pair[0] in wanted]
    else:
        for kernel in wanted:
            sizes: Iterable[str] = QUICK[kernel] if options.quick else SIZES[kernel]
            if options.large:
                sizes = (*sizes, *LARGE.get(kernel, ()))
            pairs += [(kernel, size) for size in options.size or sizes]
    dtypes = options.dtype or ("float32",)
    return [kernel_cases.case(kernel, size, dtype) for kernel, size in pairs for dtype in dtypes]


def with_compilers(case: Case, device: str) -> bool:
    """Return whether peers that compile are asked: not at all sizes on a GPU, for it takes 20 s."""
    pair = (case.kernel, case.size)
    return device != CUDA or pair in GPU_COMPILED or pair not in GPU_OTHERS


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
        # On a GPU the device's own time says how near its limits the work is.
        milliseconds = row["device_ms"] or row["median_ms"]
        seconds = milliseconds / 1e3 if milliseconds else math.nan
        share_of_gemm = 1e-9 * work / seconds / gemm
        costs = {
            "bytes_moved": moved,
            "flops": work,
            "share_of_copy_bandwidth": 1e-9 * moved / seconds / bandwidth,
            "share_of_gemm_rate": share_of_gemm,
        }
        if case.kernel == "c_model" and row["backend"] == "cupy":
            costs |= _recomputation(case, share_of_gemm)
        rows.append(sizes | row | costs)
    return rows


def _recomputation(case: Case, share_of_gemm: float) -> Row:
    """Return the budget of the scores on a GPU, and the GEMM share with what it makes a fourth.

    Scores beyond the budget are worked out a second time for the gradients; ``flops`` counts the
    three products that are needed.
    """
    budget = cuda_launch.SCORE_TILE_BYTES
    fits = case.item_bytes * case.n * case.k**2 <= budget
    return {
        "score_budget_bytes": budget,
        "share_of_gemm_rate_recomputing": share_of_gemm * (1 if fits else 4 / 3),
    }


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
    cases: list[Case],
    backend: str,
    with_peers: bool,
    pool: timing.Pool,
    machine_rows: list[Row],
    keep: Keep,
    progress: Callable[[str], None],
) -> None:
    """Time every case; hand over the rows as they come."""
    device = pool.settings.device
    own: dict[Case, np.ndarray] = {}
    for case in cases:
        arms = kernel_cases.our_arms(case, backend)
        if with_peers:
            arms += peers.peer_arms(case, device, with_compilers(case, device))
        outcomes = timing.measure(
            arms,
            kernel_cases.references(case, device),
            timing.tolerance(case.dtype),
            pool,
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

    def body(pool: timing.Pool, keep: Keep, progress: Callable[[str], None]) -> None:
        rates = measured_rates(sorted({case.dtype for case in cases}), options, pool, keep)
        backend = options.backend or kernels.api.DEFAULT_BACKEND
        measure(cases, backend, options.peers, pool, rates, keep, progress)

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


def measured_rates(
    dtypes: list[str], options: argparse.Namespace, pool: timing.Pool, keep: Keep
) -> list[Row]:
    """Measure, keep and print what the machine can do, and return the rows."""
    rates = machine.measure_machine(dtypes, gemm_libraries(options), pool, options.quick)
    keep(rates)
    tqdm.write("\n".join(performance.machine_lines(rates)))
    return rates


def run_and_keep(
    name: str,
    options: argparse.Namespace,
    settings: timing.Settings,
    body: Callable[[timing.Pool, Keep, Callable[[str], None]], None],
    shared: bool = False,
) -> list[Row]:
    """Measure with a progress bar, and store the rows after every case: a kill loses one case.

    Arms share processes on a GPU, and if ``shared``.
    """
    paths = destinations(options, name)
    rows: list[Row] = []
    # Stopped workers may hold files in the cache for a moment longer than their death takes.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tqdm(bar_format="{elapsed} {desc}", disable=None, leave=False) as bar,
        ExitStack() as stack,
    ):
        # What is quick is not kept, and need not wait for compilers.
        cache = None if options.quick else Path(folder)
        pool = timing.Pool(cache, settings, shared or settings.device == CUDA)
        stack.callback(pool.close)
        base = provenance(name, options, machine.blas_name(pool))

        def keep(new: Iterable[Row]) -> None:
            rows.extend(base | row | _backend_of(row, base) for row in new)
            for path in paths:
                records.write_rows(records.unfinished(path), rows)

        try:
            body(pool, keep, lambda words: bar.set_description_str(words))
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
