"""Time and memory of the noise layers from ten classes to a million: dense against sparse.

Loss with gradients, and whole training steps, at growing numbers of classes; exponents are fitted
and set beside what the formulas say.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import kernels
from benchmarks import records, scaling_arms, timing
from benchmarks.devices import CPU, CUDA
from benchmarks.kernel_cases import Case, device_of
from benchmarks.kernels import (
    Keep,
    add_common_arguments,
    destinations,
    exit_status,
    fitted_exponent,
    run_and_keep,
    settings_of,
)
from benchmarks.records import Row
from benchmarks.scaling_arms import DENSE, NAIVE, SOFTMAX, sparse_name
from benchmarks.timing import Arm, Outcome

KEPT = (1, 20, 5)  # the paper's choice last: peers are given that one
MAIN_KEPT = 5
OWN = ", own time"


@dataclass(frozen=True)
class Series:
    """One sweep over the number of classes."""

    name: str
    model: str
    n: int
    d: int
    ks: tuple[int, ...]
    arms: str = "all"
    """"all"; "own" for the sparse layer and the softmax alone; "step" for training steps"""
    kept_memory: bool = False
    """see :func:`benchmarks.scaling_arms.with_kept_memory`"""

    @property
    def cases(self) -> list[Case]:
        """The dense problem of every size."""
        return [Case(self.model, self.n, k, self.d) for k in self.ks]


def _decades(low: int, high: int) -> tuple[int, ...]:
    """Return two sizes a decade, from 10^low to 10^high.

    Examples
    --------
    >>> _decades(1, 2)
    (10, 32, 100)
    """
    return tuple(round(10 ** (half / 2)) for half in range(2 * low, 2 * high + 1))


# Sizes more for the dense layer, whose exponent is fitted there and which goes no further.
KEPT_SIZES = tuple(sorted({5623, 17_783, 23_714, *_decades(3, 6)}))
SERIES = (
    Series("s", "s_model", 256, 0, _decades(1, 6)),
    Series("s-kept", "s_model", 256, 0, KEPT_SIZES, kept_memory=True),
    Series("s-own", "s_model", 16, 0, _decades(2, 6), "own"),
    Series("c", "c_model", 256, 64, _decades(1, 5)),
    Series("c-kept", "c_model", 256, 64, (100, 178, 316, 562, 1000), kept_memory=True),
    Series("c-own", "c_model", 16, 64, _decades(2, 5), "own"),
    Series("step", "s_model", 256, 0, _decades(2, 6), "step"),
    Series("step-kept", "s_model", 256, 0, _decades(5, 6), "step", kept_memory=True),
)
GPU_SERIES = (
    Series("s", "s_model", 256, 0, (100, 1000, 10_000, 100_000, 1_000_000)),
    Series("step", "s_model", 256, 0, (100, 1000, 10_000, 100_000, 1_000_000), "step"),
    Series("c", "c_model", 256, 64, (100, 1000, 10_000)),
)
QUICK_KS = (10, 32)

# What the formulas say of the time's exponent in K, and from where to where that is fitted: (arm,
# series, exponent, from, to). Where two terms add up the larger one counts only far out. Large
# calls of a dense layer take the time of their work only with kept memory.
THEORY = (
    (NAIVE, "s-kept", 2.0, 1000, 10_000),
    # From where K^2 is nearly all of it: a batch of one sample takes .9 of what 256 take at
    # 10,000, .8 at 5623, where part of theta stays in the cache besides.
    (DENSE, "s-kept", 2.0, 10_000, 23_714),
    (SOFTMAX, "s-kept", 1.0, 1000, 1_000_000),
    (sparse_name(5), "s-kept", 1.0, 1000, 1_000_000),
    (NAIVE, "c-kept", 2.0, 100, 1000),
    (DENSE, "c-kept", 2.0, 100, 1000),
    *((sparse_name(kept) + OWN, "s-own", 1.0, 100, 1_000_000) for kept in sorted(KEPT)),
    *((sparse_name(kept) + OWN, "c-own", 1.0, 100, 100_000) for kept in sorted(KEPT)),
)

GROWTH = {NAIVE: 2, DENSE: 2, "torch naive": 2, "torch column": 2, "torch flat": 2}
"""exponent of an arm's time in K by which it is said what a call will take, before it is made"""
LONGEST_CALL = 10.0
"""seconds; a dozen calls of an arm are made at least"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.epilog = (
        "Results are compared with float64 NumPy before anything is timed. The largest sizes need "
        "16 GiB of memory. The machine should have nothing else to do."
    )
    add_common_arguments(parser)
    names = [series.name for series in SERIES]
    parser.add_argument("--series", action="append", choices=names, help="only this; repeatable")
    parser.add_argument("--smallest", type=int, default=2, metavar="K", help="no smaller sizes")
    parser.add_argument("--largest", type=int, default=10**6, metavar="K", help="no larger sizes")
    parser.add_argument(
        "--merge",
        type=Path,
        metavar="FILE",
        help="put the rows into this file, in place of the same arms' at the same sizes",
    )


def arms_of(series: Series, case: Case, backend: str, with_peers: bool) -> list[Arm]:
    """Return who is timed at one size of a series."""
    if series.arms == "step":
        return scaling_arms.step_arms(case, MAIN_KEPT, backend)
    large = case.n * case.k > 10**8  # the memory of three of them
    kept = (MAIN_KEPT,) if large or device_of(backend) == CUDA else KEPT
    arms = scaling_arms.kernel_arms(case, kept, backend, with_peers and series.arms == "all")
    if series.arms == "own":
        arms = [arm for arm in arms if arm.name == SOFTMAX or arm.name.startswith("nalayer sparse")]
    # Ratios are to the first arm.
    return sorted(arms, key=lambda arm: arm.name != sparse_name(MAIN_KEPT))


def without_too_long(arms: list[Arm], k: int, seconds: dict[str, dict[int, float]]) -> list[Arm]:
    """Leave out the arms that would take too long, by their times at smaller sizes.

    Parameters
    ----------
    arms : list of Arm
    k : int
        Number of classes of the size that is next.
    seconds : dict
        By arm and number of classes, of the sizes that are done.
    """
    found = []
    for arm in arms:
        done = seconds.get(arm.name)
        if arm.name in GROWTH and done and not arm.skip:
            last = max(done)
            expected = done[last] * (k / last) ** GROWTH[arm.name]
            if expected > LONGEST_CALL:
                detail = f"a call would take about {expected:.0f} s, by that at K = {last}"
                arm = replace(arm, skip=timing.NOT_RUN, detail=detail)
        found.append(arm)
    return found


def theory_on(device: str) -> list[tuple[str, str, float, int, int]]:
    """Return :data:`THEORY` for a device's series: on a GPU CuPy's pool keeps memory in all."""
    if device == CPU:
        return list(THEORY)
    return [
        (arm, series.removesuffix("-kept"), theory, k_from, k_to)
        for arm, series, theory, k_from, k_to in THEORY
    ]


def all_sizes(backend: str | None, quick: bool) -> list[tuple[Series, Case]]:
    """Return every size of every series."""
    return [
        (series, case)
        for series in (GPU_SERIES if device_of(backend) == CUDA else SERIES)
        for case in (
            [Case(series.model, 8, k, series.d) for k in QUICK_KS] if quick else series.cases
        )
    ]


def chosen(options: argparse.Namespace) -> list[tuple[Series, Case]]:
    """Return every size that is asked for."""
    return [
        (series, case)
        for series, case in all_sizes(options.backend, options.quick)
        if not options.series or series.name in options.series
        if options.smallest <= case.k <= options.largest
    ]


def case_rows(series: Series, case: Case, outcomes: list[Outcome]) -> list[Row]:
    """Return one row for each arm of a size."""
    place = {"series": series.name, "n": case.n, "d": case.d or None}
    unit = "step" if series.arms == "step" else "kernel"
    return [
        place
        | {"k": case.k, unit: series.model, "dtype": case.dtype}
        | row
        | {"rounds_ms": [1e3 * seconds for seconds in outcome.seconds]}
        for row, outcome in zip(timing.outcome_rows(outcomes), outcomes, strict=True)
    ]


Times = dict[tuple[str, str], dict[int, np.ndarray]]


def times_of(rows: Iterable[Row]) -> Times:
    """Return every arm's seconds for each round, and the sparse layers' own: less the softmax's."""
    times: Times = {}
    run_of: dict[tuple[str, str, int], tuple[Any, ...]] = {}
    for row in rows:
        if row.get("rounds_ms"):
            series, arm, k, seconds = row["series"], row["arm"], row["k"], row["rounds_ms"]
            times.setdefault((series, arm), {})[k] = np.array(seconds) / 1e3
            run_of[series, arm, k] = row.get("commit"), row.get("date"), len(seconds)
    for (series, arm), found in list(times.items()):
        softmax = times.get((series, SOFTMAX), {})
        if arm.startswith("nalayer sparse"):
            # Round by round, so of one run: merged rows may be of two.
            own = {
                k: seconds - softmax[k]
                for k, seconds in found.items()
                if run_of[series, arm, k] == run_of.get((series, SOFTMAX, k))
            }
            if own:
                times[series, arm + OWN] = own
    return times


