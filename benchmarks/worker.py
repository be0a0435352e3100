"""One arm of a timing, alone in a process of its own: ``python -m benchmarks.worker FD``.

The parent (:mod:`benchmarks.timing`) sends what to build, then one request after the other. A
process of its own keeps thread pools of different libraries apart, and a crash stays in it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Work:
    """What a builder returns: what is timed, and what is compared before."""

    call: Callable[[], Any]
    """One unit of work; it is done, on every thread, when this returns."""
    results: Callable[[], Arrays]
    """The arrays to be compared with the reference, in its order."""
    result_bytes: int = 0
    """Size of what a call hands back, which is not counted as extra memory."""


def relative_error(found: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """Return the largest error, each array's relative to its own largest entry; NaN if unlike.

    Examples
    --------
    >>> relative_error([np.array([1.0, 2.0])], [np.array([1.0, 4.0])])
    0.5
    >>> relative_error([np.array([np.nan])], [np.array([1.0])])
    nan
    """
    if len(found) != len(truth):
        return np.nan
    errors = []
    for one, exact in zip(found, truth, strict=True):
        if np.shape(one) != np.shape(exact):
            return np.nan
        # Row by row: the arrays may be large, and the differences are taken in float64.
        pairs = list(zip(np.atleast_2d(one), np.atleast_2d(exact), strict=True))
        scale = max(float(np.abs(row).max()) for _, row in pairs)
        worst = np.max([np.abs(row - exactly).max() for row, exactly in pairs])
        errors.append(float(worst) / (scale or 1.0))
    return float(np.max(errors))  # NaN if one of them is


def _status_bytes(field: str) -> int:
    """Return a size that Linux tells of this process, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status does not tell {field}")


def peak_extra_bytes(work: Work) -> int | None:
    """Return how far one warm call lifts the process's resident memory, beyond its results.

    The kernel's high-water mark counts every library's memory alike. It is reset after a warm
    call, with the C library's free lists given back first. What a library itself keeps between
    calls is not seen. None where the system offers no such mark.
    """
    work.call()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        result = work.call()
        rise = _status_bytes("VmHWM") - before
    except (OSError, AttributeError):
        return None
    del result
    return max(0, rise - work.result_bytes)


def seconds_per_call(call: Callable[[], Any], n_calls: int) -> float:
    """Return the median time of some calls, after one that is not counted."""
    call()
    seconds = []
    for _ in range(n_calls):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _first_call(work: Work) -> float:
    started = time.perf_counter()
    work.call()
    return time.perf_counter() - started


def _error(work: Work, folder: str) -> float:
    files = sorted(Path(folder).glob("*.npy"))
    return relative_error(work.results(), [np.load(file, mmap_mode="r") for file in files])


def _save(work: Work, folder: str) -> None:
    Path(folder).mkdir()
    for number, array in enumerate(work.results()):
        np.save(Path(folder) / f"{number}.npy", array)


REQUESTS: dict[str, Callable[..., Any]] = {
    "first call": _first_call,
    "error": _error,
    "save": _save,
    "memory": peak_extra_bytes,
    "time": lambda work, n_calls: seconds_per_call(work.call, n_calls),
    "results": lambda work: work.results(),
}


def build(target: str, arguments: dict[str, Any]) -> Work:
    """Call the function that ``module:function`` names."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(**arguments)


def serve(connection: Connection) -> None:
    """Answer requests until the parent hangs up; an exception is an answer too."""
    work: Work | None = None
    while True:
        try:
            request, arguments = connection.recv()
        except EOFError:
            return
        try:
            if request == "build":
                work, answer = build(*arguments), None
            else:
                answer = REQUESTS[request](work, *arguments)
            connection.send(("done", answer))
        except Exception as error:
            first_line = (str(error).strip() or "no message").splitlines()[0]
            connection.send(("failed", f"{type(error).__name__}: {first_line}"))


def main() -> None:
    """Serve on the file descriptor given; die with the parent, even while stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
