"""Each layer of the CNN by itself: ours, PyTorch's, and its matrix products alone, on the CPU.

A layer is what lies between two of them: a convolution or product with its bias, ReLU, pooling and
dropout. Its inputs are random; the time does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from benchmarks import devices, performance, step_arms, timing
from benchmarks.devices import CPU
from benchmarks.kernels import Keep
from benchmarks.peers import is_installed
from benchmarks.records import Row
from benchmarks.step_arms import POOL, GemmShape, Problem, layer_distance_to_kinks, layer_products
from benchmarks.timing import Arm
from benchmarks.worker import Arrays, Work
from nalayer.buffers import Buffers
from nalayer.image_layers import ConvBlock
from nalayer.layers import Hidden, Parameters, new_gradients

MODULE = "benchmarks.step_layers"
DIRECTIONS = ("forward", "backward")
N_COMPARED = 2  # images
# There are two dozen cases: each gets a few seconds.
ROUNDS, BLOCK_SECONDS, BUDGET_SECONDS = 9, 0.06, 5.0
TORCH, CHANNELS_LAST = "torch", "torch channels_last"
Passes = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class LayerCase:
    """One layer of a network, in one direction."""

    problem: Problem
    index: int
    direction: str

    @property
    def is_first(self) -> bool:
        """Whether nobody needs the gradient of its inputs."""
        return self.index == 0

    @property
    def products(self) -> list[GemmShape]:
        """(m, k, n) of its matrix products."""
        forward, *backward = layer_products(self.problem)[self.index]
        return [forward] if self.direction == "forward" else backward

    def layer(self, backend: str | None) -> Any:
        """Return our layer."""
        return self.problem.network_on(backend).layers[self.index]

    @property
    def name(self) -> str:
        """The layer in a few words."""
        layer = self.layer(None)
        if not isinstance(layer, ConvBlock):
            return f"{self.index + 1}: dense {layer.n_in}-{layer.n_out}"
        rows, columns, channels = layer.image_shape
        pool = f", pool {layer.pool}" if layer.pool > 1 else ""
        return f"{self.index + 1}: conv {rows}x{columns}x{channels}-{layer.n_filters}{pool}"


def cases_of(problem: Problem) -> list[LayerCase]:
    """Return every layer in both directions."""
    return [
        LayerCase(problem, index, direction)
        for index in range(len(problem.network.layers))
        for direction in DIRECTIONS
    ]


def inputs(case: LayerCase, compared: bool = False) -> tuple[Parameters, np.ndarray, np.ndarray]:
    """Return parameters, inputs (n, n_in), and the gradient of the outputs.

    What is compared are a few samples that stay far from every kink, as for a whole step.
    """
    rng, dtype = np.random.default_rng(case.problem.seed), np.dtype(case.problem.dtype)
    layer = case.layer("numpy")
    parameters = tuple(part.astype(dtype) for part in layer.initial(rng))
    n = POOL * N_COMPARED if compared else case.problem.batch_size
    x = rng.standard_normal((n, layer.n_in)).astype(dtype)
    np.maximum(x, 0, out=x)
    if compared:
        distance_t = layer_distance_to_kinks(layer, parameters, x)
        x = x[np.argsort(-distance_t, kind="stable")[:N_COMPARED]]
    n_out = int(np.prod(layer.out_shape)) if isinstance(layer, ConvBlock) else layer.n_out
    return parameters, x, rng.standard_normal((len(x), n_out)).astype(dtype)


# --- ours ----------------------------------------------------------------------------------------


def our_passes(
    case: LayerCase,
    backend: str | None,
    parameters: Parameters,
    x: np.ndarray,
    d_out: np.ndarray,
    rng: np.random.Generator | None,
) -> Passes:
    """Return both directions; forward returns its output, backward all gradients."""
    layer, buffers = case.layer(backend), Buffers()
    d_parameters = new_gradients(parameters, d_out)
    _, cache = layer.forward(parameters, x, rng, buffers)

    def forward() -> Arrays:
        return layer.forward(parameters, x, rng, buffers)[:1]

    def backward() -> Arrays:
        d_x, _ = layer.backward(
            parameters, cache, d_out, d_parameters, buffers, first=case.is_first
        )
        return d_parameters if case.is_first else (d_x, *d_parameters)

    return {"forward": forward, "backward": backward}


def build_ours(case: dict[str, Any], backend: str) -> Work:
    """Return our layer; with BLAS on one thread where compiled kernels have more, as in a step."""
    one = _case(case)
    if backend != "numpy":
        threadpool_limits(1, user_api="blas")
    timed = our_passes(one, backend, *inputs(one), np.random.default_rng(0))
    compared = our_passes(one, backend, *inputs(one, compared=True), None)
    return Work(timed[one.direction], compared[one.direction])


def build_reference(case: dict[str, Any]) -> Work:
    """Return plain NumPy in float64."""
    one = _case(case)
    parameters, x, d_out = inputs(one, compared=True)
    exact = [array.astype(np.float64) for array in (*parameters, x, d_out)]
    passes = our_passes(one, "numpy", tuple(exact[:-2]), exact[-2], exact[-1], None)
    return Work(lambda: None, passes[one.direction])


def _case(case: dict[str, Any]) -> LayerCase:
    return LayerCase(Problem(**case["problem"]), case["index"], case["direction"])


# --- PyTorch's -----------------------------------------------------------------------------------


class TorchLayer:
    """The same layer of ``torch.nn``, with images and filters in the memory format of that name."""

    def __init__(self, case: LayerCase, memory_format: str) -> None:
        self.torch = devices.torch_on(CPU)
        self.case, self.layer = case, case.layer(None)
        self.has_images = isinstance(self.layer, ConvBlock)
        self.memory_format = getattr(self.torch, memory_format)

    def passes(
        self, parameters: Parameters, x: np.ndarray, d_out: np.ndarray, drops: bool
    ) -> Passes:
        """Return both directions; they return tensors."""
        module = self._module(drops)
        own = module[0]
        weight, bias = map(self.torch.from_numpy, parameters)
        with self.torch.no_grad():
            own.weight.copy_(self._turned(weight, (3, 2, 0, 1)))
            own.bias.copy_(bias)
        module.to(memory_format=self.memory_format)
        features = self._tensor(x, "image_shape").requires_grad_(not self.case.is_first)
        leaves = [features] * features.requires_grad + [own.weight, own.bias]
        d_values = self._tensor(d_out, "out_shape")
        out = module(features)
        gradients = partial(self.torch.autograd.grad, out, leaves, d_values, retain_graph=True)
        return {"forward": lambda: (module(features),), "backward": gradients}

    def _module(self, drops: bool) -> Any:
        nn, layer = self.torch.nn, self.layer
        made: list[Any]
        if self.has_images:
            size, n_channels = layer.size, layer.image_shape[2]
            zeros = size // 2 if layer.padding == "same" else 0
            made = [nn.Conv2d(n_channels, layer.n_filters, size, padding=zeros), nn.ReLU()]
            made += [nn.MaxPool2d(layer.pool)] * (layer.pool > 1)
        else:
            made = [nn.Linear(layer.n_in, layer.n_out)]
            made += [nn.ReLU()] * isinstance(layer, Hidden)
        rate = getattr(layer, "rate", 0.0) if drops else 0.0
        return nn.Sequential(*made, *[nn.Dropout(rate)] * (rate > 0))

    def _tensor(self, values: np.ndarray, shape: str) -> Any:
        """Return rows as a tensor; those of images (rows, columns, channels) channels first."""
        tensor = self.torch.from_numpy(values)
        if not self.has_images:
            return tensor
        images = tensor.reshape(-1, *getattr(self.layer, shape)).permute(0, 3, 1, 2)
        return images.contiguous(memory_format=self.memory_format)

    def _turned(self, weight: Any, order: tuple[int, ...]) -> Any:
        return weight.permute(order) if self.has_images else weight.t()

    def in_our_order(self, tensors: tuple[Any, ...]) -> Arrays:
        """Return what a pass returned as our layers have it."""

        def rows(tensor: Any) -> np.ndarray:
            if self.has_images:
                tensor = tensor.permute(0, 2, 3, 1).flatten(1)
            return tensor.detach().numpy()

        if self.case.direction == "forward":
            return tuple(map(rows, tensors))
        *d_x, d_weight, d_bias = tensors
        return (*map(rows, d_x), self._turned(d_weight, (2, 3, 1, 0)).numpy(), d_bias.numpy())


def build_torch(case: dict[str, Any], memory_format: str) -> Work:
    """Return PyTorch's layer."""
    one = _case(case)
    theirs = TorchLayer(one, memory_format)
    timed = theirs.passes(*inputs(one), drops=True)[one.direction]
    compared = theirs.passes(*inputs(one, compared=True), drops=False)[one.direction]
    return Work(timed, lambda: theirs.in_our_order(compared()))


