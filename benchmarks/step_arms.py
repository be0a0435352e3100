"""What `step` times: networks with dropout and Adam, ours, scikit-learn's, and the floor.

PyTorch's and JAX's are in :mod:`benchmarks.step_peers`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

import kernels
import nalayer
from benchmarks import devices, step_peers
from benchmarks.devices import CPU, CUDA
from benchmarks.kernel_cases import backend_of_model, device_of
from benchmarks.peers import is_installed
from benchmarks.records import Row
from benchmarks.timing import Arm
from benchmarks.worker import Arrays, Work
from nalayer.buffers import Buffers
from nalayer.image_layers import Conv2d, ConvBlock
from nalayer.layers import Hidden, Parameters
from nalayer.training import run_epoch

MODULE = "benchmarks.step_arms"
FLOOR = "GEMMs alone"
# Adam's first step is nearly the sign of the gradient, which turns rounding of a tiny gradient
# into a full step. Where results are compared its epsilon is this large, and the step is smooth.
COMPARED_EPSILON = 1e-4
N_COMPARED_STEPS = 2
POOL = 4  # the compared samples are the best of so many times as many
COMPARED_ROWS = 64  # of the floor's products: all of an image's would take gigabytes
GemmShape = tuple[int, int, int]


@dataclass(frozen=True)
class Problem:
    """The network, the data and the settings that every arm gets."""

    sizes: tuple[int, ...] = (784, 500, 300, 10)
    image_shape: tuple[int, ...] = ()
    """of the CNN, whose ``sizes`` are those of the first and last layer; empty for the MLP"""
    n_samples: int = 60_000
    batch_size: int = 256
    dropout: float = 0.5
    dtype: str = "float32"
    epsilon: float = 1e-8
    """of Adam; its other settings are everyone's defaults"""
    seed: int = 0
    picked: tuple[int, ...] = ()
    """keep only these samples, in this order; all if empty"""

    @property
    def network(self) -> nalayer.Network:
        """Our network of these sizes."""
        return self.network_on(None)

    def network_on(self, backend: str | None) -> nalayer.Network:
        """Return the same with its layers on one backend."""
        n_in, *hidden, n_classes = self.sizes
        if self.image_shape:
            rows, columns, n_channels = self.image_shape
            return nalayer.cnn((rows, columns, n_channels), n_classes, backend)
        return nalayer.mlp(n_in, hidden, n_classes, self.dropout, backend)

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Return features between 0 and 1, about half of them 0, and noisy labels.

        The labels stay too noisy to be learned by heart, so gradients do not fade to denormals
        however long an arm trains.
        """
        x, z = _all_samples(replace(self, picked=()))
        return (x[list(self.picked)], z[list(self.picked)]) if self.picked else (x, z)

    def initial_weights(self) -> np.ndarray:
        """Return the weights that every arm starts from: ours, in our order."""
        rng = np.random.default_rng(self.seed + 1)
        return self.network.initial_weights(rng, np.dtype(self.dtype))

    def for_comparison(self) -> Problem:
        """Return the same without dropout, with a smooth Adam, and samples to choose from.

        An image meets so many ReLUs that of a large batch one would be at a kink: few are taken.
        """
        batch_size = min(self.batch_size, 16) if self.image_shape else self.batch_size
        return replace(
            self,
            dropout=0.0,
            epsilon=COMPARED_EPSILON,
            batch_size=batch_size,
            n_samples=N_COMPARED_STEPS * POOL * batch_size,
        )


@functools.lru_cache(maxsize=2)
def _all_samples(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Return the data, the same arrays for all arms in a process: nobody writes them."""
    rng = np.random.default_rng(problem.seed)
    n_in, n_classes = problem.sizes[0], problem.sizes[-1]
    prototypes = rng.normal(size=(n_classes, n_in)).astype(problem.dtype)
    classes = rng.integers(n_classes, size=problem.n_samples)
    x = rng.standard_normal((problem.n_samples, n_in), dtype=np.float32).astype(problem.dtype)
    x += 0.3 * prototypes[classes]
    np.clip(x, 0, 4, out=x)
    x /= 4
    theta = nalayer.make_noise_matrix("symmetric", n_classes, 0.4, rng)
    return x, nalayer.corrupt_labels(classes, theta, rng)


