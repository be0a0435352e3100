"""What `scaling` times beside the kernels: the layer that everyone ships, and training steps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

import kernels
import nalayer
from benchmarks import devices, kernel_cases, peers, worker
from benchmarks.devices import CPU, CUDA
from benchmarks.kernel_cases import (
    Case,
    backend_of_model,
    dense_bytes,
    device_of,
    reference_on_gpu,
    too_large,
)
from benchmarks.timing import Arm
from benchmarks.worker import Arrays, Work
from nalayer.buffers import Buffers

MODULE = "benchmarks.scaling_arms"
NAIVE, DENSE, SOFTMAX = "naive dense", "nalayer dense", "softmax alone"
N_IN = N_HIDDEN = 64
"""of the network under the training steps, ``mlp(64, (64,), K)``"""


def sparse_name(n_kept: int) -> str:
    """Return the name of our sparse arm."""
    return f"nalayer sparse, l = {n_kept}"


# --- the naive layer: every sample's product with the whole noise matrix -----------------------


def _softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _softmax_backward(p: np.ndarray, d_p: np.ndarray) -> np.ndarray:
    return p * (d_p - (p * d_p).sum(axis=-1, keepdims=True))


def naive_s_nll(a: np.ndarray, b: np.ndarray, z: np.ndarray) -> Arrays:
    """Return loss and gradients of softmax(a) @ softmax(b), all K outputs of it (Eqs. 10-12).

    What published ports do: three products of n x K x K where only column z_t is needed.
    """
    q, theta, rows = _softmax(a), _softmax(b), np.arange(len(z))
    m = q @ theta
    d_m = np.zeros_like(m)
    d_m[rows, z] = -1 / (len(z) * m[rows, z])
    d_a, d_b = _softmax_backward(q, d_m @ theta.T), _softmax_backward(theta, q.T @ d_m)
    return -np.log(m[rows, z]).mean(), d_a, d_b


def naive_c_nll(
    a: np.ndarray, h: np.ndarray, u: np.ndarray, b: np.ndarray, z: np.ndarray
) -> Arrays:
    """Return loss and gradients of a noise matrix for each sample, n x K x K held (Eqs. 8-9)."""
    (n, d), k, rows = h.shape, len(b), np.arange(len(z))
    flat_u = u.reshape(k * k, d)
    q, theta = _softmax(a), _softmax((h @ flat_u.T).reshape(n, k, k) + b)
    m = (q[:, None, :] @ theta)[:, 0]
    d_m = np.zeros_like(m)
    d_m[rows, z] = -1 / (n * m[rows, z])
    d_a = _softmax_backward(q, (theta @ d_m[:, :, None])[:, :, 0])
    d_scores = _softmax_backward(theta, q[:, :, None] * d_m[:, None, :])
    flat = d_scores.reshape(n, k * k)
    nll = -np.log(m[rows, z]).mean()
    return nll, d_a, flat @ flat_u, (flat.T @ h).reshape(u.shape), d_scores.sum(axis=0)


def build_naive(case: dict[str, Any]) -> Work:
    """Return the naive layer in NumPy, its products by BLAS."""
    wanted = Case(**case)
    arrays = kernel_cases.inputs(wanted)
    function: Callable[..., Arrays] = naive_c_nll if wanted.d else naive_s_nll
    floats = kernel_cases.differentiated(arrays)

    def call() -> Arrays:
        return function(*floats, arrays["noisy_labels"])

    return Work(call, call, sum(array.nbytes for array in floats))


def naive_bytes(case: Case) -> float:
    """Return about what the naive layer holds: matrices of K x K, for each sample in a c-model."""
    tensors = case.n * case.k**2 if case.d else case.k**2
    return 5 * case.item_bytes * tensors + dense_bytes(case) / 2


# --- a whole training step ---------------------------------------------------------------------


def step_model(case: Case, backend: str | None) -> tuple[Any, np.ndarray]:
    """Return the model that a step trains, and its parameters: plain, dense s or sparse s."""
    arrays = kernel_cases.inputs(replace(case, n=1))
    put = devices.put_ours(device_of(backend))
    backend = backend_of_model(backend)
    network = nalayer.mlp(N_IN, (N_HIDDEN,), case.k, backend=backend)
    weights = network.initial_weights(np.random.default_rng(case.seed), np.dtype(case.dtype))
    if case.kernel == "softmax_nll":
        return nalayer.PlainModel(network, backend), weights
    links = kernels.link_index(put(arrays["support"])) if case.n_kept else None
    model = nalayer.SModel(network, backend=backend, links=links)
    return model, model.pack(weights, arrays["channel_logits"])


def step_data(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch: features and labels."""
    rng = np.random.default_rng([case.seed, case.n, case.k])
    x = rng.standard_normal((case.n, N_IN), dtype=np.float32).astype(case.dtype)
    return x, rng.integers(case.k, size=case.n)


def build_step(case: dict[str, Any], backend: str | None) -> Work:
    """Return a training step of Adam; compared is its gradient."""
    wanted, device = Case(**case), device_of(backend)
    put = devices.put_ours(device)
    model, start = step_model(wanted, backend)
    x, labels = (put(array) for array in step_data(wanted))
    parameters = put(start)
    model.check(parameters, x, labels)
    optimiser, buffers = nalayer.Adam(), Buffers()
    moving = parameters.copy()
    state = optimiser.initial_state(moving)

    def call() -> None:
        _, gradient = model.loss_and_gradient(moving, x, labels, buffers=buffers)
        optimiser.update(moving, gradient, state)

    def results() -> Arrays:
        return devices.results_of(model.loss_and_gradient(parameters, x, labels), device)

    return Work(call, results, clock=devices.clock_of("cupy", device))


