"""How work on a GPU is timed and weighed: in CuPy, in PyTorch and in JAX by the same rules.

A block of calls begins on an idle device and none of them is waited for. CuPy and PyTorch mark the
stream by events after every call, and the median between two marks counts; JAX has no events, and
its block is timed by the clock until the last result is there. That is the time a loop of calls
takes, launches included. ``queued_seconds`` is the device's time alone: the calls are launched
while the device is kept busy with something else, so that no launch is waited for.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from importlib import import_module
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from benchmarks.worker import Arrays, Work

CPU, CUDA = "cpu", "cuda"
DEVICES = (CPU, CUDA)
N_QUEUED = 7  # calls: few enough launches for the queue of a stream
LONGEST_QUEUED = 0.01  # seconds; for what takes longer, launches count for nothing
COMPARED = 2**20
"""entries of a large result that are compared"""
MODULE = "benchmarks.devices"

SPIN = """
extern "C" __global__ void spin(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""
CYCLES_PER_MS = 1.7e6


class Clock(Protocol):
    """How a library's work on a GPU is timed and weighed."""

    def wait(self, result: Any) -> None:
        """Return once a call's result is there."""

    def seconds(self, call: Callable[[], Any], n_calls: int) -> float:
        """Return the time of a call in a block of calls, after one that is not counted."""

    def queued_seconds(self, call: Callable[[], Any], seconds: float) -> float | None:
        """Return the device's time of a call that takes so long; None where it cannot be told."""

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Return how much memory a warm call adds at its peak, its results included."""

    def used_bytes(self) -> int | None:
        """Return how much memory is in use."""

    def give_back(self) -> None:
        """Return unused memory to the device, for other processes."""


class EventClock(ABC):
    """What CuPy and PyTorch have in common."""

    @abstractmethod
    def mark(self) -> Any:
        """Return an event that has been recorded."""

    @abstractmethod
    def milliseconds(self, first: Any, second: Any) -> float:
        """Return the time between two events."""

    @abstractmethod
    def hold(self, milliseconds: float) -> None:
        """Keep the device busy for about so long."""

    @abstractmethod
    def wait(self, result: Any = None) -> None:
        """Return once the device has done everything."""

    def _between(self, call: Callable[[], Any], n_calls: int) -> list[float]:
        """Return the seconds between the ends of the calls."""
        marks = [self.mark()]
        for _ in range(n_calls):
            call()
            marks.append(self.mark())
        self.wait()
        return [1e-3 * self.milliseconds(first, second) for first, second in pairwise(marks)]

    def seconds(self, call: Callable[[], Any], n_calls: int) -> float:
        """Return the median time of a call, after one that is not counted."""
        call()
        self.wait()
        return float(np.median(self._between(call, n_calls)))

    def queued_seconds(self, call: Callable[[], Any], seconds: float) -> float | None:
        """Return the median device time of a call; the first is still early and left out."""
        if seconds > LONGEST_QUEUED:
            return None
        call()
        self.wait()
        self.hold(2 + 2e3 * N_QUEUED * seconds)
        return float(np.median(self._between(call, N_QUEUED)[1:]))


class CupyClock(EventClock):
    """CuPy's events, on the stream that its kernels run on."""

    def __init__(self) -> None:
        self.cp: Any = import_module("cupy")
        self.spin = self.cp.RawKernel(SPIN, "spin")
        self.hold(0)  # compile it

    def mark(self) -> Any:
        """Return an event that has been recorded."""
        event = self.cp.cuda.Event()
        event.record()
        return event

    def milliseconds(self, first: Any, second: Any) -> float:
        """Return the time between two events."""
        return self.cp.cuda.get_elapsed_time(first, second)

    def hold(self, milliseconds: float) -> None:
        """Keep the device busy for about so long."""
        self.spin((1,), (1,), (int(milliseconds * CYCLES_PER_MS),))

    def wait(self, result: Any = None) -> None:
        """Return once the device has done everything."""
        self.cp.cuda.Device().synchronize()

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Return what a pool of the call's own had to take from the device."""
        call()
        self.give_back()
        pool = self.cp.cuda.MemoryPool()
        with self.cp.cuda.using_allocator(pool.malloc):
            result = call()
            self.wait()
            taken = pool.total_bytes()
            del result
        return taken

    def used_bytes(self) -> int | None:
        """Return how much memory is in use."""
        return self.cp.get_default_memory_pool().used_bytes()

    def give_back(self) -> None:
        """Return unused memory to the device."""
        gc.collect()
        self.wait()
        self.cp.get_default_memory_pool().free_all_blocks()


class TorchClock(EventClock):
    """PyTorch's events, on the current stream."""

    def __init__(self) -> None:
        self.cuda: Any = import_module("torch").cuda

    def mark(self) -> Any:
        """Return an event that has been recorded."""
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, first: Any, second: Any) -> float:
        """Return the time between two events."""
        return first.elapsed_time(second)

    def hold(self, milliseconds: float) -> None:
        """Keep the device busy for about so long."""
        self.cuda._sleep(int(milliseconds * CYCLES_PER_MS))

    def wait(self, result: Any = None) -> None:
        """Return once the device has done everything."""
        self.cuda.synchronize()

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Return by how much the allocator's high-water mark rises."""
        call()
        self.give_back()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        result = call()
        self.wait()
        del result
        return self.cuda.max_memory_allocated() - before

    def used_bytes(self) -> int | None:
        """Return how much memory is in use."""
        return self.cuda.memory_allocated()

    def give_back(self) -> None:
        """Return unused memory to the device."""
        gc.collect()
        self.wait()
        self.cuda.empty_cache()