# --- the list ------------------------------------------------------------------------------------


def arms_of(case: LayerCase, backend: str, with_peers: bool) -> list[Arm]:
    """Return ours first, PyTorch's in both orders of the numbers, and the products alone."""
    given = {"case": asdict(case)}
    arms = [
        Arm(
            f"nalayer {backend}",
            f"{MODULE}:build_ours",
            given | {"backend": backend},
            backend=backend,
        )
    ]
    formats = {TORCH: "contiguous_format"}
    if isinstance(case.layer(None), ConvBlock):
        formats[CHANNELS_LAST] = "channels_last"
    for name, memory_format in formats.items() if with_peers else ():
        here = is_installed("torch")
        arms.append(
            Arm(
                name,
                f"{MODULE}:build_torch",
                given | {"memory_format": memory_format},
                skip="" if here else "missing",
                detail="" if here else "torch is not installed",
                backend="torch",
            )
        )
    return arms + step_arms.floor_arms(step_arms.floor_of(case.problem, case.products), False, CPU)


def references(case: LayerCase) -> dict[str, Arm]:
    """Return what the arms are compared with."""
    given, floor = {"case": asdict(case)}, step_arms.floor_of(case.problem, case.products)
    return {
        "reference": Arm("", f"{MODULE}:build_reference", given, backend="numpy"),
        "floor": Arm("", f"{step_arms.MODULE}:build_floor_reference", floor, backend="numpy"),
    }


