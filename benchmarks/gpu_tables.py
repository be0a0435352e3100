"""The README's block on the GPU, from the rows of `gpu`: all of its numbers are in the rows."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks import performance
from benchmarks.performance import RESULTS, duration, mebibytes, ratio_words
from benchmarks.records import Row, read_rows
from benchmarks.timing import TIMED

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
NO_RESULTS = "No results yet: `benchmarks/results/` holds no rows of `gpu`."
LIBRARIES = ("torch", "torch.compile", "jax.jit")


def committed_rows() -> list[Row]:
    """Return the rows that the README is made from."""
    return [row for path in sorted(RESULTS.glob("gpu*.jsonl")) for row in read_rows(path)]


def gpu_block(rows: list[Row]) -> list[str]:
    """Return the README's block, in Markdown: device by device."""
    by_device: dict[str, list[Row]] = {}
    for row in rows:
        if row["benchmark"] in ("kernels", "step", "scaling"):
            by_device.setdefault(row["device"], []).append(row)
    if not by_device:
        return [NO_RESULTS]
    return [line for of_device in by_device.values() for line in _device_block(of_device)]


def _device_block(rows: list[Row]) -> list[str]:
    parts = [
        [_where(rows)],
        ["The device copies and multiplies: " + "; ".join(performance.machine_lines(rows)) + "."],
        kernel_table(row for row in rows if row["benchmark"] == "kernels"),
        step_table(row for row in rows if row["benchmark"] == "step"),
        scaling_table(row for row in rows if row["benchmark"] == "scaling"),
        left_out(rows),
    ]
    lines: list[str] = []
    for part in parts:
        lines += ["", *part] if part else []
    return [*lines, ""]


def _where(rows: list[Row]) -> str:
    device, machine, versions, date, commit = (
        performance.all_of(rows, key) for key in ("device", "machine", "versions", "date", "commit")
    )
    return f"Device: {device}, in {machine}; {versions}. Measured {date} at commit {commit}."


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _time(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else duration(milliseconds)


def library_of(arm: str) -> str:
    """Return whose arm it is, as the table's columns have it.

    Examples
    --------
    >>> library_of("torch.compile reduce-overhead, fused Adam"), library_of("torch channels_last")
    ('torch.compile', 'torch')
    """
    return arm.partition(",")[0].split()[0]


def _best(rows: list[Row], library: str) -> str:
    """Return the best ratio of a library's arms, or why there is none."""
    theirs = [row for row in rows if library_of(row["arm"]) == library]
    timed = [row for row in theirs if row["ratio_to_us"] is not None]
    if not timed:
        return "; ".join(dict.fromkeys(row["status"] for row in theirs)) or "-"
    best = min(timed, key=lambda row: row["ratio_to_us"])
    device = best["device_ratio_to_us"]
    return ratio_words(best) + ("" if device is None else f", {device:.2f}")


def kernel_table(rows: Iterable[Row]) -> list[str]:
    """Return a table with one line for each kernel and size."""
    lines = []
    for case in performance.cases_of(rows, "kernel"):
        ours = next(row for row in case if row["ours"])
        links = f", l={ours['n_kept']}" if ours["n_kept"] else ""
        timed = ours["status"] == TIMED
        cells = [
            f"`{ours['kernel']}`",
            ours["size"] + links,
            _time(ours["median_ms"]) if timed else ours["status"],
            _time(ours["device_ms"]),
            _percent(ours["share_of_copy_bandwidth"]),
            _percent(ours["share_of_gemm_rate"]) if ours["d"] else "-",
            mebibytes(ours["peak_extra_bytes"]),
            *(_best(case, library) for library in LIBRARIES),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    head = [
        "| kernel | size | nalayer | device alone | of copy bandwidth | of GEMM rate | extra MiB "
        "| PyTorch takes | torch.compile | JAX |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return head + lines if lines else []


def step_table(rows: Iterable[Row]) -> list[str]:
    """Return a table with one line for each arm of a training step and an epoch."""
    lines = []
    for case in performance.cases_of(rows, "step"):
        for row in case:
            timed = row["status"] == TIMED
            cells = [
                row["size"],
                row["step"],
                row["arm"],
                _time(row["median_ms"]) if timed else f"{row['status']}: {row['detail']}",
                _time(row["device_ms"]),
                ratio_words(row),
                mebibytes(row["peak_extra_bytes"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    head = [
        "| network | | arm | time | device alone | times slower | extra MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    return head + lines if lines else []


def scaling_table(rows: Iterable[Row]) -> list[str]:
    """Return a table of the times of every arm of every series, one column for each K."""
    timed: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        if "status" in row:
            said = _time(row["median_ms"]) if row["status"] == TIMED else row["status"]
            timed.setdefault((row["series"], row["arm"]), {})[row["k"]] = said
    ks = sorted({k for found in timed.values() for k in found})
    if not ks:
        return []
    lines = [
        "| series | arm | " + " | ".join(f"K={k:,}" for k in ks) + " |",
        "|---" * (2 + len(ks)) + "|",
    ]
    for (series, arm), found in timed.items():
        cells = [series, arm, *(found.get(k, "-") for k in ks)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def left_out(rows: Iterable[Row]) -> list[str]:
    """Return a list of the kernels' arms that were not timed, each with its sizes."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["benchmark"] == "kernels" and row.get("status", TIMED) != TIMED:
            found.setdefault((row["arm"], f"{row['status']}: {row['detail']}"), []).append(
                f"`{row['kernel']}` {row['size']}"
            )
    lines = [f"- {arm}, {', '.join(sizes)}: {why}" for (arm, why), sizes in found.items()]
    return ["Not timed:", "", *lines] if lines else []