class JaxClock:
    """The clock on the wall: JAX works on streams of its own and has no events."""

    def __init__(self) -> None:
        self.jax: Any = import_module("jax")

    def wait(self, result: Any) -> None:
        """Return once a call's result is there."""
        self.jax.block_until_ready(result)

    def seconds(self, call: Callable[[], Any], n_calls: int) -> float:
        """Return the mean time of a call, after one that is not counted."""
        self.wait(call())
        started = time.perf_counter()
        for _ in range(n_calls):
            result = call()
        self.wait(result)
        return (time.perf_counter() - started) / n_calls

    def queued_seconds(self, call: Callable[[], Any], seconds: float) -> float | None:
        """Return None: nothing that is launched here can be made to wait for something else."""
        return None

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Return None: its high-water mark cannot be set back."""
        return None

    def used_bytes(self) -> int | None:
        """Return how much memory is in use."""
        return self.jax.devices()[0].memory_stats()["bytes_in_use"]

    def give_back(self) -> None:
        """Drop what nothing refers to; the allocator itself gives nothing back."""
        gc.collect()


CLOCKS: dict[str, Callable[[], Clock]] = {
    "cupy": CupyClock,
    "torch": TorchClock,
    "jax": JaxClock,
}


@functools.cache
def _clock(library: str) -> Clock:
    return CLOCKS[library]()


def clock_of(library: str, device: str) -> Clock | None:
    """Return a library's clock, None on the CPU: there the wall's clock does for all."""
    return _clock(library) if device == CUDA else None


# --- libraries, set up alike ----------------------------------------------------------------------


def torch_on(device: str, tf32: bool = False) -> Any:
    """Return PyTorch with float32 products in float32, unless its defaults are asked for.

    By default cuDNN's convolutions are in TF32, 10 of float32's 23 bits.
    """
    torch: Any = import_module("torch")
    if device == CUDA and not tf32:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return torch


def jax_on(device: str, dtype: str = "float32") -> Any:
    """Return JAX with float32 products in float32."""
    jax: Any = import_module("jax")
    jax.config.update("jax_enable_x64", dtype == "float64")
    if device == CUDA:
        jax.config.update("jax_default_matmul_precision", "highest")
        if jax.default_backend() != "gpu":
            raise RuntimeError(f"JAX has no GPU here, only {jax.default_backend()}")
    return jax


class Put:
    """Moves arrays to where a library wants them, each once however often it is asked for."""

    def __init__(self, move: Callable[[np.ndarray], Any]) -> None:
        self._move = move
        self._moved: dict[int, tuple[np.ndarray, Any]] = {}

    def __call__(self, array: np.ndarray) -> Any:
        """Return the array's counterpart."""
        _, there = self._moved.setdefault(id(array), (array, None))
        if there is None:
            there = self._move(array)
            self._moved[id(array)] = array, there
        return there


def put_ours(device: str) -> Put:
    """Return the way to where our kernels work: CuPy arrays on a GPU, NumPy arrays else."""
    return Put(import_module("cupy").asarray if device == CUDA else lambda array: array)


def on_cpu(value: Any) -> np.ndarray:
    """Return a result of any library as a NumPy array."""
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()
    return value.get() if hasattr(value, "get") else np.asarray(value)


def compared(value: Any) -> Any:
    """Return the entries of a result that are compared: of a large one about a million, spread out.

    Examples
    --------
    >>> compared(np.arange(6)).shape
    (6,)
    >>> big = np.zeros((3000, 1000))
    >>> compared(big).shape  # every third; the columns are all met
    (1000000,)
    """
    size = math.prod(value.shape)
    if size <= COMPARED:
        return value
    step = -(-size // COMPARED)
    while math.gcd(step, value.shape[-1]) > 1:
        step += 1
    return value.reshape(-1)[::step]


def results_of(values: Iterable[Any], device: str) -> Arrays:
    """Return what is compared of a call's results; on a GPU the large ones in part."""
    return tuple(on_cpu(compared(value) if device == CUDA else value) for value in values)


# --- what the device can do -----------------------------------------------------------------------


def build_copy(n_bytes: int) -> Work:
    """Return a copy within the device's memory."""
    cp: Any = import_module("cupy")
    source = cp.ones(n_bytes // 4, dtype=np.float32)
    target = cp.empty_like(source)
    return Work(
        lambda: cp.copyto(target, source), lambda: (on_cpu(target),), clock=clock_of("cupy", CUDA)
    )


def build_gemm(size: int, dtype: str) -> Work:
    """Return a square matrix product of cuBLAS with its result in place."""
    cp: Any = import_module("cupy")
    rng = np.random.default_rng(0)
    a, b = (cp.asarray(rng.random((size, size)).astype(dtype)) for _ in range(2))
    out = cp.empty_like(a)
    return Work(
        lambda: cp.matmul(a, b, out=out), lambda: (on_cpu(out),), clock=clock_of("cupy", CUDA)
    )


@functools.cache
def device_facts() -> dict[str, Any]:
    """Return the GPU's name, its memory in bytes, and the versions of driver and CuPy.

    Raises
    ------
    Exception
        Of a class of its own for no CuPy, no driver and no device.
    """
    cp: Any = import_module("cupy")
    properties = cp.cuda.runtime.getDeviceProperties(0)
    return {
        "device": properties["name"].decode(),
        "memory": int(properties["totalGlobalMem"]),
        "versions": f"cupy {cp.__version__}, cuda driver {cp.cuda.runtime.driverGetVersion()}",
    }
