"""The paper's networks with dropout and Adam in PyTorch and in JAX, as their users write them.

The libraries are imported in the workers only. What compares and times these trainers is in
:mod:`benchmarks.step_arms`, which also says what a trainer is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import devices
from benchmarks.devices import CPU, CUDA
from benchmarks.peers import is_installed
from benchmarks.timing import Arm
from benchmarks.worker import Work

if TYPE_CHECKING:
    from benchmarks.step_arms import Problem

MODULE = "benchmarks.step_peers"
BETA_1, BETA_2, STEP_SIZE = 0.9, 0.999, 1e-3  # of Adam: everyone's defaults


def _layers(problem: Problem) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return weight (n_in, n_out) and bias of every dense layer."""
    unpacked = problem.network.unpack(problem.initial_weights())
    return [(parameters[0], parameters[1]) for parameters in unpacked if parameters]


def torch_products(operands: list[tuple[Any, Any]]) -> tuple[Callable[..., Any], list]:
    """Return torch's matrix product, and the operands as tensors."""
    torch: Any = import_module("torch")
    return torch.mm, [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in operands]


class TorchTrainer:
    """``nn.Sequential`` and ``optim.Adam``; ``compiled`` puts network and loss in torch.compile."""

    def __init__(
        self,
        problem: Problem,
        compiled: bool,
        fused: bool,
        device: str = CPU,
        mode: str | None = None,
        tf32: bool = False,
    ) -> None:
        torch = devices.torch_on(device, tf32)
        torch.manual_seed(problem.seed)
        self.torch, self.device = torch, device
        x, z = problem.data()
        self.x, self.z = self.index(x), self.index(z)
        self.batch_size = problem.batch_size
        network = self._network(problem).to(device)

        def loss(x: Any, z: Any) -> Any:
            return torch.nn.functional.cross_entropy(network(x), z)

        self.loss = torch.compile(loss, mode=mode) if compiled else loss
        self.optimiser = torch.optim.Adam(
            network.parameters(), eps=problem.epsilon, fused=fused or None
        )

    def _network(self, problem: Problem) -> Any:
        torch = self.torch
        layers: list[Any] = []
        for weight, bias in _layers(problem):
            dense = torch.nn.Linear(*weight.shape)
            # A copy with torch's own layout (n_out, n_in) in memory.
            dense.weight = torch.nn.Parameter(torch.from_numpy(weight).t().contiguous())
            dense.bias = torch.nn.Parameter(torch.from_numpy(bias.copy()))
            layers += [dense, torch.nn.ReLU()]
            if problem.dropout:
                layers.append(torch.nn.Dropout(problem.dropout))
        while not isinstance(layers[-1], torch.nn.Linear):
            layers.pop()
        self.dense = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
        return torch.nn.Sequential(*layers)

    def _step(self, x: Any, z: Any) -> Any:
        self.optimiser.zero_grad()
        loss = self.loss(x, z)
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def index(self, samples: np.ndarray) -> Any:
        """Return an array as a tensor where the data are."""
        return self.torch.from_numpy(samples).to(self.device)

    def step(self, batch: Any) -> Any:
        """Take one step."""
        return self._step(self.x[batch], self.z[batch])

    def epoch(self) -> None:
        """Go through the samples once."""
        order = self.torch.randperm(len(self.x), device=self.device)
        for batch in order.split(self.batch_size):
            self._step(self.x[batch], self.z[batch])

    def parameters(self) -> np.ndarray:
        """Return the parameters in our order."""
        parts = [part for dense in self.dense for part in (dense.weight.t(), dense.bias)]
        return np.concatenate([part.detach().cpu().numpy().ravel() for part in parts])

    def wait(self) -> None:
        """Return: on the CPU torch has finished when it returns."""


