"""The one timing harness: results compared first, then arms timed in turn, ratios per round.

Every arm lives in a process of its own with a fresh environment (:mod:`benchmarks.worker`), and
all but the one being timed are stopped by a signal, so that no thread pool spins beside another.
In each round every arm times a block of calls, in an order that rotates; a machine that slows
down slows all arms of a round, and the ratios hold.

On a GPU the arms of one library share a process that goes on from case to case (:class:`Pool`),
for it takes seconds to start; nothing is stopped, for who waits for its turn has nothing to do.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import devices
from benchmarks.records import ROOT, Row

LOW, HIGH = 10, 90  # percentiles of the ratios per round
LEAST_ROUNDS = 3
MOST_CALLS = 1000  # in a block
MORE_SECONDS = 10.0  # after the deadline, for what has been begun
# What decides about threads is left to each library, as in a fresh shell.
THREAD_SETTINGS = re.compile(r"^(OMP|GOMP|KMP|MKL|NUMBA|TORCH|XLA)_|_NUM_THREADS$")
TIMED, WRONG, DIED, FAILED, NO_ANSWER = "timed", "wrong", "died", "failed", "no answer"
NOT_RUN, NO_TIME = "not run", "no time was left"


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
    slack: float = 1.0
    """how many times the error of the others it may have"""
    process: str = ""
    """which process it is in where arms share them (:class:`Pool`); empty for its backend's"""


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
    device: str = devices.CPU
    deadline: float = math.inf
    """on :func:`time.monotonic`'s clock; nothing is begun after it"""


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
    used_bytes: int | None = None
    """on a GPU: what the arm's library then has in use, for all its arms of the case so far"""
    device_seconds: float | None = None
    """per call, the device's time alone; on a GPU only"""
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


def fresh_environment(cache: Path | None, device: str = devices.CPU) -> dict[str, str]:
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
    # JAX would take three quarters of a GPU's memory at once, and the others would have none.
    jax = {"JAX_PLATFORMS": device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return kept | caches | jax


class Process:
    """A process that builds the works of arms and answers requests about them.

    On the CPU it is stopped while it has none.
    """

    def __init__(self, cache: Path | None, settings: Settings) -> None:
        self._settings, self._stops = settings, settings.device == devices.CPU
        self._cpu_seconds = 0.0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(theirs.fileno())],
            cwd=ROOT,
            env=fresh_environment(cache, settings.device),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            start_new_session=True,
        )
        theirs.close()

    def request(self, request: str, arm: str, *arguments: Any) -> Any:
        """Wake the process, return its answer and stop it again; raise :class:`ArmError`."""
        self._process.send_signal(signal.SIGCONT)
        try:
            self._connection.send((request, arm, arguments))
            left = max(MORE_SECONDS, self._settings.deadline + MORE_SECONDS - time.monotonic())
            timeout = min(self._settings.timeout_seconds, left)
            if not self._connection.poll(timeout):
                detail = f"to '{request}' within {timeout:.3g} s"
                self._process.kill()
                raise ArmError(NO_ANSWER, detail)
            outcome, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise ArmError(DIED, f"at '{request}', {self._last_words()}") from None
        if self._stops:
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


class Worker(Process):
    """A process of one arm's own."""

    def __init__(self, arm: Arm, cache: Path | None, settings: Settings) -> None:
        super().__init__(cache, settings)
        try:
            self.ask("build", arm.build, arm.arguments)
        except BaseException:
            self.close()
            raise

    def ask(self, request: str, *arguments: Any) -> Any:
        """Return the answer to a request about the arm; raise :class:`ArmError`."""
        return self.request(request, "", *arguments)


class Seat:
    """An arm's place in a process that it shares, with the interface of :class:`Worker`."""

    def __init__(self, pool: Pool, process: str, arm: Arm, name: str) -> None:
        self._pool, self._process, self._name = pool, process, name
        self.ask("build", arm.build, arm.arguments)

    def ask(self, request: str, *arguments: Any) -> Any:
        """Return the answer to a request about the arm; raise :class:`ArmError`."""
        try:
            return self._pool.process(self._process).request(request, self._name, *arguments)
        except ArmError:
            # What is left of a library after an error, on the device too, is anyone's guess.
            self._pool.spoiled.add(self._process)
            raise

    def close(self) -> None:
        """Let go of the arm's work, where the process is to go on."""
        if self._process not in self._pool.spoiled:
            with suppress(ArmError):
                self.ask("drop")