def layer_rows(case: LayerCase, outcomes: list[timing.Outcome]) -> list[Row]:
    """Return one row for each arm, with its rate and how much of its time the products take."""
    rows = step_arms.with_floor(timing.outcome_rows(outcomes), case.products)
    facts = {
        "layer": case.name,
        "direction": case.direction,
        "size": step_arms.size_of(case.problem),
        "dtype": case.problem.dtype,
        "batch_size": case.problem.batch_size,
        "seed": case.problem.seed,
    }
    for row in rows:
        ms = row["median_ms"]
        row["gigaflops"] = row["gemm_flops"] / ms / 1e6 if ms else None
    return [facts | row for row in rows]


def measure(
    problems: list[Problem],
    backend: str,
    with_peers: bool,
    pool: timing.Pool,
    keep: Keep,
    progress: Callable[[str], None],
) -> None:
    """Time every layer of these networks; hand over the rows as they come.

    The arms of one library share a process: there are too many to start one for each.
    """
    usual = pool.settings
    settings = replace(
        usual,
        rounds=min(usual.rounds, ROUNDS),
        block_seconds=min(usual.block_seconds, BLOCK_SECONDS),
        budget_seconds=min(usual.budget_seconds, BUDGET_SECONDS),
    )
    with timing.Pool(pool.cache, settings, shared=True) as shared:
        for case in (case for problem in problems for case in cases_of(problem)):
            outcomes = timing.measure(
                arms_of(case, backend, with_peers),
                references(case),
                timing.tolerance(case.problem.dtype),
                shared,
                timing.prefixed(progress, f"{case.name} {case.direction}"),
            )
            rows = layer_rows(case, outcomes)
            keep(rows)
            tqdm.write("\n".join(performance.case_table(rows)))
