"""What `kernels` times: inputs, our own arms, the reference, and the work that a call takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

import numpy as np

import kernels
from benchmarks import devices
from benchmarks.devices import CPU, CUDA
from benchmarks.timing import Arm
from benchmarks.worker import Arrays, Work
from nalayer.memory import available_bytes

KERNELS = ("softmax_nll", "s_model", "sparse_s_model", "c_model", "sparse_c_model")
N_KEPT = 5  # links per class of the sparse models, the paper's choice
MODULE = "benchmarks.kernel_cases"
CHUNK = 2**22  # numbers drawn from one stream
N_SETS, FEW_SETS = 4, 2
"""of inputs on a GPU, taken in turn so that no cache serves one set alone; few of large ones"""
LARGE_SET_BYTES = 2**28
MOST_ON_THE_CPU = 3 * 10**7
"""exponentials of a reference in NumPy; what has more is worked out on the GPU, in float64"""


@dataclass(frozen=True)
class Case:
    """One kernel at one size; everything that a worker needs to make its inputs."""

    kernel: str
    n: int
    k: int
    d: int = 0
    """features of the last hidden layer; 0 for models that do not read it"""
    n_kept: int = 0
    """links per class; 0 for dense models"""
    dtype: str = "float32"
    seed: int = 0

    @property
    def size(self) -> str:
        """The size as the command line writes it: NxK, NxDxK."""
        return "x".join(str(part) for part in (self.n, self.d, self.k) if part)

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return np.dtype(self.dtype).itemsize

    def fields(self) -> dict[str, Any]:
        """Return the case as fields of a row; sizes that do not apply are null."""
        sizes = {name: getattr(self, name) or None for name in ("d", "n_kept")}
        return asdict(self) | sizes | {"size": self.size}


def case(kernel: str, size: str, dtype: str = "float32", seed: int = 0) -> Case:
    """Return the case that a size on the command line stands for.

    Raises
    ------
    ValueError
        For a size with too many or too few numbers, or with one below its least value.

    Examples
    --------
    >>> case("c_model", "256x300x10").d
    300
    """
    form = "NxDxK" if kernel.endswith("c_model") else "NxK"
    try:
        numbers = [int(part) for part in size.split("x")]
    except ValueError:
        numbers = []
    if len(numbers) != form.count("x") + 1 or min(numbers) < 1 or numbers[-1] < 2:
        raise ValueError(f"size of {kernel} must be {form} with K of at least 2; found {size!r}")
    n, d, k = numbers if len(numbers) == 3 else (numbers[0], 0, numbers[1])
    n_kept = min(N_KEPT, k) if kernel.startswith("sparse") else 0
    return Case(kernel, n, k, d, n_kept, dtype, seed)


def random_support(k: int, n_kept: int, rng: np.random.Generator) -> np.ndarray:
    """Return (K, l) links: the diagonal, which covers every label, and different others."""
    steps = np.zeros((k, n_kept), dtype=np.int64)
    todo = np.arange(k)
    while todo.size:
        steps[todo, 1:] = rng.integers(1, k, size=(todo.size, n_kept - 1))
        ordered = np.sort(steps[todo], axis=1)
        todo = todo[(np.diff(ordered, axis=1) == 0).any(axis=1)]
    return (np.arange(k)[:, None] + steps) % k


def normal_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return normal numbers; a large array is drawn by all cores, the same for any number."""
    out = np.empty(shape, dtype)
    parts = np.array_split(out.reshape(-1), max(1, -(-out.size // CHUNK)))

    def fill(stream: np.random.Generator, part: np.ndarray) -> None:
        stream.standard_normal(out=part, dtype=part.dtype.type)

    if len(parts) == 1:
        fill(rng, parts[0])
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, rng.spawn(len(parts)), parts))
    return out


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Return a kernel's arguments by name and in its order: the same in every process.

    Scores of the channel have a spread of about one around a diagonal that stands out.
    """
    rng = np.random.default_rng([case.seed, case.n, case.k, case.d, case.n_kept])
    dtype: Any = np.dtype(case.dtype)
    n, k, d = case.n, case.k, case.d

    def normal(*shape: int) -> np.ndarray:
        return normal_array(rng, shape, dtype)

    labels = rng.integers(k, size=n)
    arrays = {"logits": 2 * normal(n, k)}
    if case.kernel == "softmax_nll":
        return arrays | {"labels": labels}
    support = random_support(k, case.n_kept, rng) if case.n_kept else None
    width = case.n_kept or k
    if d:
        arrays["hidden"] = np.maximum(normal(n, d), 0)  # as after a ReLU
        arrays["channel_weights"] = normal(k, width, d)
        arrays["channel_weights"] *= dtype.type(1 / np.sqrt(d))
    arrays["channel_logits"] = normal(k, width)
    if support is None:
        arrays["channel_logits"][np.arange(k), np.arange(k)] += 3
        return arrays | {"noisy_labels": labels}
    arrays["channel_logits"][:, 0] += 3
    return arrays | {"support": support, "noisy_labels": labels}


def input_sets(case: Case, device: str) -> list[dict[str, np.ndarray]]:
    """Return inputs to be taken in turn: other samples, the same channel. On the CPU one set."""
    first = inputs(case)
    if device == CPU:
        return [first]
    n_sets = FEW_SETS if first["logits"].nbytes > LARGE_SET_BYTES else N_SETS
    one_class = replace(case, kernel="softmax_nll", d=0, n_kept=0)
    sets = [first]
    for number in range(1, n_sets):
        fresh = inputs(replace(one_class, seed=case.seed + number))
        samples = {"logits": fresh["logits"], labels_name(case.kernel): fresh["labels"]}
        if "hidden" in first:
            samples["hidden"] = np.roll(first["hidden"], number, axis=0)
        sets.append(first | samples)
    return sets


def labels_name(kernel: str) -> str:
    """Return what a kernel calls the labels."""
    return "labels" if kernel == "softmax_nll" else "noisy_labels"


def in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """Return a call that makes the next of these each time."""
    if len(calls) == 1:
        return calls[0]
    numbers = count()
    return lambda: calls[next(numbers) % len(calls)]()


def differentiated(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the arguments that a kernel has gradients for, in its order."""
    return [array for array in arrays.values() if array.dtype.kind == "f"]


def function_name(kernel: str) -> str:
    """Return the name of the public function."""
    return kernel if kernel == "softmax_nll" else f"{kernel}_nll"


def device_of(backend: str | None) -> str:
    """Return where a backend of ours works."""
    return CUDA if backend == "cupy" else CPU


def backend_of_model(backend: str | None) -> str | None:
    """Return what a model's layers are told: nothing for a GPU, there they follow the arrays."""
    return None if device_of(backend) == CUDA else backend


def _our_work(
    kernel: str, sets: list[dict[str, np.ndarray]], backend: str | None, device: str
) -> Work:
    """Return a call of our kernel as a training step makes it: data checked before, index built."""
    put = devices.put_ours(device)
    function = getattr(kernels, function_name(kernel))

    def call_on(arrays: dict[str, np.ndarray]) -> Callable[[], Arrays]:
        arguments = {name: put(array) for name, array in arrays.items()}
        if "support" in arguments:
            arguments["support"] = index
        return lambda: function(**arguments, backend=backend, check_values=False)

    index = kernels.link_index(put(sets[0]["support"])) if "support" in sets[0] else None
    calls = [call_on(arrays) for arrays in sets]
    result_bytes = sum(array.nbytes for array in differentiated(sets[0]))

    def results() -> Arrays:
        return devices.results_of(calls[0](), device)

    return Work(in_turn(calls), results, result_bytes, devices.clock_of("cupy", device))


def build_ours(case: dict[str, Any], backend: str | None) -> Work:
    """Return our kernel."""
    wanted, device = Case(**case), device_of(backend)
    return _our_work(wanted.kernel, input_sets(wanted, device), backend, device)


def in_float64(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the same numbers in float64."""
    return {
        name: array.astype(np.float64) if array.dtype.kind == "f" else array
        for name, array in arrays.items()
    }


def reference_on_gpu(n_exponentials: int, device: str) -> bool:
    """Return whether a reference with so many exponentials is worked out on the GPU."""
    return device == CUDA and n_exponentials > MOST_ON_THE_CPU


def _reference_of(kernel: str, case: Case, arrays: dict[str, np.ndarray], device: str) -> Work:
    """Return a kernel of ours in float64: plain NumPy, or CuPy where that takes too long."""
    per_sample = case.k**2 if kernel == "c_model" else case.k
    on_gpu = reference_on_gpu(case.n * per_sample, device)
    work = _our_work(
        kernel, [in_float64(arrays)], "cupy" if on_gpu else "numpy", CUDA if on_gpu else CPU
    )
    results = work.results
    if device == CUDA and not on_gpu:  # as the arms on the GPU are compared: large ones in part
        results = lambda: tuple(devices.compared(np.asarray(x)) for x in work.results())  # noqa: E731
    return Work(work.call, results, clock=work.clock)


def build_reference(case: dict[str, Any], device: str = CPU) -> Work:
    """Return our kernel in float64 on the same numbers: the truth of the comparison."""
    wanted = Case(**case)
    return _reference_of(wanted.kernel, wanted, inputs(wanted), device)


def _plain(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"logits": arrays["logits"], "labels": arrays["noisy_labels"]}


def build_plain_softmax(case: dict[str, Any], backend: str | None) -> Work:
    """Return ``softmax_nll`` on a noise layer's logits and labels: what the classifier costs."""
    device = device_of(backend)
    sets = [_plain(arrays) for arrays in input_sets(Case(**case), device)]
    return _our_work("softmax_nll", sets, backend, device)


def build_plain_reference(case: dict[str, Any], device: str = CPU) -> Work:
    """Return the reference of :func:`build_plain_softmax`."""
    wanted = Case(**case)
    return _reference_of("softmax_nll", wanted, _plain(inputs(wanted)), device)


def build_dense(case: dict[str, Any], backend: str | None) -> Work:
    """Return our dense kernel on a sparse problem: what is not linked has probability zero."""
    wanted = Case(**case)
    arrays = inputs(wanted)
    support, labels = arrays.pop("support"), arrays.pop("noisy_labels")
    rows = np.arange(wanted.k)[:, None]
    channel = np.full((wanted.k, wanted.k), -np.inf, dtype=wanted.dtype)
    channel[rows, support] = arrays["channel_logits"]
    dense = arrays | {"channel_logits": channel}
    if wanted.d:
        weights = np.zeros((wanted.k, wanted.k, wanted.d), dtype=wanted.dtype)
        weights[rows, support] = arrays["channel_weights"]
        dense["channel_weights"] = weights
    function = getattr(kernels, function_name(wanted.kernel.removeprefix("sparse_")))

    def call() -> Arrays:
        return function(**dense, noisy_labels=labels, backend=backend, check_values=False)

    def results() -> Arrays:
        found = call()._asdict()  # type: ignore[attr-defined]
        for name in ("d_channel_weights", "d_channel_logits"):
            if name in found:
                found[name] = found[name][rows, support]
        return tuple(found.values())

    return Work(call, results, sum(array.nbytes for array in dense.values()))


def too_large(needed_bytes: float, device: str = CPU) -> str:
    """Return why something is not run, or nothing where half of the free memory holds it."""
    available = devices.device_facts()["memory"] if device == CUDA else available_bytes()
    if available is None or needed_bytes <= available / 2:
        return ""
    return f"would need about {needed_bytes / 2**30:.0f} GiB"


def dense_bytes(case: Case) -> float:
    """Return about what a dense form of a problem holds: matrices of K x K (x d), and copies."""
    return 4 * case.item_bytes * case.k**2 * max(1, case.d)


def our_arms(case: Case, backend: str) -> list[Arm]:
    """Return ours first, then our plain NumPy, our dense form and the classifier's softmax."""
    given = asdict(case)

    def arm(name: str, function: str, backend: str, **details: Any) -> Arm:
        arguments = {"case": given, "backend": backend}
        return Arm(name, f"{MODULE}:{function}", arguments, backend=backend, **details)

    arms = [arm(f"nalayer {backend}", "build_ours", backend)]
    on_cpu = device_of(backend) == CPU
    if on_cpu and backend != "numpy":
        arms.append(arm("nalayer numpy", "build_ours", "numpy"))
    if on_cpu and case.n_kept:
        why = too_large(dense_bytes(case))
        skip = "not run" if why else ""
        arms.append(arm(DENSE, "build_dense", backend, skip=skip, detail=why))
    if case.kernel == "sparse_s_model":
        arms.append(arm(SOFTMAX, "build_plain_softmax", backend, reference="softmax_nll"))
    return arms


DENSE, SOFTMAX = "nalayer, dense", "nalayer, softmax_nll alone"


def references(case: Case, device: str = CPU) -> dict[str, Arm]:
    """Return what the arms of a case are compared with."""
    given = {"case": asdict(case), "device": device}

    def reference(build: str) -> Arm:
        library = "cupy" if device == CUDA else "numpy"
        return Arm("reference", f"{MODULE}:{build}", given, backend=library)

    found = {"reference": reference("build_reference")}
    if case.kernel == "sparse_s_model":
        found["softmax_nll"] = reference("build_plain_reference")
    return found


def bytes_moved(case: Case) -> int:
    """Return the traffic no implementation can avoid: inputs read once, results written once."""
    width = case.n_kept or case.k
    numbers = 2 * case.n * case.k  # logits and their gradient
    if case.kernel != "softmax_nll":
        numbers += 2 * case.k * width * (1 + case.d) + 2 * case.n * case.d
    index = 8 * (case.n + 2 * case.k * case.n_kept)
    return case.item_bytes * numbers + index


def flops(case: Case) -> int:
    """Return the additions, multiplications and exponentials of the formulas, each counted once.

    For a c-model the three products of (samples, links, d) are the whole of it: scores, and the
    gradients of U and h. A sparse one needs them for the classes linked to a sample's label.
    """
    n, k, d = case.n, case.k, case.d
    if d and not case.n_kept:
        return 6 * n * k * k * d
    if d:
        arrays = inputs(case)
        n_links_j = np.bincount(arrays["support"].ravel(), minlength=k)
        return 6 * int(n_links_j[arrays["noisy_labels"]].sum()) * case.n_kept * d
    per_sample = 4 if case.kernel == "softmax_nll" else 8  # shift, exp, sum, scale (twice for c)
    per_link = 0 if case.kernel == "softmax_nll" else 5
    return per_sample * n * k + per_link * k * (case.n_kept or k)