class TorchCNNTrainer(TorchTrainer):
    """The CNN, with images and filters in the memory format of that name."""

    def __init__(self, problem: Problem, memory_format: str, **options: Any) -> None:
        self.memory_format = memory_format
        super().__init__(problem, **options)
        images = self.x.reshape(-1, *problem.image_shape).permute(0, 3, 1, 2)
        self.x = images.contiguous(memory_format=getattr(self.torch, memory_format))

    def _network(self, problem: Problem) -> Any:
        nn = self.torch.nn
        drops = bool(problem.dropout)
        layers: list[Any] = []
        n_channels = problem.image_shape[2]
        for n_filters, padding in ((32, 0), (64, 1)):
            layers += [nn.Conv2d(n_channels, n_filters, 3, padding=padding), nn.ReLU()]
            layers += [nn.Conv2d(n_filters, n_filters, 3), nn.ReLU(), nn.MaxPool2d(2)]
            layers += [nn.Dropout(0.25)] * drops
            n_channels = n_filters
        layers.append(nn.Flatten())
        pairs = _layers(problem)
        for weight, _ in pairs[-2:]:
            layers += [nn.Linear(*weight.shape), nn.ReLU()] + [nn.Dropout(0.5)] * drops
        layers = layers[: -1 - drops]
        self.own = [layer for layer in layers if hasattr(layer, "weight")]
        for layer, (weight, bias) in zip(self.own, pairs, strict=True):
            with self.torch.no_grad():
                layer.weight.copy_(self._theirs(layer, self.torch.from_numpy(weight)))
                layer.bias.copy_(self.torch.from_numpy(bias))
        network = nn.Sequential(*layers)
        return network.to(memory_format=getattr(self.torch, self.memory_format))

    def _theirs(self, layer: Any, weight: Any) -> Any:
        """Return our weight in torch's order: channels before rows and columns, outputs first."""
        if weight.dim() == 4:
            return weight.permute(3, 2, 0, 1)
        pixels_first = layer is self.own[-2]  # behind nn.Flatten, which puts the channels first
        return (self._turned(weight, -1, 64) if pixels_first else weight).t()

    @staticmethod
    def _turned(weight: Any, n: int, m: int) -> Any:
        """Return rows that count through n x m in the order of m x n."""
        return weight.reshape(n, m, weight.shape[1]).transpose(0, 1).reshape(weight.shape)

    def parameters(self) -> np.ndarray:
        """Return the parameters in our order."""
        found = []
        for layer in self.own:
            weight = layer.weight.detach()
            if weight.dim() == 4:
                weight = weight.permute(2, 3, 1, 0)
            else:
                weight = weight.t()
                if layer is self.own[-2]:
                    weight = self._turned(weight, 64, -1)
            found += [weight, layer.bias.detach()]
        return np.concatenate([part.cpu().numpy().ravel() for part in found])


class JaxTrainer:
    """Pure functions under ``jax.jit``; parameters and moments are donated and reused in place."""

    def __init__(self, problem: Problem, generator: str, device: str = CPU) -> None:
        jax = devices.jax_on(device)
        self.jax = jax
        x, z = problem.data()
        self.x, self.z = jax.device_put(x), jax.device_put(z.astype(np.int32))
        self.batch_size, self.n = problem.batch_size, problem.n_samples
        self.shuffling = np.random.default_rng(problem.seed)
        weights = [tuple(jax.device_put(part.copy()) for part in pair) for pair in _layers(problem)]
        zeros = jax.tree.map(jax.numpy.zeros_like, weights)
        self.state = (weights, zeros, jax.tree.map(jax.numpy.copy, zeros), jax.numpy.zeros(()))
        self.key = jax.random.key(problem.seed, impl=generator)
        make_loss = _jax_cnn_loss if problem.image_shape else _jax_loss
        loss = partial(make_loss, jax, problem)
        update = partial(_jax_update, jax, loss, problem.epsilon)
        self.update = jax.jit(update, donate_argnums=(0, 1))
        # Picking the samples belongs inside jit: outside it costs more than copying them.
        self.update_at = jax.jit(
            lambda state, key, x, z, batch: update(state, key, x[batch], z[batch]),
            donate_argnums=(0, 1),
        )
        self.batches: dict[int, tuple[Any, Any]] = {}

    def index(self, samples: np.ndarray) -> Any:
        """Return the samples' numbers on the device."""
        return self.jax.device_put(samples.astype(np.int32))

    def step(self, batch: Any) -> Any:
        """Take one step. All slices are cut out before the first: here a slice is a copy."""
        if not isinstance(batch, slice):
            self.state, self.key, loss = self.update_at(self.state, self.key, self.x, self.z, batch)
            return loss
        if not self.batches:
            size = self.batch_size
            for start in range(0, self.n, size):
                self.batches[start] = self.x[start : start + size], self.z[start : start + size]
        self.state, self.key, loss = self.update(self.state, self.key, *self.batches[batch.start])
        return loss

    def epoch(self) -> Any:
        """Go through the samples once."""
        order = self.shuffling.permutation(self.n).astype(np.int32)
        for start in range(0, self.n, self.batch_size):
            batch = order[start : start + self.batch_size]
            self.state, self.key, _ = self.update_at(self.state, self.key, self.x, self.z, batch)
        return self.state

    def parameters(self) -> np.ndarray:
        """Return the parameters in our order."""
        self.wait()
        return np.concatenate([np.asarray(part).ravel() for pair in self.state[0] for part in pair])

    def wait(self) -> None:
        """Return once the parameters are there."""
        self.jax.block_until_ready(self.state)