def size_of(problem: Problem) -> str:
    """Return the network in a word."""
    if problem.image_shape:
        return f"CNN {'x'.join(map(str, problem.image_shape))}-{problem.sizes[-1]}"
    return "-".join(map(str, problem.sizes))


class Trainer(Protocol):
    """What an arm makes of a problem. Data lie wherever its library wants them."""

    def step(self, batch: Any) -> Any:
        """Take one training step on these samples; return the loss, however the library has it.

        A batch is a slice, or what ``index`` makes of the samples' numbers.
        """

    def epoch(self) -> Any:
        """Go through all samples once, in random order."""

    def index(self, samples: np.ndarray) -> Any:
        """Return the samples' numbers where they can be used to pick from the data."""

    def parameters(self) -> np.ndarray:
        """Return all parameters as our flat vector; every step is done when this returns."""

    def wait(self) -> None:
        """Return once all work handed out is done."""


MakeTrainer = Callable[[Problem], Trainer]


def work_of(
    make: MakeTrainer,
    problem: Problem,
    unit: str,
    noise_layer: bool = False,
    clock: devices.Clock | None = None,
) -> Work:
    """Return a step or an epoch to be timed, and what is compared: losses and the way gone.

    On a GPU a step picks its samples from all over the data, and nothing waits for it.
    """

    def batches_of(trainer: Trainer, order: np.ndarray, size: int) -> list[Any]:
        slices = [slice(start, start + size) for start in range(0, len(order) - size + 1, size)]
        return [trainer.index(order[batch]) for batch in slices] if clock else slices

    trainer = make(problem)
    order = np.random.default_rng(problem.seed).permutation(problem.n_samples)
    batches = batches_of(trainer, order, problem.batch_size)
    taken = 0

    def step() -> Any:
        nonlocal taken
        loss = trainer.step(batches[taken % len(batches)])
        taken += 1
        if clock is None:
            trainer.wait()
        return loss

    def epoch() -> Any:
        result = trainer.epoch()
        if clock is None:
            trainer.wait()
        return result

    def results() -> Arrays:
        small = off_the_kinks(problem.for_comparison(), noise_layer)
        compared = make(small)
        # In float64: the way is short beside the parameters.
        start = compared.parameters().astype(np.float64)
        steps = batches_of(compared, np.arange(len(small.picked)), small.batch_size)
        losses = [float(compared.step(batch)) for batch in steps]
        return np.array(losses), compared.parameters() - start

    return Work({"step": step, "epoch": epoch}[unit], results, clock=clock)


# --- ours ----------------------------------------------------------------------------------------


def our_step(
    model: nalayer.PlainModel | nalayer.SModel,
    optimiser: nalayer.Adam,
    parameters: np.ndarray,
    state: Any,
    x: np.ndarray,
    targets: np.ndarray,
    dropout: np.random.Generator | None,
    buffers: Buffers,
) -> Any:
    """Take one training step as :func:`nalayer.training.run_epoch` takes it; return the loss."""
    loss, gradient = model.loss_and_gradient(parameters, x, targets, dropout, buffers)
    optimiser.update(parameters, gradient, state)
    return loss