class Pool:
    """Where arms live: in a process each, or shared, one for each library.

    A shared process starts when first needed, and anew after an arm has failed in it.
    """

    def __init__(self, cache: Path | None, settings: Settings, shared: bool = False) -> None:
        self.cache, self.settings, self.shared = cache, settings, shared
        self.spoiled: set[str] = set()
        self._processes: dict[str, Process] = {}
        self._n_seats = 0

    def process(self, name: str) -> Process:
        """Return the shared process of that name."""
        if name not in self._processes:
            self._processes[name] = Process(self.cache, self.settings)
        return self._processes[name]

    def worker(self, arm: Arm) -> Worker | Seat:
        """Return where an arm's work is built; raise :class:`ArmError`."""
        if not self.shared:
            return Worker(arm, self.cache, self.settings)
        self._n_seats += 1
        return Seat(self, arm.process or arm.backend, arm, str(self._n_seats))

    def renew(self) -> None:
        """End the shared processes in which an arm failed; nobody may be using them."""
        for name in self.spoiled:
            self._processes.pop(name).close()
        self.spoiled.clear()

    def close(self) -> None:
        """End all shared processes."""
        for process in self._processes.values():
            process.close()
        self._processes.clear()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save_references(references: dict[str, Arm], folder: Path, pool: Pool) -> None:
    """Work out each reference and store it in ``folder / name``."""
    for name, arm in references.items():
        worker = pool.worker(arm)
        try:
            worker.ask("save", str(folder / name))
        finally:
            worker.close()


def _prepare(outcome: Outcome, worker: Worker | Seat, folder: Path) -> float:
    """Compare, then measure all that one arm alone decides; return the seconds of a call."""
    outcome.first_call_seconds = worker.ask("first call")
    outcome.error = worker.ask("error", str(folder / outcome.arm.reference))
    assert outcome.error is not None
    assert outcome.tolerance is not None
    if not outcome.error <= outcome.tolerance:
        detail = f"relative error {outcome.error:.1e}, allowed {outcome.tolerance:.1e}"
        raise ArmError(WRONG, detail)
    outcome.peak_extra_bytes = worker.ask("memory")
    seconds = worker.ask("time", 1)
    outcome.device_seconds = worker.ask("queued", seconds)
    outcome.used_bytes = worker.ask("rest")
    return seconds


def measure(
    arms: Sequence[Arm],
    references: dict[str, Arm],
    allowed: float,
    pool: Pool,
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
    pool : Pool
        Where the arms live, with the settings of the measurement and the folder for the compilers'
        caches. Empty, ``first_call_seconds`` includes compiling. None stands for the usual places.
    progress : callable, optional
        Told what is going on.

    Returns
    -------
    list of Outcome
        One for each arm, whatever became of it.
    """
    outcomes = [
        Outcome(arm, arm.skip or TIMED, arm.detail, tolerance=arm.slack * allowed) for arm in arms
    ]
    with ExitStack() as stack:
        stack.callback(pool.renew)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress("reference")
        try:
            _require_time(pool.settings)
            save_references(references, folder, pool)
        except ArmError as error:
            return [_without_reference(arm, error) for arm in arms]
        running: list[tuple[Outcome, Worker | Seat, float]] = []
        for outcome in outcomes:
            if outcome.status != TIMED:
                continue
            progress(f"{outcome.arm.name}: first call")
            try:
                _require_time(pool.settings)
                worker = pool.worker(outcome.arm)
                stack.callback(worker.close)
                running.append((outcome, worker, _prepare(outcome, worker, folder)))
            except ArmError as error:
                outcome.status, outcome.detail = error.status, error.detail
        _interleave(running, pool.settings, progress)
    return outcomes


def _require_time(settings: Settings) -> None:
    if time.monotonic() > settings.deadline:
        raise ArmError(NOT_RUN, NO_TIME)


def _without_reference(arm: Arm, error: ArmError) -> Outcome:
    if arm.skip:
        return Outcome(arm, arm.skip, arm.detail)
    if error.status == NOT_RUN:
        return Outcome(arm, error.status, error.detail)
    return Outcome(arm, FAILED, f"the reference {error}")


def _interleave(
    running: list[tuple[Outcome, Worker | Seat, float]],
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
    others = _other_programs([worker for _, worker, _ in running if isinstance(worker, Worker)])
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.monotonic() > settings.deadline:
            break
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
    """Return the measurement, None where the system does not tell, or no arm has its process."""
    return OtherPrograms(workers) if workers and Path("/proc/stat").exists() else None


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


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _quotient(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs and ours else None


def outcome_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return the fields of every arm's row, ours being the first."""
    ours = outcomes[0]
    rows = []
    for outcome in outcomes:
        both = outcome.seconds and ours.seconds
        ratio, low, high = ratios(outcome.seconds, ours.seconds) if both else (None, None, None)
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
                "device_ms": _milliseconds(outcome.device_seconds),
                "device_ratio_to_us": _quotient(outcome.device_seconds, ours.device_seconds),
                "first_call_ms": _milliseconds(outcome.first_call_seconds),
                "peak_extra_bytes": outcome.peak_extra_bytes,
                "used_bytes": outcome.used_bytes,
                "relative_error": outcome.error,
                "tolerance": outcome.tolerance,
                "rounds": len(outcome.seconds),
                "busy_elsewhere": outcome.busy_elsewhere,
                "calls_per_round": outcome.n_calls,
            }
        )
    return rows