def _jax_dropped(jax: Any, rate: float, key: Any, x: Any) -> tuple[Any, Any]:
    """Return the next key, and x with dropout."""
    key, drawn = jax.random.split(key)
    kept = jax.random.bernoulli(drawn, 1 - rate, x.shape)
    return key, jax.numpy.where(kept, x / (1 - rate), 0)


def _jax_dense(jax: Any, dropout: float, weights: Any, key: Any, x: Any, z: Any) -> Any:
    """Return the loss of dense layers."""
    for weight, bias in weights[:-1]:
        x = jax.nn.relu(x @ weight + bias)
        if dropout:
            key, x = _jax_dropped(jax, dropout, key, x)
    weight, bias = weights[-1]
    log_q = jax.nn.log_softmax(x @ weight + bias)
    return -jax.numpy.take_along_axis(log_q, z[:, None], 1).mean()


def _jax_loss(jax: Any, problem: Problem, weights: Any, key: Any, x: Any, z: Any) -> Any:
    return _jax_dense(jax, problem.dropout, weights, key, x, z)


def _jax_cnn_loss(jax: Any, problem: Problem, weights: Any, key: Any, x: Any, z: Any) -> Any:
    """Return the loss of the CNN; images are (rows, columns, channels), as ours."""
    lax, drops = jax.lax, problem.dropout > 0
    x = x.reshape(-1, *problem.image_shape)
    layers = (("VALID", False), ("VALID", True), ("SAME", False), ("VALID", True))
    for (weight, bias), (padding, pools) in zip(weights[:4], layers, strict=True):
        order = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, weight, (1, 1), padding, dimension_numbers=order)
        x = jax.nn.relu(x + bias)
        if pools:
            window = (1, 2, 2, 1)
            x = lax.reduce_window(x, -np.inf, lax.max, window, window, "VALID")
            if drops:
                key, x = _jax_dropped(jax, 0.25, key, x)
    return _jax_dense(jax, 0.5 if drops else 0.0, weights[4:], key, x.reshape(len(x), -1), z)


def _jax_update(
    jax: Any, loss_of: Callable[..., Any], epsilon: float, state: Any, key: Any, x: Any, z: Any
) -> tuple[Any, Any, Any]:
    """Return the state and the key after one step of Adam, and the loss before it."""
    weights, mean, square, n_steps = state
    key, drawn = jax.random.split(key)
    loss, gradient = jax.value_and_grad(loss_of)(weights, drawn, x, z)
    n_steps = n_steps + 1
    mean = jax.tree.map(lambda m, g: BETA_1 * m + (1 - BETA_1) * g, mean, gradient)
    square = jax.tree.map(lambda v, g: BETA_2 * v + (1 - BETA_2) * g * g, square, gradient)

    def moved(w: Any, m: Any, v: Any) -> Any:
        root = jax.numpy.sqrt(v / (1 - BETA_2**n_steps))
        return w - STEP_SIZE * m / (1 - BETA_1**n_steps) / (root + epsilon)

    return (jax.tree.map(moved, weights, mean, square), mean, square, n_steps), key, loss