class OurTrainer:
    """nalayer, with or without the s-model's noise layer on top."""

    def __init__(
        self, problem: Problem, backend: str | None, noise_layer: bool, exact: bool = False
    ) -> None:
        device = device_of(backend)
        put = devices.put_ours(device)
        self.x, self.z = problem.data()
        backend = backend_of_model(backend)
        network = problem.network_on(backend)
        self.model: nalayer.PlainModel | nalayer.SModel
        self.flat = problem.initial_weights()
        if noise_layer:
            model = nalayer.SModel(network, backend=backend)
            # Any start will do; that of small numbers can be compared to most digits.
            start = 0.5 * np.eye(network.n_classes, dtype=self.flat.dtype)
            self.flat = model.pack(self.flat, start)
            self.model = model
        else:
            self.model = nalayer.PlainModel(network, backend)
        if exact:  # the same numbers, but all that follows in float64
            self.x, self.flat = self.x.astype(np.float64), self.flat.astype(np.float64)
        self.index = put
        self.x, self.z = put(self.x), put(self.z)
        self.flat = put(self.flat)
        self.optimiser = nalayer.Adam(epsilon=problem.epsilon, backend=backend)
        self.state = self.optimiser.initial_state(self.flat)
        self.buffers = Buffers()
        self.batch_size = problem.batch_size
        self.shuffling = np.random.default_rng(problem.seed)
        self.dropout = np.random.default_rng(problem.seed) if problem.dropout else None

    def _picked(self, name: str, values: Any, batch: Any) -> Any:
        """Return a batch's features or labels, as :func:`nalayer.training.run_epoch` does."""
        if isinstance(batch, slice):
            return values[batch]
        out = self.buffers.take(name, (batch.size, *values.shape[1:]), values.dtype, like=values)
        kernels.gather_rows(values, batch, out)
        return out

    def step(self, batch: Any) -> Any:
        """Take one step."""
        return our_step(
            self.model,
            self.optimiser,
            self.flat,
            self.state,
            self._picked("x", self.x, batch),
            self._picked("targets", self.z, batch),
            self.dropout,
            self.buffers,
        )

    def epoch(self) -> None:
        """Go through the samples once."""
        run_epoch(
            self.model,
            self.flat,
            self.x,
            self.z,
            self.optimiser,
            self.state,
            batch_size=self.batch_size,
            shuffling=self.shuffling,
            dropout=self.dropout,
        )

    def parameters(self) -> np.ndarray:
        """Return the parameters, a copy."""
        return np.array(devices.on_cpu(self.flat))

    def wait(self) -> None:
        """Return: nothing is left to do."""