def build_step_reference(case: dict[str, Any], device: str = CPU) -> Work:
    """Return the gradient in float64 from the same numbers: NumPy's, or CuPy's of a large one."""
    wanted = Case(**case)
    on_gpu = reference_on_gpu(wanted.n * wanted.k, device)
    put = devices.put_ours(CUDA if on_gpu else CPU)
    model, parameters = step_model(wanted, "cupy" if on_gpu else "numpy")
    x, labels = step_data(wanted)
    exact = [put(array.astype(np.float64)) for array in (parameters, x)]

    def call() -> Arrays:
        return devices.results_of(model.loss_and_gradient(*exact, put(labels)), device)

    return Work(call, call, clock=devices.clock_of("cupy", CUDA) if on_gpu else None)


# --- memory that the process keeps -------------------------------------------------------------

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>
NEVER = -1


def with_kept_memory(arms: list[Arm]) -> list[Arm]:
    """Return the same arms in processes that keep the memory which they have once been given.

    An array of more than 32 MiB is else new memory of the system's at each call, which clears it
    first, a page after the other: at a million classes that takes as long as the work, and on a
    busy system many times as long. The same for all arms: NumPy and PyTorch ask the C library.
    """
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        detail = "needs mallopt of the C library"
        return [
            replace(arm, skip=arm.skip or "missing", detail=arm.detail or detail) for arm in arms
        ]
    given = f"{MODULE}:build_with_kept_memory"
    return [
        replace(arm, build=given, arguments={"build": arm.build, "arguments": arm.arguments})
        for arm in arms
    ]


def build_with_kept_memory(build: str, arguments: dict[str, Any]) -> Work:
    """Return an arm's work; from here on this process gives no memory back."""
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, NEVER)):
        raise OSError("mallopt refused to keep memory")
    return worker.build(build, arguments)


# --- who is timed ------------------------------------------------------------------------------


def kernel_arms(case: Case, kept: tuple[int, ...], backend: str, with_peers: bool) -> list[Arm]:
    """Return the arms of one size: ours sparse, ours dense, the naive layer, softmax, peers.

    ``case`` is the dense problem; the sparse ones have its sizes and ``n_kept`` links.
    """
    sparse = [
        replace(case, kernel=f"sparse_{case.kernel}", n_kept=min(n_kept, case.k))
        for n_kept in kept
        if n_kept <= case.k
    ]
    softmax = replace(case, kernel="softmax_nll", d=0)
    arms = [
        *(_ours(sparse_name(one.n_kept), one, backend) for one in sparse),
        _ours(DENSE, case, backend, dense_bytes(case)),
        _ours(SOFTMAX, softmax, backend),
    ]
    device = device_of(backend)
    if device == CPU:
        arms.append(_arm(NAIVE, f"{MODULE}:build_naive", case, "numpy", naive_bytes(case)))
    if with_peers:
        form = "flat" if case.d else "column"
        forms = ((case, "naive"), (case, form), (sparse[-1], "column"))
        arms += [_peer(one, form, device) for one, form in forms]
    return arms


def _ours(name: str, case: Case, backend: str, needed: float = 0.0) -> Arm:
    build = f"{kernel_cases.MODULE}:build_ours"
    return _arm(name, build, case, backend, needed, backend=backend)


def _peer(case: Case, form: str, device: str) -> Arm:
    name = f"torch sparse, l = {case.n_kept}" if case.n_kept else f"torch {form}"
    if not peers.is_installed("torch"):
        return Arm(name, skip="missing", detail="torch is not installed", backend="torch")
    needed = peers.form_bytes(case, form)
    if form == "naive":
        needed = max(needed, naive_bytes(case))
    given: dict[str, Any] = {"form": form, "compiled": False, "device": device}
    return _arm(name, f"{peers.MODULE}:build_torch", case, "torch", needed, **given)


def _arm(
    name: str, build: str, case: Case, library: str, needed: float = 0.0, **arguments: Any
) -> Arm:
    device = CUDA if library == "cupy" else arguments.get("device", CPU)
    why = too_large(needed, device)
    return Arm(
        name,
        build,
        {"case": asdict(case)} | arguments,
        reference_name(case),
        skip="not run" if why else "",
        detail=why,
        backend=library,
    )


def step_arms(case: Case, n_kept: int, backend: str) -> list[Arm]:
    """Return the training steps of one size: sparse, dense and plain."""
    sparse = replace(case, kernel="sparse_s_model", n_kept=min(n_kept, case.k))
    plain = replace(case, kernel="softmax_nll")
    needed = 2 * dense_bytes(case)  # parameters, gradient, and Adam's two moments, in float64 too
    return [
        _arm(name, f"{MODULE}:build_step", one, backend, size, backend=backend)
        for name, one, size in (
            (sparse_name(sparse.n_kept), sparse, 0.0),
            (DENSE, case, needed),
            (SOFTMAX, plain, 0.0),
        )
    ]


def reference_name(case: Case) -> str:
    """Return the name of the reference that an arm of this case is compared with."""
    return f"{case.kernel}-{case.n_kept}"


def references(arms: list[Arm], device: str = CPU) -> dict[str, Arm]:
    """Return what the arms that run are compared with: float64 NumPy on the same numbers."""
    found = {}
    for arm in arms:
        if arm.skip:
            continue
        step = arm.build == f"{MODULE}:build_step"
        build = f"{arm.build}_reference" if step else f"{kernel_cases.MODULE}:build_reference"
        given = {"case": arm.arguments["case"], "device": device}
        library = "cupy" if device == CUDA else "numpy"
        found[arm.reference] = Arm("reference", build, given, backend=library)
    return found
