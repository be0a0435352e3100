"""The arms of a timing that live in one process: ``python -m benchmarks.worker FD``.

The parent (:mod:`benchmarks.timing`) sends what to build, then one request after the other. A
process of its own keeps thread pools of different libraries apart, and a crash stays in it. On the
CPU each arm has one; on a GPU the arms of one library share one, for it takes seconds to start.
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
    clock: Any = None
    """On a GPU the :class:`benchmarks.devices.Clock` of the library: a call then returns at once,
    and its work is done when the clock has waited for what it returns."""
    units: int = 1
    """How many units of work a call does; the times are of one."""


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
    if work.clock:
        peak = work.clock.peak_bytes(work.call)
        return None if peak is None else max(0, peak - work.result_bytes)
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
    result = work.call()
    if work.clock:
        work.clock.wait(result)
    return time.perf_counter() - started


def _time(work: Work, n_calls: int) -> float:
    timed = work.clock.seconds if work.clock else seconds_per_call
    return timed(work.call, max(1, n_calls // work.units)) / work.units


def _queued(work: Work, seconds: float) -> float | None:
    if not work.clock:
        return None
    found = work.clock.queued_seconds(work.call, seconds * work.units)
    return None if found is None else found / work.units


def _rest(work: Work) -> int | None:
    if not work.clock:
        return None
    work.clock.give_back()
    return work.clock.used_bytes()


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
    "time": _time,
    "queued": _queued,
    "rest": _rest,
    "results": lambda work: work.results(),
}


def build(target: str, arguments: dict[str, Any]) -> Work:
    """Call the function that ``module:function`` names."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(**arguments)


def serve(connection: Connection) -> None:
    """Answer requests until the parent hangs up; an exception is an answer too.

    A request names the arm that it is about.
    """
    works: dict[str, Work] = {}
    while True:
        try:
            request, arm, arguments = connection.recv()
        except EOFError:
            return
        answer: Any = None
        try:
            if request == "build":
                works[arm] = build(*arguments)
            elif request == "drop":
                dropped = works.pop(arm, None)
                clock, dropped = dropped and dropped.clock, None
                gc.collect()
                if clock:
                    clock.give_back()
            else:
                answer = REQUESTS[request](works[arm], *arguments)
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
