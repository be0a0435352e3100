"""Show how fast it is, from the rows of three commands; ``--write`` puts it into the README.

They are `kernels`, `step` and `first_use`.

Nothing is measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import first_use, records
from benchmarks.records import ROOT, Row
from benchmarks.timing import TIMED

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
NO_RESULTS = "No results yet: `benchmarks/results/` holds no rows of `kernels` or `step`."
BUSY_CORES = 0.1
RESULTS = ROOT / "benchmarks" / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "results", nargs="*", type=Path, help="rows to show; the committed ones if none are given"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the block in this file")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print the block, and put it between the markers of a file."""
    try:
        rows = [row for path in options.results for row in records.read_rows(path)]
        block = performance_block(rows if options.results else committed_rows())
        if options.write:
            options.write.write_text(with_block(options.write.read_text(), block))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(block))
    return 0


def committed_rows(results: Path = RESULTS) -> list[Row]:
    """Return the rows that the README is made from."""
    names = ("kernels", "step", "first_use")
    files = [path for name in names for path in sorted(results.glob(f"{name}*.jsonl"))]
    return [row for path in files for row in records.read_rows(path)]


def with_block(text: str, block: list[str], begin: str = BEGIN, end: str = END) -> str:
    """Return a text with what stands between its markers replaced.

    Raises
    ------
    ValueError
        If it does not have each marker once.
    """
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the file must hold {begin} and {end} once each")
    before, _, rest = text.partition(begin)
    return "\n".join([before + begin, *block, end]) + rest.partition(end)[2]


# --- what the commands print ------------------------------------------------------------------


def duration(milliseconds: float) -> str:
    """Return a time with three digits, in the unit that suits it."""
    unit, value = (" s", milliseconds / 1e3) if milliseconds >= 1e3 else (" ms", milliseconds)
    return f"{value:.3g}{unit}"


def mebibytes(size: int | None) -> str:
    """Return a size in MiB with one digit."""
    return "-" if size is None else f"{size / 2**20:.1f}"


def _share(value: float | None) -> str:
    return f"{value:>6.1%}" if value is not None and value == value else f"{'-':>6}"


def case_table(rows: list[Row]) -> list[str]:
    """Return one case's arms as text, ours first."""
    first = rows[0]
    name = first.get("kernel") or first.get("step") or f"{first['layer']}, {first['direction']},"
    lines = [
        f"\n{name} {first['size']} {first['dtype']}",
        f"  {'arm':<32} {'median':>10} {'x ours':>7} {'low':>6} {'high':>6} {'first':>9} "
        f"{'MiB':>8} {'copy':>6} {'GEMM':>6}",
    ]
    for row in rows:
        if row["status"] != TIMED:
            lines.append(f"  {row['arm']:<32} {row['status']}: {row['detail']}")
            continue
        ratio, low, high = (
            f"{row[key]:.2f}" if row[key] is not None else "-"
            for key in ("ratio_to_us", "ratio_to_us_low", "ratio_to_us_high")
        )
        lines.append(
            f"  {row['arm']:<32} {duration(row['median_ms']):>10} {ratio:>7} {low:>6} {high:>6} "
            f"{duration(row['first_call_ms']):>9} {mebibytes(row['peak_extra_bytes']):>8} "
            f"{_share(row.get('share_of_copy_bandwidth'))} "
            f"{_share(row.get('share_of_gemm_rate', row.get('gemm_share')))}"
        )
    busy = first.get("busy_elsewhere")
    if busy is not None and busy > BUSY_CORES:
        lines.append(f"  Other programs kept {busy:.1f} cores busy meanwhile: do not trust this.")
    return lines


def machine_lines(rows: Iterable[Row]) -> list[str]:
    """Return the measured rates as text."""
    lines = []
    for row in rows:
        if row.get("machine_rate") == "copy":
            lines.append(f"copy bandwidth {row['gigabytes_per_second']:.0f} GB/s ({row['arm']})")
        elif row.get("machine_rate") == "gemm":
            lines.append(f"GEMM {row['dtype']} {row['gigaflops']:.0f} GF/s ({row['arm']})")
    return lines


def exponent_lines(rows: Iterable[Row]) -> list[str]:
    """Return the fitted exponents of the sparse s-model's own time as text."""
    lines = []
    for row in rows:
        if "exponent_of" not in row:
            continue
        fitted = (row["exponent"], row["low"], row["high"])
        known = all(value is not None and value == value for value in fitted)
        text = "{:.2f} [{:.2f}, {:.2f}]".format(*fitted) if known else "lost in the spread"
        lines.append(
            f"{row['exponent_of']}, {row['dtype']}: own time ~ k^a from k = {row['k_from']} to "
            f"{row['k_to']}, a = {text}"
        )
    return lines


# --- the README's block -----------------------------------------------------------------------


def cases_of(rows: Iterable[Row], key: str) -> list[list[Row]]:
    """Return the rows of each case together, in the order of the file."""
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        if key in row:
            case = (row[key], row.get("direction"), row["size"], row["dtype"])
            cases.setdefault(case, []).append(row)
    return list(cases.values())


def ratio_words(row: Row | None) -> str:
    """Return a ratio with its percentiles."""
    if row is None or row.get("ratio_to_us") is None:
        return "-"
    return f"{row['ratio_to_us']:.2f} [{row['ratio_to_us_low']:.2f}, {row['ratio_to_us_high']:.2f}]"


def _is_ours(row: Row) -> bool:
    return str(row["arm"]).startswith("nalayer")


