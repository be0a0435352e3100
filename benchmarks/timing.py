"""The one timing harness: results compared first, then arms timed in turn, ratios per round.

Every arm lives in a process of its own with a fresh environment (:mod:`benchmarks.worker`), and
all but the one being timed are stopped by a signal, so that no thread pool spins beside another.
In each round every arm times a block of calls, in an order that rotates; a machine that slows
down slows all arms of a round, and the ratios hold.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import ROOT, Row

LOW, HIGH = 10, 90  # percentiles of the ratios per round
LEAST_ROUNDS = 3
MOST_CALLS = 1000  # in a block
# What decides about threads is left to each library, as in a fresh shell.
THREAD_SETTINGS = re.compile(r"^(OMP|GOMP|KMP|MKL|NUMBA|TORCH|XLA)_|_NUM_THREADS$")
TIMED, WRONG, DIED, FAILED, NO_ANSWER = "timed", "wrong", "died", "failed", "no answer"


def tolerance(dtype: Any) -> float:
    """Return how far an arm's results may be off, relative to the largest entry of each array.

    Ten of the dtype's bits: rounding in any sensible order of the same sums stays far below, and
    another formula, a term left out or an added epsilon of 1e-3 does not.

    Examples
    --------
    >>> f"{tolerance(np.float32):.1e}, {tolerance(np.float64):.1e}"
    '1.2e-04, 2.3e-13'
    """
    return float(2**10 * np.finfo(dtype).eps)


@dataclass(frozen=True)
class Arm:
    """One contestant: the function that builds its work in the worker, or why there is none."""

    name: str
    build: str = ""
    """``module:function``; it returns a :class:`benchmarks.worker.Work`"""
    arguments: dict[str, Any] = field(default_factory=dict)
    reference: str = "reference"
    """which of the references its results are compared with"""
    skip: str = ""
    """a status such as "missing": the arm is not run, and its row says so"""
    detail: str = ""
    backend: str = ""
    """whose code it is: "numpy" or "numba" for ours, the library for a peer"""


@dataclass(frozen=True)
class Settings:
    """How long to measure; the defaults are for figures that are kept."""

    rounds: int = 15
    block_seconds: float = 0.15
    """a block of an arm's calls takes about so long"""
    budget_seconds: float = 90.0
    """fewer rounds are made where they would take longer than this"""
    timeout_seconds: float = 300.0
    """an arm that does not answer a request for so long is given up"""


@dataclass
class Outcome:
    """What became of one arm."""

    arm: Arm
    status: str = TIMED
    detail: str = ""
    first_call_seconds: float | None = None
    error: float | None = None
    tolerance: float | None = None
    peak_extra_bytes: int | None = None
    n_calls: int = 1
    seconds: list[float] = field(default_factory=list)
    """per call, one for each round; empty unless the arm was timed to the end"""
    busy_elsewhere: float | None = None
    """cores that other programs kept busy while the rounds went on; it should be near 0"""