def exponent_rows(times: Times, device: str = CPU) -> list[Row]:
    """Return the fitted exponents beside the theory's, and the own times that they are of."""
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for arm, series, theory, k_from, k_to in theory_on(device):
        found = times.get((series, arm), {})
        inside = {k: seconds for k, seconds in found.items() if k_from <= k <= k_to}
        if len(inside) < 2:
            continue
        exponent, low, high = fitted_exponent(inside, rng)
        fitted = {"exponent": exponent, "low": low, "high": high, "theory": theory}
        span = {"k_from": min(inside), "k_to": max(inside)}
        rows.append({"series": series, "arm": arm} | fitted | span)
    for (series, arm), found in times.items():
        if arm.endswith(OWN):
            rows += [
                {"series": series, "arm": arm, "k": k, "own_ms": 1e3 * float(np.median(seconds))}
                for k, seconds in sorted(found.items())
            ]
    return rows


def measure(
    sizes: list[tuple[Series, Case]],
    backend: str,
    with_peers: bool,
    pool: timing.Pool,
    keep: Keep,
    progress: Callable[[str], None],
    earlier: Iterable[Row] = (),
) -> None:
    """Time every size; hand over the rows as they come, exponents over ``earlier`` ones too."""
    rows = list(earlier)
    for series, case in sizes:
        done = {
            arm: {k: float(np.median(found)) for k, found in times.items()}
            for (name, arm), times in times_of(rows).items()
            if name == series.name
        }
        arms = without_too_long(arms_of(series, case, backend, with_peers), case.k, done)
        outcomes = timing.measure(
            scaling_arms.with_kept_memory(arms) if series.kept_memory else arms,
            scaling_arms.references(arms, pool.settings.device),
            timing.tolerance(case.dtype),
            pool,
            timing.prefixed(progress, f"{series.name} K={case.k}"),
        )
        new = case_rows(series, case, outcomes)
        keep(new)
        tqdm.write("\n".join(_case_lines(new)))
        rows += new
    keep(exponent_rows(times_of(rows), pool.settings.device))


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Return the rows of a results file with those of a later run of some of the sizes.

    An arm's new row at a size takes the old one's place. The exponents of its series are fitted
    anew, over the rounds of both; an old one stays where it was fitted over more sizes, from rows
    that do not have their rounds.
    """
    timed = {_place(row): row for row in [*old, *new] if "theory" not in row}
    series = {row["series"] for row in new}
    base = dict(takewhile(lambda field: field[0] != "series", new[0].items()))
    device = base.get("device", CPU)
    times = times_of(row for row in timed.values() if row["series"] in series)
    fitted = {_place(row): base | row for row in exponent_rows(times, device)}
    asked = {(name, arm): span for arm, name, _, *span in theory_on(device)}
    for row in old:
        span = asked.get((row["series"], row["arm"])) if "theory" in row else None
        if span and span[0] <= row["k_from"] and row["k_to"] <= span[1]:
            other = fitted.get(_place(row))
            if other is None or row["k_from"] < other["k_from"] or other["k_to"] < row["k_to"]:
                fitted[_place(row)] = row
    names = [one.name for one in SERIES]
    rows = (timed | fitted).values()
    return sorted(rows, key=lambda row: (names.index(row["series"]), "theory" in row))


def _place(row: Row) -> tuple[Any, ...]:
    """Return what a row is of: one time, one own time, or one exponent."""
    kind = "exponent" if "theory" in row else "own" if "own_ms" in row else "time"
    return kind, row["series"], row["arm"], row.get("k")


def _case_lines(rows: list[Row]) -> Iterator[str]:
    first = rows[0]
    features = f", d = {first['d']}" if first["d"] else ""
    yield f"{first['series']}: n = {first['n']}{features}, K = {first['k']}"
    for row in rows:
        said = row["status"] if row["median_ms"] is None else f"{row['median_ms']:.4g} ms"
        peak = row["peak_extra_bytes"]
        extra = "" if peak is None else f"{peak / 2**20:.1f} MiB extra"
        yield f"  {row['arm']:24s} {said:>14s}  {extra:>18s}  {row['detail']}"


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the benchmark; return 1 if one of our own arms is wrong or did not get through."""
    settings = settings_of(options, parser, usual_budget=20.0)
    try:
        for path in destinations(options, "scaling"):
            records.require_writable(path)
        if options.merge:
            records.require_writable(options.merge)
            records.read_rows(options.merge)  # refused before anything is measured
    except (OSError, ValueError) as error:
        parser.error(str(error))
    sizes, backend = chosen(options), options.backend or kernels.api.DEFAULT_BACKEND
    print(
        f"nalayer scaling: {len(sizes)} sizes, about {settings.budget_seconds:g} s of timing each."
    )

    def body(pool: timing.Pool, keep: Keep, progress: Callable[[str], None]) -> None:
        measure(sizes, backend, options.peers, pool, keep, progress)

    rows = run_and_keep("scaling", options, settings, body)
    print("\n".join(exponent_lines(rows)))
    if options.merge:
        records.write_rows(options.merge, merged(records.read_rows(options.merge), rows))
    return exit_status(rows)


def exponent_lines(rows: list[Row]) -> list[str]:
    """Return the exponents as text."""
    return [
        f"{row['series']:6s} {row['arm']:32s} K = {row['k_from']} to {row['k_to']}: "
        f"{fitted_words(row)}, theory {row['theory']:g}"
        for row in rows
        if "theory" in row
    ]


def fitted_words(row: Row) -> str:
    """Return an exponent with its interval."""
    values = [row[name] for name in ("exponent", "low", "high")]
    if any(value is None or value != value for value in values):
        return "lost in the spread"
    return "{:.2f} [{:.2f}, {:.2f}]".format(*values)