def _best(rows: list[Row], wanted: Callable[[Row], bool]) -> Row | None:
    """Return the fastest timed arm of those wanted."""
    timed = [row for row in rows if wanted(row) and row.get("ratio_to_us") is not None]
    return min(timed, key=lambda row: row["ratio_to_us"], default=None)


def kernels_markdown(rows: list[Row]) -> list[str]:
    """Return a table with one line for each kernel, size and dtype."""
    lines = [
        "| kernel | size | dtype | nalayer | extra MiB | best peer | times slower | naive form |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases_of(rows, "kernel"):
        ours = next(row for row in case if row["ours"])
        best = _best(case, lambda row: not _is_ours(row))
        naive = _best(case, lambda row: row["arm"] in ("torch, naive", "torch, scatter"))
        links = f", l={ours['n_kept']}" if ours["n_kept"] else ""
        cells = [
            f"`{ours['kernel']}`",
            ours["size"] + links,
            ours["dtype"],
            _time(ours),
            mebibytes(ours["peak_extra_bytes"]),
            best["arm"] if best else "none",
            ratio_words(best),
            ratio_words(naive),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def step_markdown(rows: list[Row]) -> list[str]:
    """Return a table with one line for each arm of the training step and the epoch."""
    lines = [
        "| network | | arm | time | times slower | share in GEMM |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases_of(rows, "step"):
        for row in case:
            timed = row["median_ms"] is not None
            share = row.get("gemm_share")
            cells = [
                row["size"],
                row["step"],
                row["arm"],
                duration(row["median_ms"]) if timed else f"{row['status']}: {row['detail']}",
                ratio_words(row),
                f"{share:.0%}" if share is not None else "-",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def layers_markdown(rows: list[Row]) -> list[str]:
    """Return a table with one line for each layer of the CNN and direction.

    The last column is the rate of our layer as a share of that of its matrix products alone.
    """
    lines = [
        "| network | layer | | nalayer | GF/s | torch | times slower | torch channels_last "
        "| times slower | GEMM alone, GF/s | share of that rate |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases_of(rows, "layer"):
        ours, by_arm = next(row for row in case if row["ours"]), {row["arm"]: row for row in case}
        floor = next((row for row in case if row["arm"].startswith("GEMM")), None)
        cells = [ours["size"], ours["layer"], ours["direction"], _time(ours), _rate(ours)]
        for arm in ("torch", "torch channels_last"):
            cells += [_time(by_arm.get(arm)), ratio_words(by_arm.get(arm))]
        cells += [_rate(floor), _share(ours["gemm_share"]).strip()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _time(row: Row | None) -> str:
    if row is None:
        return "-"
    return row["status"] if row["median_ms"] is None else duration(row["median_ms"])


def _rate(row: Row | None) -> str:
    return f"{row['gigaflops']:.0f}" if row and row["gigaflops"] else "-"


def not_timed(rows: Iterable[Row]) -> list[str]:
    """Return a list of the peers that could not be timed, each with its sizes."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if "kernel" in row and row["status"] not in (TIMED, "does not apply"):
            # What a crash last said differs from run to run; the place and the signal do not.
            why = str(row["detail"]).partition(":")[0]
            found.setdefault((row["arm"], row["kernel"], f"{row['status']} {why}"), []).append(
                row["size"]
            )
    return [
        f"- {arm}, `{kernel}` at {', '.join(dict.fromkeys(sizes))}: {what.strip()}"
        for (arm, kernel, what), sizes in found.items()
    ]


def all_of(rows: list[Row], key: str) -> str:
    """Return what the rows have there, each thing once."""
    return "; ".join(dict.fromkeys(str(row[key]) for row in rows))


def _where(rows: list[Row]) -> str:
    """Return machine, threads, versions and commits in a sentence."""
    machine, versions, blas, date, commit = (
        all_of(rows, key) for key in ("machine", "versions", "blas", "date", "commit")
    )
    return (
        f"Machine: {machine}; {versions}; NumPy's BLAS: {blas}. "
        f"Measured {date} at commit {commit}{_disturbance(rows)}."
    )


def _disturbance(rows: list[Row]) -> str:
    busy = max((row.get("busy_elsewhere") or 0.0 for row in rows), default=0.0)
    if busy <= BUSY_CORES:
        return ""
    return f", while other programs kept up to {busy:.1f} cores busy: not to be trusted"


def performance_block(rows: list[Row]) -> list[str]:
    """Return the README's block, in Markdown: all of its numbers are in the rows."""
    first = [row for row in rows if "first_use" in row]
    rows = [row for row in rows if "first_use" not in row]
    if not rows:
        return [NO_RESULTS]
    parts = [[_where(rows)]]
    rates = machine_lines(row for row in rows if "kernel" not in row)
    if rates:
        parts.append(["What the machine does: " + "; ".join(dict.fromkeys(rates)) + "."])
    if any("kernel" in row for row in rows):
        parts.append(kernels_markdown(rows))
    parts.append([f"- {line}" for line in exponent_lines(rows)])
    skipped = not_timed(rows)
    parts.append(["Peers that were not timed:", "", *skipped] if skipped else [])
    if any("step" in row for row in rows):
        parts.append(step_markdown(rows))
    if any("layer" in row for row in rows):
        parts.append(["The CNN's layers one by one, each with all that follows its product:"])
        parts.append(layers_markdown(rows))
    if first:
        parts.append([f"{first_use.sentence(first)} (Commit {all_of(first, 'commit')}.)"])
    lines: list[str] = []
    for part in parts:
        lines += ["", *part] if part else []
    return [*lines, ""]