class ArmError(Exception):
    """An arm that cannot be timed, with the status that its row gets."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail


def prefixed(progress: Callable[[str], None], prefix: str) -> Callable[[str], None]:
    """Return a ``progress`` that says first what it is about."""
    return lambda words: progress(f"{prefix}: {words}")


def fresh_environment(cache: Path | None) -> dict[str, str]:
    """Return this process's environment without thread settings.

    Compilers keep their caches in ``cache``, or where they always do if it is None.
    """
    kept = {name: value for name, value in os.environ.items() if not THREAD_SETTINGS.search(name)}
    if cache is None:
        usual = os.environ.get("NUMBA_CACHE_DIR")
        caches = {"NUMBA_CACHE_DIR": usual} if usual else {}
    else:
        caches = {
            "NUMBA_CACHE_DIR": str(cache / "numba"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        }
    return kept | caches | {"JAX_PLATFORMS": "cpu"}


class Worker:
    """A process that builds one arm's work and answers requests, stopped while it has none."""

    def __init__(self, arm: Arm, cache: Path | None, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._cpu_seconds = 0.0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(theirs.fileno())],
            cwd=ROOT,
            env=fresh_environment(cache),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            start_new_session=True,
        )
        theirs.close()
        try:
            self.ask("build", arm.build, arm.arguments)
        except BaseException:
            self.close()
            raise

    def ask(self, request: str, *arguments: Any) -> Any:
        """Wake the process, return its answer and stop it again; raise :class:`ArmError`."""
        self._process.send_signal(signal.SIGCONT)
        try:
            self._connection.send((request, arguments))
            if not self._connection.poll(self._timeout):
                detail = f"to '{request}' within {self._timeout:g} s"
                self._process.kill()
                raise ArmError(NO_ANSWER, detail)
            outcome, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise ArmError(DIED, f"at '{request}', {self._last_words()}") from None
        self._process.send_signal(signal.SIGSTOP)
        if outcome == "failed":
            raise ArmError(FAILED, f"at '{request}', {answer}")
        return answer

    def cpu_seconds(self) -> float:
        """Return the processor time of all threads, of a dead process as far as it was seen."""
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            return self._cpu_seconds
        user, system = stat[11:13]
        self._cpu_seconds = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        return self._cpu_seconds

    def _last_words(self) -> str:
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{how}: {lines[-1].strip()}" if lines else how

    def close(self) -> None:
        """End the process, whatever state it is in."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        self._errors.close()


def save_references(
    references: dict[str, Arm], folder: Path, cache: Path | None, settings: Settings
) -> None:
    """Work out each reference in a process of its own and store it in ``folder / name``."""
    for name, arm in references.items():
        worker = Worker(arm, cache, settings.timeout_seconds)
        try:
            worker.ask("save", str(folder / name))
        finally:
            worker.close()


def _prepare(outcome: Outcome, worker: Worker, folder: Path) -> float:
    """Compare, then measure all that one arm alone decides; return the seconds of a call."""
    outcome.first_call_seconds = worker.ask("first call")
    outcome.error = worker.ask("error", str(folder / outcome.arm.reference))
    assert outcome.error is not None
    assert outcome.tolerance is not None
    if not outcome.error <= outcome.tolerance:
        detail = f"relative error {outcome.error:.1e}, allowed {outcome.tolerance:.1e}"
        raise ArmError(WRONG, detail)
    outcome.peak_extra_bytes = worker.ask("memory")
    return worker.ask("time", 1)


def measure(
    arms: Sequence[Arm],
    references: dict[str, Arm],
    allowed: float,
    settings: Settings,
    cache: Path | None,
    progress: Callable[[str], None] = lambda words: None,
) -> list[Outcome]:
    """Compare every arm with its reference, then time those that agree in turn.

    Parameters
    ----------
    arms : sequence of Arm
        The first one is ours.
    references : dict of Arm
        By name; their results are the truth.
    allowed : float
        Largest relative error of an arm that is timed, see :func:`tolerance`.
    settings : Settings
    cache : Path or None
        Folder for the compilers' caches. Empty, ``first_call_seconds`` includes compiling. None
        stands for the usual places.
    progress : callable, optional
        Told what is going on.

    Returns
    -------
    list of Outcome
        One for each arm, whatever became of it.
    """
    outcomes = [Outcome(arm, arm.skip or TIMED, arm.detail, tolerance=allowed) for arm in arms]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress("reference")
        try:
            save_references(references, folder, cache, settings)
        except ArmError as error:
            return [
                Outcome(arm, arm.skip or FAILED, arm.detail or f"the reference {error}")
                for arm in arms
            ]
        running: list[tuple[Outcome, Worker, float]] = []
        for outcome in outcomes:
            if outcome.status != TIMED:
                continue
            progress(f"{outcome.arm.name}: first call")
            try:
                worker = Worker(outcome.arm, cache, settings.timeout_seconds)
                stack.callback(worker.close)
                running.append((outcome, worker, _prepare(outcome, worker, folder)))
            except ArmError as error:
                outcome.status, outcome.detail = error.status, error.detail
        _interleave(running, settings, progress)
    return outcomes


def _interleave(
    running: list[tuple[Outcome, Worker, float]],
    settings: Settings,
    progress: Callable[[str], None],
) -> None:
    """Time a block of every arm in each round, beginning with another arm each time."""
    round_seconds = 0.0
    for outcome, _, seconds in running:
        outcome.n_calls = int(np.clip(settings.block_seconds / seconds, 1, MOST_CALLS))
        round_seconds += (outcome.n_calls + 1) * seconds
    affordable = int(settings.budget_seconds / round_seconds) if running else 0
    rounds = min(settings.rounds, max(LEAST_ROUNDS, affordable))
    others = _other_programs([worker for _, worker, _ in running])
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        first = number % len(running) if running else 0
        for outcome, worker, _ in running[first:] + running[:first]:
            if outcome.status != TIMED:
                continue
            try:
                outcome.seconds.append(worker.ask("time", outcome.n_calls))
            except ArmError as error:
                outcome.status, outcome.detail, outcome.seconds = error.status, error.detail, []
    if others is not None:
        busy = others.busy_cores()
        for outcome, _, _ in running:
            outcome.busy_elsewhere = busy


def _other_programs(workers: Sequence[Worker]) -> OtherPrograms | None:
    """Return the measurement, None where the system does not tell."""
    return OtherPrograms(workers) if Path("/proc/stat").exists() else None


class OtherPrograms:
    """How many cores programs other than this one and its workers keep busy."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers
        self._started, self._before = time.monotonic(), self._cpu_seconds()

    def _cpu_seconds(self) -> float:
        fields = Path("/proc/stat").read_text().split(maxsplit=8)
        user, nice, system, _, _, interrupts, soft_interrupts = map(int, fields[1:8])
        ticks = user + nice + system + interrupts + soft_interrupts
        mine = time.process_time() + sum(worker.cpu_seconds() for worker in self._workers)
        return ticks / os.sysconf("SC_CLK_TCK") - mine

    def busy_cores(self) -> float:
        """Return the mean since the start."""
        elapsed = time.monotonic() - self._started
        return max(0.0, (self._cpu_seconds() - self._before) / elapsed)