def build_ours(
    problem: dict[str, Any],
    unit: str,
    backend: str | None,
    noise_layer: bool = False,
    in_epoch: bool = False,
) -> Work:
    """Return our own arm; a step ``in_epoch`` is an epoch's time over the number of its steps.

    On a GPU an epoch records a step and repeats it, which a step by itself cannot.
    """
    case = Problem(**problem)
    work = work_of(
        lambda p: OurTrainer(p, backend, noise_layer),
        case,
        "epoch" if in_epoch else unit,
        noise_layer,
        devices.clock_of("cupy", device_of(backend)),
    )
    return replace(work, units=-(-case.n_samples // case.batch_size)) if in_epoch else work


def build_reference(problem: dict[str, Any], noise_layer: bool = False) -> Work:
    """Return plain NumPy in float64 from the same start: the truth of the comparison."""
    return work_of(
        lambda p: OurTrainer(p, "numpy", noise_layer, exact=True),
        Problem(**problem),
        "step",
        noise_layer,
    )


@functools.cache
def off_the_kinks(problem: Problem, noise_layer: bool) -> Problem:
    """Keep, for each step compared, the samples that stay furthest from every ReLU's kink.

    Where the input of a ReLU is zero but for rounding, whether it passes is a matter of chance,
    and so is a gradient: no two right programs need agree there. The way is gone in float64.
    """
    guide = OurTrainer(problem, "numpy", noise_layer, exact=True)
    x, z = guide.x, guide.z
    picked: list[int] = []
    for candidates in np.split(np.arange(len(x)), N_COMPARED_STEPS):
        distance_t = _distance_to_kinks(problem, guide.parameters(), x[candidates])
        batch = candidates[np.argsort(-distance_t, kind="stable")[: problem.batch_size]]
        guide.x, guide.z = x[batch], z[batch]
        guide.step(slice(None))
        picked += batch.tolist()
    return replace(problem, picked=tuple(picked))


def _distance_to_kinks(problem: Problem, parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return each sample's smallest absolute input to a ReLU, or lead of a window's maximum."""
    network = problem.network_on("numpy")
    distance_t = np.full(len(x), np.inf)
    for layer, own in zip(
        network.layers, network.unpack(parameters[: network.n_weights]), strict=True
    ):
        distance_t = np.minimum(distance_t, layer_distance_to_kinks(layer, own, x))
        x, _ = layer.forward(own, x, None)
    return distance_t


def layer_distance_to_kinks(layer: Any, own: Parameters, x: np.ndarray) -> np.ndarray:
    """Return the same for one layer; infinite for the classifier, which has no ReLU."""
    if isinstance(layer, ConvBlock):
        convolution = Conv2d(layer.image_shape, layer.n_filters, layer.size, layer.padding, "numpy")
        before, _ = convolution.forward(own, x, None)
        lead_t = _lead_of_maxima(before.reshape(-1, *layer.conv_shape), layer.pool)
        return np.minimum(lead_t, np.abs(before).min(axis=1))
    if isinstance(layer, Hidden):
        return np.abs(x @ own[0] + own[1]).min(axis=1)
    return np.full(len(x), np.inf)


def _lead_of_maxima(images: np.ndarray, size: int) -> np.ndarray:
    """Return how far, at least, the largest number of a window lies above the next, if above 0."""
    if size == 1:
        return np.full(len(images), np.inf)
    n, rows, columns, n_channels = images.shape
    windows = images[:, : rows // size * size, : columns // size * size]
    windows = windows.reshape(n, rows // size, size, columns // size, size, n_channels)
    windows = windows.transpose(0, 1, 3, 5, 2, 4).reshape(n, -1, size**2)
    next_one, largest = np.moveaxis(np.sort(windows, axis=2)[:, :, -2:], 2, 0)
    return np.where(largest > 0, largest - next_one, np.inf).min(axis=1)


# --- scikit-learn --------------------------------------------------------------------------------


class SklearnTrainer:
    """scikit-learn's MLPClassifier by ``partial_fit``; it knows no dropout."""

    index = staticmethod(np.asarray)

    def __init__(self, problem: Problem) -> None:
        from sklearn.neural_network import MLPClassifier

        self.x, self.z = problem.data()
        self.epsilon = problem.epsilon
        self.mlp = MLPClassifier(
            problem.sizes[1:-1],
            alpha=0,
            batch_size=problem.batch_size,
            random_state=problem.seed,
            epsilon=problem.epsilon,
        )
        # It draws weights at its first step; from then on they can be set, and Adam reset.
        size = problem.batch_size
        self.mlp.partial_fit(self.x[:size], self.z[:size], classes=np.arange(problem.sizes[-1]))
        layers = list(problem.network.unpack(problem.initial_weights()))
        for values, weight, bias in zip(
            (parameters for parameters in layers if parameters),
            self.mlp.coefs_,
            self.mlp.intercepts_,
            strict=True,
        ):
            weight[...], bias[...] = values
        adam = self.mlp._optimizer
        adam.t = 0
        for moment in (*adam.ms, *adam.vs):
            moment[...] = 0

    def step(self, batch: slice) -> float:
        """Take one step."""
        if self.epsilon == COMPARED_EPSILON:
            # Its epsilon stands beside the uncorrected moment; this makes the two formulas one.
            adam = self.mlp._optimizer
            adam.epsilon = self.epsilon * np.sqrt(1 - adam.beta_2 ** (adam.t + 1))
        self.mlp.partial_fit(self.x[batch], self.z[batch])
        return self.mlp.loss_

    def epoch(self) -> None:
        """Go through the samples once."""
        self.mlp.partial_fit(self.x, self.z)

    def parameters(self) -> np.ndarray:
        """Return the parameters in our order."""
        pairs = zip(self.mlp.coefs_, self.mlp.intercepts_, strict=True)
        return np.concatenate([array.ravel() for pair in pairs for array in pair])

    def wait(self) -> None:
        """Return: nothing is left to do."""


def build_sklearn(problem: dict[str, Any], unit: str) -> Work:
    """Return scikit-learn's arm."""
    return work_of(SklearnTrainer, Problem(**problem), unit)


# --- the floor -----------------------------------------------------------------------------------


def layer_products(problem: Problem) -> list[list[GemmShape]]:
    """Return (m, k, n) of each layer's products: forward, weights' gradient, inputs' gradient.

    A convolution counts as the product of all patches with the filters. The first layer lacks the
    last product: nobody needs the gradient of the features.
    """
    shapes: list[list[GemmShape]] = []
    for layer in problem.network.layers:
        (*patch, n_out), _ = layer.parameter_shapes
        n_in, n_rows = int(np.prod(patch)), problem.batch_size
        if isinstance(layer, ConvBlock):
            n_rows *= layer.conv_shape[0] * layer.conv_shape[1]
        first = not shapes
        shapes.append([(n_rows, n_in, n_out), (n_in, n_rows, n_out)])
        if not first:
            shapes[-1].append((n_rows, n_out, n_in))
    return shapes


def gemm_shapes(problem: Problem) -> list[GemmShape]:
    """Return (m, k, n) of every product of a step.

    Examples
    --------
    >>> flops(gemm_shapes(Problem())) / 1e9  # of a step, in GF
    0.636416
    """
    return [shape for layer in layer_products(problem) for shape in layer]


def flops(shapes: Sequence[GemmShape]) -> int:
    """Return the floating-point operations of these products."""
    return sum(2 * m * k * n for m, k, n in shapes)


def with_floor(rows: list[Row], shapes: Sequence[GemmShape]) -> list[Row]:
    """Return the arms' rows with how much of their time the products alone would take."""
    floors = [row["median_ms"] for row in rows if row["arm"].startswith(FLOOR)]
    floor = min((ms for ms in floors if ms is not None), default=None)
    return [
        row
        | {
            "gemm_floor_ms": floor,
            "gemm_share": floor / row["median_ms"] if floor and row["median_ms"] else None,
            "gemm_flops": flops(shapes),
        }
        for row in rows
    ]


def gemm_operands(
    shapes: Sequence[GemmShape], dtype: str, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the two factors of every product."""
    rng = np.random.default_rng(seed)
    return [
        (rng.random((m, k), np.dtype(dtype)), rng.random((k, n), np.dtype(dtype)))
        for m, k, n in shapes
    ]


def build_floor(shapes: Sequence[GemmShape], dtype: str, seed: int, library: str) -> Work:
    """Return these products, one after the other, into buffers that are there."""
    operands: list[tuple[Any, Any]] = list(gemm_operands(shapes, dtype, seed))
    multiply: Callable[..., Any] = np.matmul
    device = device_of(library)
    if device == CUDA:
        put = devices.put_ours(device)
        operands = [(put(a), put(b)) for a, b in operands]
    if library == "torch":
        multiply, operands = step_peers.torch_products(operands)
    buffers = [multiply(a, b) for a, b in operands]

    def call() -> None:
        for (a, b), out in zip(operands, buffers, strict=True):
            multiply(a, b, out=out)

    return Work(
        call,
        lambda: devices.results_of([out[:COMPARED_ROWS] for out in buffers], CPU),
        clock=devices.clock_of("cupy", device),
    )


def build_floor_reference(shapes: Sequence[GemmShape], dtype: str, seed: int) -> Work:
    """Return the same products in float64."""
    exact = tuple(
        a[:COMPARED_ROWS].astype(np.float64) @ b.astype(np.float64)
        for a, b in gemm_operands(shapes, dtype, seed)
    )
    return Work(lambda: None, lambda: exact)


# --- the list ------------------------------------------------------------------------------------


def arms_of(
    problem: Problem, unit: str, backend: str, with_peers: bool, with_compilers: bool = True
) -> list[Arm]:
    """Return ours first, then ours in other clothes, the peers, and for a step the GEMM floor.

    Without ``with_compilers`` torch.compile, which takes up to a minute to compile, is not asked.
    """
    given = {"problem": asdict(problem), "unit": unit}
    device = device_of(backend)

    def ours(name: str, backend: str, **arguments: Any) -> Arm:
        reference = "noise layer" if "noise_layer" in arguments else "reference"
        arguments = given | {"backend": backend} | arguments
        return Arm(name, f"{MODULE}:build_ours", arguments, reference, backend=backend)

    def asked(peers: list[Arm]) -> list[Arm]:
        return [arm for arm in peers if with_compilers or not arm.arguments.get("compiled")]

    # A step on a GPU by itself, and as an epoch has it.
    ways: list[tuple[str, dict[str, Any]]] = [("", {})]
    if device == CUDA and unit == "step":
        ways.insert(0, (", in an epoch", {"in_epoch": True}))
    if problem.image_shape:  # ours, PyTorch's and on a GPU JAX's: the others take minutes
        return [
            *(ours(f"nalayer {backend}{name}", backend, **how) for name, how in ways),
            *(asked(step_peers.cnn_arms(given, device)) if with_peers else ()),
        ]
    arms = [
        ours(f"nalayer {backend}{name}{top}", backend, **how, **layer)
        for top, layer in (("", {}), (", s-model on top", {"noise_layer": True}))
        for name, how in ways
    ]
    if device == CPU and backend != "numpy":
        arms.append(ours("nalayer numpy", "numpy"))
    if with_peers:
        arms += asked(step_peers.peer_arms(given, device))
        if device == CPU:
            arms.append(
                Arm(
                    "scikit-learn MLPClassifier, no dropout",
                    f"{MODULE}:build_sklearn",
                    given,
                    backend="scikit-learn",
                )
            )
    if unit == "step":
        arms += floor_arms(floor_of(problem, gemm_shapes(problem)), with_peers, device)
    return arms


def floor_of(problem: Problem, shapes: Sequence[GemmShape]) -> dict[str, Any]:
    """Return what the builders of the floor need to know of these products."""
    return {"shapes": shapes, "dtype": problem.dtype, "seed": problem.seed}


def floor_arms(floor: dict[str, Any], with_peers: bool, device: str) -> list[Arm]:
    """Return products alone, by every BLAS at hand; on a GPU by cuBLAS."""
    libraries = ["numpy"] + ["torch"] * (with_peers and is_installed("torch"))
    if device == CUDA:
        libraries = ["cupy"]
    return [
        Arm(
            f"{FLOOR}, {library}",
            f"{MODULE}:build_floor",
            floor | {"library": library},
            "floor",
            backend=library,
        )
        for library in libraries
    ]


def references(problem: Problem, device: str = CPU) -> dict[str, Arm]:
    """Return what the arms are compared with."""
    given = {"problem": asdict(problem)}
    library = "cupy" if device == CUDA else "numpy"  # whose process knows the samples already

    def reference(build: str, **arguments: Any) -> Arm:
        return Arm("", f"{MODULE}:{build}", arguments, backend=library)

    found = {"reference": reference("build_reference", **given)}
    if not problem.image_shape:
        found["noise layer"] = reference("build_reference", **given, noise_layer=True)
        floor = floor_of(problem, gemm_shapes(problem))
        found["floor"] = reference("build_floor_reference", **floor)
    return found
