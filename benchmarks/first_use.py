"""How long the first use takes: kernels compiled, then loaded from the cache, and the import.

Numba compiles a kernel when it is first called with a dtype, and keeps the result on disk. New
processes, an empty cache: one calls every compiled kernel, dtype after dtype; a second one does so
again; a third takes one training step of the MLP, which is timed from the process's start to its
end; others import the package.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import kernels
from benchmarks import records
from benchmarks.records import ROOT, Row

N, K, D, N_KEPT = 256, 300, 8, 5
DTYPES = ("float32", "float64")
N_IMPORTS = 5
COMPILED, LOADED, FIRST_STEP, IMPORTED = "compiled", "loaded", "first step", "imported"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="only this; repeatable, in this order"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")


def calls(dtype: str) -> dict[str, Callable[[], Any]]:
    """Return a call of every kernel that is compiled, by the kernel's name."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    index = kernels.link_index((np.arange(K)[:, None] + np.arange(N_KEPT)) % K)
    a, h, z = normal(N, K), normal(N, D), rng.integers(K, size=N)
    b, u, b_kept, u_kept = normal(K, K), normal(K, K, D), normal(K, N_KEPT), normal(K, N_KEPT, D)
    halves = np.full((N, K), 1 / K, dtype)
    models = {
        "s_model": (a, b, z),
        "sparse_s_model": (a, b_kept, index, z),
        "c_model": (a, h, u, b, z),
        "sparse_c_model": (a, h, u_kept, b_kept, index, z),
    }
    images, weight, bias, d_weight, d_bias = (
        normal(16, 12, 12, 8),
        normal(3, 3, 8, 16),
        normal(16),
        normal(3, 3, 8, 16),
        normal(16),
    )
    out, place = normal(16, 5, 5, 16), np.zeros((16, 5, 5, 16), np.uint8)
    p, g, m, v = (np.ones(64, dtype) for _ in range(4))
    adam: dict[str, Any] = {"step_size": 0.1, "beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-8}
    on: dict[str, Any] = {"backend": "numba"}
    found: dict[str, Callable[[], Any]] = {
        "softmax_nll": lambda: kernels.softmax_nll(a, z, **on),
        "soft_target_nll": lambda: kernels.soft_target_nll(a, halves, **on),
    }
    for model, given in models.items():
        for name in (f"{model}_nll", f"{model}_posterior"):
            found[name] = partial(getattr(kernels, name), *given, **on)
    return found | {
        "c_model_nll_skipping": lambda: kernels.c_model_nll_skipping(a, h, u, b, z, 0.01, **on),
        "bias_relu_dropout": lambda: kernels.bias_relu_dropout(h, normal(D), 0.5, **on),
        "bias_relu_dropout_backward": lambda: kernels.bias_relu_dropout_backward(
            h, h, normal(N, D), normal(D), 0.5, **on
        ),
        "adam_update": lambda: kernels.adam_update(p, g, m, v, 1, **adam, **on),
        "conv2d_relu": lambda: kernels.conv2d_relu(
            images, weight, bias, out, place, pool=2, rate=0.25, **on
        ),
        "conv2d_relu_backward": lambda: kernels.conv2d_relu_backward(
            images, weight, out, place, out, images.copy(), d_weight, d_bias, pool=2, **on
        ),
        "conv2d": lambda: kernels.conv2d(images, weight, **on),
        "conv2d_backward": lambda: kernels.conv2d_backward(
            images, weight, normal(16, 10, 10, 16), **on
        ),
        "max_pool2d": lambda: kernels.max_pool2d(images, 2, **on),
        "max_pool2d_backward": lambda: kernels.max_pool2d_backward(
            np.zeros((16, 6, 6, 8), np.uint8), normal(16, 6, 6, 8), 2, images.shape, **on
        ),
    }


def print_calls(dtypes: list[str]) -> None:
    """Call every kernel once and print how long each took, as JSON; the import is not counted."""
    kernels.get_backend("numba")
    for dtype in dtypes:
        for name, call in calls(dtype).items():
            started = time.perf_counter()
            call()
            seconds = time.perf_counter() - started
            print(json.dumps({"dtype": dtype, "call": name, "seconds": seconds}), flush=True)


def take_step() -> None:
    """Train the paper's MLP with an s-model on top for one batch."""
    from benchmarks.step_arms import OurTrainer, Problem

    OurTrainer(Problem(n_samples=256), None, noise_layer=True).step(slice(0, 256))


def _ask(code: str, cache: str) -> tuple[str, float]:
    """Run code in a new process; return what it printed and how long the process took."""
    started = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"NUMBA_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return found.stdout, time.perf_counter() - started


def measure(dtypes: list[str], progress: Callable[[str], None]) -> list[Row]:
    """Return the rows of a run."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as cache:
        code = f"from benchmarks.first_use import *; print_calls({dtypes!r})"
        for phase in (COMPILED, LOADED):
            progress(f"every kernel, {phase}")
            printed, _ = _ask(code, cache)
            rows += [{"first_use": phase} | json.loads(line) for line in printed.splitlines()]
        code = "from benchmarks.first_use import *; take_step()"
        progress("one training step")
        _ask(code, cache)  # what a step takes besides the kernels above is compiled now
        rows.append({"first_use": FIRST_STEP, "seconds": _ask(code, cache)[1]})
        code = (
            "import time; t = time.perf_counter(); import nalayer; print(time.perf_counter() - t)"
        )
        for _ in range(N_IMPORTS):
            rows.append({"first_use": IMPORTED, "seconds": float(_ask(code, cache)[0])})
    return rows


def seconds_of(rows: list[Row], phase: str, dtype: str | None = None) -> list[float]:
    """Return the seconds of one phase's rows."""
    return [
        row["seconds"]
        for row in rows
        if row.get("first_use") == phase and dtype in (None, row.get("dtype"))
    ]


def sentence(rows: list[Row]) -> str:
    """Return what the rows say, in a sentence."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows if "dtype" in row))
    compiled = [f"{sum(seconds_of(rows, COMPILED, d)):.0f} s for {d}" for d in dtypes]
    return (
        f"First use, from an empty cache: all kernels compile in {', and then '.join(compiled)}. A "
        f"second process has called them all after {sum(seconds_of(rows, LOADED)):.1f} s; one that "
        "takes a step of the MLP with an s-model on top is at its end after "
        f"{median(seconds_of(rows, FIRST_STEP)):.1f} s. `import nalayer` takes "
        f"{median(seconds_of(rows, IMPORTED)):.2f} s."
    )


def table(rows: list[Row]) -> list[str]:
    """Return one line for each kernel."""
    lines = []
    by_call: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if "call" in row:
            by_call.setdefault((row["dtype"], row["call"]), {})[row["first_use"]] = row["seconds"]
    for (dtype, call), found in by_call.items():
        lines.append(
            f"{dtype:<8} {call:<28} {found[COMPILED]:6.2f} s compiled {found[LOADED]:6.3f} s loaded"
        )
    return lines


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure, print and write the rows."""
    try:
        if options.json:
            records.require_writable(options.json)
    except OSError as error:
        parser.error(str(error))
    base = records.provenance(
        "first_use", options.command, "numba", kernels.thread_count(), kernels.thread_count()
    )
    rows = [base | row for row in measure(options.dtype or list(DTYPES), print)]
    if options.json:
        records.write_rows(options.json, rows)
    print("\n".join(["", *table(rows), "", sentence(rows)]))
    return 0