def build_torch(problem: dict[str, Any], unit: str, device: str = CPU, **options: Any) -> Work:
    """Return PyTorch's arm."""
    return _work("torch", TorchTrainer, problem, unit, device, options)


def build_torch_cnn(problem: dict[str, Any], unit: str, device: str = CPU, **options: Any) -> Work:
    """Return PyTorch's arm of the CNN."""
    return _work("torch", TorchCNNTrainer, problem, unit, device, options)


def build_jax(problem: dict[str, Any], unit: str, device: str = CPU, **options: Any) -> Work:
    """Return JAX's arm of either network."""
    return _work("jax", JaxTrainer, problem, unit, device, options)


def _work(
    library: str,
    trainer: Callable[..., Any],
    problem: dict[str, Any],
    unit: str,
    device: str,
    options: dict[str, Any],
) -> Work:
    from benchmarks import step_arms

    return step_arms.work_of(
        partial(trainer, device=device, **options),
        step_arms.Problem(**problem),
        unit,
        clock=devices.clock_of(library, device),
    )


def _arm(given: dict[str, Any], name: str, library: str, build: str, **arguments: Any) -> Arm:
    if not is_installed(library):
        return Arm(name, skip="missing", detail=f"{library} is not installed", backend=library)
    process = "torch.compile" if arguments.get("compiled") else library
    return Arm(
        name,
        f"{MODULE}:{build}",
        given | arguments,
        slack=_slack(given, arguments),
        backend=library,
        process="torch with TF32" if arguments.get("tf32") else process,
    )


def _slack(given: dict[str, Any], arguments: dict[str, Any]) -> float:
    """Return how much further than by float32's rounding an arm on a GPU may be off.

    cuDNN may choose transforms for a convolution that round more, and TF32 has 13 bits less.
    """
    if arguments.get("tf32"):
        return 500.0
    on_gpu = arguments.get("device") == CUDA
    return 10.0 if on_gpu and given["problem"]["image_shape"] else 1.0


def cnn_arms(given: dict[str, Any], device: str = CPU) -> list[Arm]:
    """Return PyTorch's arms of the CNN: its default order of the numbers, and the faster one.

    On a GPU also JAX's, and PyTorch as it comes: with convolutions in TF32.
    """

    def arm(name: str, memory_format: str, compiled: bool = False, **more: Any) -> Arm:
        options = {"compiled": compiled, "fused": True, "memory_format": memory_format} | more
        return _arm(given, name, "torch", "build_torch_cnn", device=device, **options)

    arms = [
        arm("torch, fused Adam", "contiguous_format"),
        arm("torch channels_last, fused Adam", "channels_last"),
        arm("torch.compile, fused Adam", "contiguous_format", compiled=True),
    ]
    if device == CPU:
        name = "torch.compile channels_last, fused Adam"
        return [*arms, arm(name, "channels_last", compiled=True)]
    return [
        *arms,
        _arm(given, "jax.jit", "jax", "build_jax", device=device, generator="threefry2x32"),
        arm("torch channels_last, fused Adam, TF32", "channels_last", tf32=True),
    ]


def peer_arms(given: dict[str, Any], device: str = CPU) -> list[Arm]:
    """Return every peer of the MLP, those that are missing included.

    JAX draws its masks with its default generator, and with the faster one that it offers.
    """

    def arm(name: str, library: str, build: str, **arguments: Any) -> Arm:
        return _arm(given, name, library, build, device=device, **arguments)

    def compiled(name: str, **mode: Any) -> Arm:
        return arm(name, "torch", "build_torch", compiled=True, fused=True, **mode)

    graphs = compiled("torch.compile reduce-overhead, fused Adam", mode="reduce-overhead")
    return [
        arm("torch", "torch", "build_torch", compiled=False, fused=False),
        arm("torch, fused Adam", "torch", "build_torch", compiled=False, fused=True),
        compiled("torch.compile, fused Adam"),
        *([graphs] if device == CUDA else ()),
        arm("jax.jit", "jax", "build_jax", generator="threefry2x32"),
        arm("jax.jit, rbg generator", "jax", "build_jax", generator="rbg"),
    ]
