"""The times on the page about one kernel in four versions, from rows; measures nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import records, studies
from benchmarks.performance import BUSY_CORES
from benchmarks.records import Row
from benchmarks.scaling_page import ENOUGH_ROUNDS, ms
from benchmarks.versions import LOOPS, NUMBA, NUMPY, ONE_THREAD
from nalayer.memory import size_words

STEPS = {
    LOOPS: "loops",
    NUMPY: "NumPy",
    ONE_THREAD: "Numba, one thread",
    NUMBA: "Numba, all threads",
}
CUDA_KERNELS = ("s_model", "s_model_nll")  # as `kernels` and as `gpu` name it

NAME = "kernel_versions.md"
BEGIN, END = "<!-- versions: begin -->", "<!-- versions: end -->"


def block(rows: list[Row], gpu: list[Row]) -> Iterator[str]:
    """Yield what stands between the page's markers."""
    yield from times(rows, gpu)
    yield ""
    yield from conclusions(rows, gpu)


def times(rows: list[Row], gpu: list[Row]) -> Iterator[str]:
    """Yield the table of times: sizes down, versions across."""
    versions = {arm: name for arm, name in STEPS.items() if any(row["arm"] == arm for row in rows)}
    on_gpu = cuda_rows(gpu)
    yield (
        "Milliseconds for loss and both gradients, float32 (the loops compute in Python's "
        "float64), median over rounds; in brackets how many times faster than the version to the "
        "left (below 1: slower), with the 10th and the 90th percentile of the ratios of a round:"
    )
    yield ""
    body = []
    for size in sizes(rows):
        cells = [f"({size[0]}, {size[1]})"]
        for arm in versions:
            cells.append(cell(one(rows, size, arm)))
        if on_gpu:
            cells.append(cuda_cell(on_gpu.get(size)))
        body.append(cells)
    heads = ["(n, K)", *versions.values(), *(["CUDA"] if on_gpu else [])]
    yield from studies.table(heads, body)
    yield ""
    yield (
        "A dash: not run. The versions for the CPU were timed in turn on one machine by "
        "`python -m benchmarks versions`, each in a process of its own."
    )
    if on_gpu:
        devices = sorted({row["device"] for row in on_gpu.values()})
        yield (
            f"CUDA ran on another machine ({', '.join(devices)}), by `make gpu`, with everything "
            "on the device: a call among many, launches included, and in brackets the device's "
            "time alone."
        )
    few = [size_of(row) for row in rows if 0 < row["rounds"] < ENOUGH_ROUNDS]
    if few:
        yield f"Of fewer than {ENOUGH_ROUNDS} rounds: {', '.join(map(str, dict.fromkeys(few)))}."
    busy = {size_of(row): row["busy_elsewhere"] or 0 for row in rows}
    if max(busy.values()) > BUSY_CORES:
        words = ", ".join(f"{cores:.1f} cores at {size}" for size, cores in busy.items())
        yield f"**Not on a quiet machine**: other programs kept busy {words}."


def cell(row: Row | None) -> str:
    """Return time and gain of one version at one size."""
    if row is None or row["median_ms"] is None:
        return "-"
    if row.get("gain") is None:
        return ms(row["median_ms"])
    gain, low, high = (f"{row[key]:.3g}" for key in ("gain", "gain_low", "gain_high"))
    return f"{ms(row['median_ms'])} ({gain} [{low}, {high}])"


def cuda_cell(row: Row | None) -> str:
    """Return the time of a call, and the device's part of it."""
    if row is None:
        return "-"
    alone = row.get("device_ms")
    return ms(row["median_ms"]) + (f" ({ms(alone)})" if alone is not None else "")


def conclusions(rows: list[Row], gpu: list[Row]) -> Iterator[str]:
    """Yield what the numbers say."""
    for arm, words in (
        (NUMPY, "From loops to NumPy"),
        (ONE_THREAD, "From NumPy to Numba on one thread"),
        (NUMBA, "From one thread to all"),
    ):
        gains = {
            size_of(row): row["gain"]
            for row in rows
            if row["arm"] == arm and row.get("gain") is not None
        }
        if gains:
            yield f"- **{words}**, times faster: {span(gains)}."
    for size in reversed(sizes(rows)):
        extra: list[Any] = [
            (one(rows, size, arm) or {}).get("peak_extra_bytes") for arm in (NUMPY, NUMBA)
        ]
        if None not in extra:
            numpy, numba = (size_words(n_bytes) for n_bytes in extra)
            yield (
                f"- **Memory** beyond arguments and results at {size}: {numpy} in NumPy, "
                f"{numba} in Numba."
            )
            break
    both = {
        size: row["median_ms"] / found["median_ms"]
        for size, found in cuda_rows(gpu).items()
        if (row := one(rows, size, NUMBA)) is not None and row["median_ms"] is not None
    }
    if both:
        yield f"- **From Numba on that CPU to CUDA on that GPU**, times faster: {span(both)}."


def span(gains: dict[tuple[int, int], float]) -> str:
    """Return the least and the largest gain with their sizes.

    Examples
    --------
    >>> span({(256, 10): 0.5, (256, 100): 3.0})
    'from 0.5 at (256, 10) to 3 at (256, 100)'
    """
    least, most = (pick(gains, key=gains.__getitem__) for pick in (min, max))
    if least == most:
        return f"{gains[most]:.3g} at {most}"
    return f"from {gains[least]:.3g} at {least} to {gains[most]:.3g} at {most}"


def size_of(row: Row) -> tuple[int, int]:
    """Return number of samples and of classes."""
    return row["n"], row["k"]


def sizes(rows: list[Row]) -> list[tuple[int, int]]:
    """Return the sizes, in the order of the file."""
    return list(dict.fromkeys(size_of(row) for row in rows))


def one(rows: Iterable[Row], size: tuple[int, int], arm: str) -> Row | None:
    """Return a version's row at one size."""
    return next((row for row in rows if size_of(row) == size and row["arm"] == arm), None)


def cuda_rows(gpu: list[Row]) -> dict[tuple[int, int], Row]:
    """Return our CUDA kernel's rows by size, of the device that has most sizes.

    Of several, the last one measured.
    """
    found = [
        row
        for row in gpu
        if row.get("kernel") in CUDA_KERNELS
        and row.get("dtype") == "float32"
        and row.get("backend") == "cupy"
        and str(row.get("arm")).startswith("nalayer")
        and row.get("median_ms") is not None
    ]
    by_device: dict[str, dict[tuple[int, int], Row]] = {}
    for row in sorted(found, key=lambda row: row["date"]):
        by_device.setdefault(row["device"], {})[size_of(row)] = row
    return max(by_device.values(), key=len, default={})


def gpu_rows(results: Path) -> list[Row]:
    """Return the rows of every run on a GPU."""
    return [row for path in sorted(results.glob("gpu*.jsonl")) for row in records.read_rows(path)]


def sources(results: Path, rows: list[Row], gpu: list[Row]) -> Iterator[tuple[Path, list[Row]]]:
    """Yield the files that the page quotes, with the rows that it quotes."""
    yield results / "versions.jsonl", rows
    quoted = list(cuda_rows(gpu).values())
    for path in sorted(results.glob("gpu*.jsonl")):
        here = [row for row in records.read_rows(path) if row in quoted]
        if here:
            yield path, here
