"""Time the CUDA kernels on a GPU, beside PyTorch on the same device.

Every arm gets the same numbers, is compared in its loss with the others before it is timed, and
works on several sets of inputs in turn, so that no cache serves one set alone. ``median_ms`` is
the time of a call as a loop of calls sees it, launches included; ``device_ms`` the time when all
launches have been queued behind other work, so that only the device counts. ``stage`` rows split
our own device time by kernel, as the mean over some calls.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import kernels
from benchmarks import machine, records
from benchmarks.records import Row

N_CALLS = 60
N_INPUTS = 4
CALLS_QUEUED = 12  # few enough launches for the queue of a stream

S_SIZES = ((256, 10), (256, 100), (256, 1000), (4096, 1000), (1024, 10_000), (65_536, 1000))
SPARSE_SIZES = ((256, 1000, 5), (256, 10_000, 5), (256, 100_000, 5))
C_SIZES = ((256, 512, 100), (256, 512, 300))
LOSS_TOLERANCE = 1e-4  # of the losses of one case, which are float32 means

SPIN = """
extern "C" __global__ void spin(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


class Timer:
    """Times calls with CuPy's events on the default stream, which PyTorch works on too."""

    def __init__(self, cp: Any) -> None:
        self.cp = cp
        self.spin = cp.RawKernel(SPIN, "spin")

    def hold_device(self, milliseconds: float) -> None:
        """Keep the device busy, while launches queue up."""
        self.spin((1,), (1,), (int(milliseconds * 1.7e6),))

    def each(self, call: Callable[[int], Any], queued: bool) -> np.ndarray:
        """Return the milliseconds of each call."""
        cp, n = self.cp, CALLS_QUEUED if queued else N_CALLS
        cp.cuda.Device().synchronize()
        marks = [cp.cuda.Event() for _ in range(n + 1)]
        if queued:
            self.hold_device(20)
        marks[0].record()
        for c in range(n):
            call(c)
            marks[c + 1].record()
        cp.cuda.Device().synchronize()
        return np.array([cp.cuda.get_elapsed_time(a, b) for a, b in pairwise(marks)])


def s_inputs(rng: np.random.Generator, n: int, k: int) -> tuple[list, np.ndarray]:
    """Return logits and labels, several of each, and channel logits."""
    batches = [
        (rng.normal(size=(n, k)).astype(np.float32), rng.integers(k, size=n))
        for _ in range(N_INPUTS)
    ]
    channel = rng.normal(size=(k, k)).astype(np.float32)
    channel[np.arange(k), np.arange(k)] += 3
    return batches, channel


def torch_s(torch: Any, batches: list, channel: np.ndarray) -> dict[str, Callable[[int], Any]]:
    """Return PyTorch's s-model, as the ports ship it and as a gather."""
    nn = torch.nn.functional
    data = [(torch.tensor(a).cuda(), torch.tensor(z).cuda()) for a, z in batches]
    b = torch.tensor(channel).cuda().requires_grad_()

    def naive(c: int) -> Any:
        a, z = data[c % len(data)]
        a = a.detach().requires_grad_()
        m = (torch.softmax(a, 1) @ torch.softmax(b, 1)).gather(1, z[:, None])
        nll = -torch.log(m).mean()
        return nll, *torch.autograd.grad(nll, (a, b))

    def gathered(c: int) -> Any:
        a, z = data[c % len(data)]
        a = a.detach().requires_grad_()
        log_theta_z = nn.log_softmax(b, 1)[:, z].T
        nll = -torch.logsumexp(nn.log_softmax(a, 1) + log_theta_z, 1).mean()
        return nll, *torch.autograd.grad(nll, (a, b))

    return {"torch naive": naive, "torch gathered": gathered}


def torch_sparse_s(
    torch: Any, batches: list, channel: np.ndarray, index: kernels.LinkIndex
) -> dict[str, Callable[[int], Any]]:
    """Return PyTorch's sparse s-model: a gather over a padded list of each label's links."""
    nn = torch.nn.functional
    (k, n_kept), most = channel.shape, int(index.n_links_j.max())
    padded = np.full((k, most), -1)
    for j in range(k):
        links = index.links_by_label[index.start_j[j] : index.start_j[j + 1]]
        padded[j, : links.size] = links
    links_j = torch.tensor(padded).cuda()
    data = [(torch.tensor(a).cuda(), torch.tensor(z).cuda()) for a, z in batches]
    b = torch.tensor(channel).cuda().requires_grad_()

    def gathered(c: int) -> Any:
        a, z = data[c % len(data)]
        a = a.detach().requires_grad_()
        links = links_j[z]
        there = links.clamp(min=0)
        joint = (
            nn.log_softmax(a, 1).gather(1, there // n_kept) + nn.log_softmax(b, 1).flatten()[there]
        )
        nll = -torch.logsumexp(joint.masked_fill(links < 0, -torch.inf), 1).mean()
        return nll, *torch.autograd.grad(nll, (a, b))

    return {"torch gathered": gathered}


def torch_c(torch: Any, batches: list, wide: tuple) -> dict[str, Callable[[int], Any]]:
    """Return PyTorch's c-model, with all of theta_t and with the gathered column only."""
    nn = torch.nn.functional
    data = [tuple(torch.tensor(x).cuda() for x in batch) for batch in batches]
    u, b = (torch.tensor(x).cuda().requires_grad_() for x in wide)
    k = b.shape[0]

    def arm(gather: bool) -> Callable[[int], Any]:
        def call(c: int) -> Any:
            a, h, z = data[c % len(data)]
            a, h = a.detach().requires_grad_(), h.detach().requires_grad_()
            scores = (h @ u.reshape(k * k, -1).T).reshape(len(h), k, k) + b
            at_z = z[:, None, None].expand(-1, k, 1)
            if gather:
                log_theta_z = nn.log_softmax(scores, 2).gather(2, at_z)[:, :, 0]
                nll = -torch.logsumexp(nn.log_softmax(a, 1) + log_theta_z, 1).mean()
            else:
                theta = torch.softmax(scores, 2)
                m = torch.einsum("ti,tij->tj", torch.softmax(a, 1), theta).gather(1, z[:, None])
                nll = -torch.log(m).mean()
            return nll, *torch.autograd.grad(nll, (a, h, u, b))

        return call

    return {"torch naive": arm(False), "torch gathered": arm(True)}


def stages(timer: Timer, call: Callable[[int], Any]) -> dict[str, float]:
    """Return the mean device time of each of our kernels within one call, in milliseconds."""
    cp = timer.cp
    launching: Any = importlib.import_module("kernels.cupy_backend.launch")
    compiled = launching._kernel
    marks: list[tuple[str, Any, Any]] = []

    def marked(source: str, name: str, *rest: Any) -> Callable[..., None]:
        def launch(*how: Any) -> None:
            before, after = cp.cuda.Event(), cp.cuda.Event()
            before.record()
            compiled(source, name, *rest)(*how)
            after.record()
            marks.append((name, before, after))

        return launch

    launching._kernel = marked
    try:
        timer.hold_device(20)
        for c in range(CALLS_QUEUED):
            call(c)
        cp.cuda.Device().synchronize()
    finally:
        launching._kernel = compiled
    times: dict[str, list[float]] = {}
    for name, before, after in marks:
        times.setdefault(name, []).append(cp.cuda.get_elapsed_time(before, after))
    return {name: float(np.sum(found)) / CALLS_QUEUED for name, found in times.items()}


def rates(timer: Timer) -> dict[str, float]:
    """Return what the device can do: bytes copied and float32 products, each a second."""
    cp = timer.cp
    source = cp.ones(2**28, dtype=np.float32)
    target = cp.empty_like(source)
    copy = np.median(timer.each(lambda _: cp.copyto(target, source), queued=True))
    m = 8192
    rng = np.random.default_rng(0)
    a, b = (cp.asarray(rng.random((m, m), dtype=np.float32)) for _ in range(2))
    out = cp.empty_like(a)
    product = np.median(timer.each(lambda _: cp.matmul(a, b, out=out), queued=True))
    return {
        "copy_bytes_per_s": float(2 * source.nbytes / copy * 1e3),
        "float32_flop_per_s": float(2 * m**3 / product * 1e3),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.epilog = "Needs a GPU and CuPy; PyTorch is compared with if it is installed."
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")


def provenance(command: str, cp: Any) -> Row:
    """Return what every row says of where it comes from."""
    cores = machine.n_cores()
    libraries = (*records.LIBRARIES, *records.PEERS)
    base = records.provenance("gpu", command, "cupy", cores, cores, libraries)
    return base | {
        "device": cp.cuda.runtime.getDeviceProperties(0)["name"].decode(),
        "versions": f"{base['versions']}, cupy {cp.__version__}, "
        f"cuda driver {cp.cuda.runtime.driverGetVersion()}",
        "dtype": "float32",
    }


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Time every size; return 1 if one of our own arms fails or a loss differs."""
    try:
        kernels.get_backend("cupy")
        cp = importlib.import_module("cupy")
        cp.cuda.runtime.getDeviceCount()
        if options.json:
            records.require_writable(options.json)
    except OSError as error:
        parser.error(str(error))
    except Exception as error:  # no CuPy, no driver, no device: each its own class
        parser.error(f"no GPU to measure on: {error}")
    common = provenance(options.command, cp)
    rows: list[Row] = []

    def write(**row: Any) -> None:
        rows.append(common | row)
        if options.json:
            records.write_rows(records.unfinished(options.json), rows)
        shown = {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()}
        print(*(f"{key}={value}" for key, value in shown.items()), flush=True)

    measure(cp, write)
    if options.json:
        os.replace(records.unfinished(options.json), options.json)
    broken = [row for row in rows if "error" in row and row.get("arm", "nalayer") == "nalayer"]
    for row in broken:
        print(row["kernel"], row["error"], file=sys.stderr)
    return int(bool(broken))


def measure(cp: Any, write: Callable[..., None]) -> None:
    """Time every size and hand over the rows as they come."""
    timer = Timer(cp)
    torch: Any = importlib.import_module("torch") if find_spec("torch") else None
    if torch:
        torch.backends.cuda.matmul.allow_tf32 = False

    def compare(sizes: dict, kernel: str, arms: dict[str, Callable[[int], Any]]) -> None:
        losses, medians = {}, {}
        for arm, call in list(arms.items()):
            try:
                for c in range(N_INPUTS):
                    result = call(c)
                losses[arm] = float(result[0].item())
                del result
                calls = np.concatenate([timer.each(call, queued=False) for _ in range(2)])
                queued = timer.each(call, queued=True)[2:]
            except Exception as error:  # out of memory, most likely: the other arms go on
                write(
                    kernel=kernel, **sizes, arm=arm, error=f"{type(error).__name__}: {error}"[:200]
                )
                continue
            medians[arm] = float(np.median(calls)), float(np.median(queued))
            ours = medians.get("nalayer", (np.nan, np.nan))
            low, high = (float(q) for q in np.quantile(calls, (0.1, 0.9)))
            write(
                kernel=kernel,
                **sizes,
                arm=arm,
                loss=losses[arm],
                median_ms=medians[arm][0],
                low_ms=low,
                high_ms=high,
                device_ms=medians[arm][1],
                ratio_to_us=medians[arm][0] / ours[0],
                device_ratio_to_us=medians[arm][1] / ours[1],
            )
            if torch:
                torch.cuda.empty_cache()
        if "nalayer" not in medians:
            return
        if not max(losses.values()) - min(losses.values()) <= LOSS_TOLERANCE * losses["nalayer"]:
            write(kernel=kernel, **sizes, error=f"losses differ: {losses}")
        for name, milliseconds in stages(timer, arms["nalayer"]).items():
            write(kernel=kernel, **sizes, stage=name, device_ms=milliseconds)
        cp.get_default_memory_pool().free_all_blocks()

    write(kernel="rates", **rates(timer))
    rng = np.random.default_rng(0)
    for n, k in S_SIZES:
        batches, channel = s_inputs(rng, n, k)
        data = [(cp.asarray(a), cp.asarray(z)) for a, z in batches]
        b = cp.asarray(channel)

        def ours_s(c: int, data: list = data, b: Any = b) -> Any:
            a, z = data[c % N_INPUTS]
            return kernels.s_model_nll(a, b, z, check_values=False)

        peers = torch_s(torch, batches, channel) if torch else {}
        compare({"n": n, "k": k}, "s_model_nll", {"nalayer": ours_s} | peers)

    for n, k, n_kept in SPARSE_SIZES:
        # Neighbours on a ring, in no order: every label has n_kept links.
        order, steps = rng.permutation(k), np.arange(n_kept)
        support = np.empty((k, n_kept), dtype=np.int64)
        support[order] = order[(np.arange(k)[:, None] + steps) % k]
        on_cpu, index = kernels.link_index(support), kernels.link_index(cp.asarray(support))
        channel = rng.normal(size=(k, n_kept)).astype(np.float32)
        batches = [
            (rng.normal(size=(n, k)).astype(np.float32), rng.integers(k, size=n))
            for _ in range(N_INPUTS)
        ]
        data = [(cp.asarray(a), cp.asarray(z)) for a, z in batches]
        b = cp.asarray(channel)

        def ours_sparse(c: int, data: list = data, b: Any = b, index: Any = index) -> Any:
            a, z = data[c % N_INPUTS]
            return kernels.sparse_s_model_nll(a, b, index, z, check_values=False)

        peers = torch_sparse_s(torch, batches, channel, on_cpu) if torch else {}
        sizes = {"n": n, "k": k, "l": n_kept}
        compare(sizes, "sparse_s_model_nll", {"nalayer": ours_sparse} | peers)

    for n, d, k in C_SIZES:
        batches = [
            (
                rng.normal(size=(n, k)).astype(np.float32),
                rng.normal(size=(n, d)).astype(np.float32),
                rng.integers(k, size=n),
            )
            for _ in range(N_INPUTS)
        ]
        wide = (
            (rng.normal(size=(k, k, d)) / np.sqrt(d)).astype(np.float32),
            rng.normal(size=(k, k)).astype(np.float32),
        )
        data = [tuple(cp.asarray(x) for x in batch) for batch in batches]
        u, b = (cp.asarray(x) for x in wide)

        def ours_c(c: int, data: list = data, u: Any = u, b: Any = b) -> Any:
            a, h, z = data[c % N_INPUTS]
            return kernels.c_model_nll(a, h, u, b, z, check_values=False)

        peers = torch_c(torch, batches, wide) if torch else {}
        compare({"n": n, "d": d, "k": k}, "c_model_nll", {"nalayer": ours_c} | peers)