def ratios(seconds: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """Return median, low and high percentile of the ratios per round.

    Examples
    --------
    >>> ratios([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])[0]
    2.0
    """
    ratio_r = np.divide(seconds, ours)
    low, high = np.percentile(ratio_r, [LOW, HIGH])
    return float(np.median(ratio_r)), float(low), float(high)


def outcome_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return the fields of every arm's row, ours being the first."""
    ours = outcomes[0]
    rows = []
    for outcome in outcomes:
        both = outcome.seconds and ours.seconds
        ratio, low, high = ratios(outcome.seconds, ours.seconds) if both else (None, None, None)
        first = outcome.first_call_seconds
        rows.append(
            {
                "arm": outcome.arm.name,
                "backend": outcome.arm.backend,
                "ours": outcome is ours,
                "status": outcome.status,
                "detail": outcome.detail,
                "median_ms": 1e3 * float(np.median(outcome.seconds)) if outcome.seconds else None,
                "ratio_to_us": ratio,
                "ratio_to_us_low": low,
                "ratio_to_us_high": high,
                "first_call_ms": None if first is None else 1e3 * first,
                "peak_extra_bytes": outcome.peak_extra_bytes,
                "relative_error": outcome.error,
                "tolerance": outcome.tolerance,
                "rounds": len(outcome.seconds),
                "busy_elsewhere": outcome.busy_elsewhere,
                "calls_per_round": outcome.n_calls,
            }
        )
    return rows
