"""What the noise layer does to gradients: of mislabelled samples, of layers, of L beside Q.

On digits with noisy labels. The gradient of a sample's loss for its logits is q - 1_z without a
noise layer and q - c with one, c the posterior of the true class. The study follows both through
training, for samples whose label is right and for those whose label is not. Clean labels are used
to tell the two kinds apart, and for nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from threadpoolctl import threadpool_limits

import em_baseline
import kernels
import nalayer
from benchmarks import records, studies
from benchmarks.methods import HIDDEN_SIZES
from benchmarks.records import Row
from em_baseline import ExpectedModel, statements
from nalayer import PlainModel, SModel, stream
from nalayer.datasets import Dataset, load_dataset, validation_split
from nalayer.gradient_check import complex_step_derivative, fourth_order_difference
from nalayer.label_noise import KINDS
from nalayer.training import minibatches

BATCH_SIZE = 64
N_BATCHES = 20  # whose gradients give a layer's signal and noise
N_INNER = 60  # gradient steps of one M-step
STEPS = tuple(10.0**-power for power in range(1, 16))
N_DIRECTIONS = 8
MODELS = ("baseline", "s-model")
KINDS_OF_SAMPLE = ("clean", "corrupted")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--noise", type=float, default=0.4, help="share of changed labels")
    parser.add_argument("--noise-kind", choices=KINDS, default="permutation", help="where they go")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="run seeds 0 to N-1")
    parser.add_argument("--epochs", type=int, default=60, help="of each training")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the study here")


class Setting:
    """A seed's data and networks."""

    def __init__(self, options: argparse.Namespace, data: Dataset, seed: int) -> None:
        self.options, self.seed = options, seed
        noise_stream = stream(seed, "label noise")
        self.theta = nalayer.make_noise_matrix(
            options.noise_kind, data.n_classes, options.noise, noise_stream
        )
        z = nalayer.corrupt_labels(data.labels_train, self.theta, noise_stream)
        kept, held_out = validation_split(z.size, z, 0.1, stream(seed, "split"))
        self.x, self.z, self.true = data.x_train[kept], z[kept], data.labels_train[kept]
        self.validation = data.x_train[held_out], z[held_out]
        self.is_clean = self.z == self.true
        self.network = nalayer.mlp(self.x.shape[1], HIDDEN_SIZES["digits"], data.n_classes, 0.5)
        self.plain, self.model = PlainModel(self.network), SModel(self.network)

    def train(self, model: PlainModel | SModel, start: np.ndarray) -> list[np.ndarray]:
        """Return the parameters at the start and after every epoch."""
        kept: list[np.ndarray] = []
        nalayer.train(
            model,
            start,
            self.x,
            self.z,
            shuffling=stream(self.seed, "shuffling"),
            dropout=stream(self.seed, "dropout"),
            validation=self.validation,
            n_epochs=self.options.epochs,
            patience=None,
            batch_size=BATCH_SIZE,
            with_loss=False,
            on_epoch=lambda epoch, parameters: kept.append(parameters.copy()),
        )
        return kept

    def s_start(self, weights: np.ndarray) -> np.ndarray:
        """Return the s-model on a trained network, from its confusion matrix."""
        q = np.exp(kernels.log_softmax(self.network.logits(weights, self.x)))
        return self.model.pack(weights, nalayer.confusion_start(q, self.z))


def output_gradients(setting: Setting, name: str, parameters: np.ndarray) -> np.ndarray:
    """Return each sample's own gradient for its logits, q - 1_z or q - c: (n, K)."""
    weights = parameters[: setting.network.n_weights]
    logits = setting.network.logits(weights, setting.x)
    q = np.exp(kernels.log_softmax(logits))
    if name == "baseline":
        return q - np.eye(q.shape[1])[setting.z]
    channel = setting.model.unpack(parameters)[1]
    return q - kernels.s_model_posterior(logits, channel, setting.z).posterior


def sample_rows(setting: Setting, name: str, epoch: int, parameters: np.ndarray) -> Iterator[Row]:
    """Yield size and direction of the samples' gradients, clean and corrupted ones apart.

    ``to_true`` is the share whose steepest descent raises the true class most, ``to_label`` the
    one whose label; ``cosine`` is with the gradient q - 1_y that the true label would give.
    """
    gradient = output_gradients(setting, name, parameters)
    weights = parameters[: setting.network.n_weights]
    q = np.exp(kernels.log_softmax(setting.network.logits(weights, setting.x)))
    ideal = q - np.eye(q.shape[1])[setting.true]
    size = np.linalg.norm(gradient, axis=1)
    product = (gradient * ideal).sum(axis=1)
    scale = size * np.linalg.norm(ideal, axis=1)
    cosine = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
    raised = (-gradient).argmax(axis=1)
    for kind in KINDS_OF_SAMPLE:
        chosen = setting.is_clean if kind == "clean" else ~setting.is_clean
        yield {
            "study": "samples",
            "model": name,
            "epoch": epoch,
            "samples": kind,
            "n": int(chosen.sum()),
            "norm": float(size[chosen].mean()),
            "cosine": float(cosine[chosen].mean()),
            "to_true": float((raised == setting.true)[chosen].mean()),
            "to_label": float((raised == setting.z)[chosen].mean()),
        }


def layer_rows(setting: Setting, name: str, epoch: int, parameters: np.ndarray) -> Iterator[Row]:
    """Yield each layer's gradient: norm of the mean, and signal to noise over mini-batches.

    Signal to noise is the squared norm of the mean of the batches' gradients over the sum of their
    variances; without dropout.
    """
    model = setting.plain if name == "baseline" else setting.model
    batches = minibatches(setting.z.size, BATCH_SIZE, stream(setting.seed, "directions"))
    found = np.array(
        [
            model.loss_and_gradient(parameters, setting.x[b], setting.z[b])[1]
            for b in batches[:N_BATCHES]
        ]
    )
    layers = {
        f"layer {number}": [part.ravel() for part in parts]
        for number, parts in enumerate(_positions(setting.network), start=1)
    }
    if name != "baseline":
        layers["noise layer"] = [np.arange(setting.network.n_weights, parameters.size)]
    for layer, places in layers.items():
        gradients = found[:, np.concatenate(places)]
        signal = float((gradients.mean(axis=0) ** 2).sum())
        noise = float(gradients.var(axis=0, ddof=1).sum())
        yield {
            "study": "layers",
            "model": name,
            "epoch": epoch,
            "layer": layer,
            "norm": float(np.sqrt(signal)),
            "signal_to_noise": signal / noise if noise > 0 else None,
        }


def _positions(network: nalayer.Network) -> list[tuple[np.ndarray, ...]]:
    """Return where in the flat vector each layer's weights and biases are."""
    places = np.arange(network.n_weights, dtype=np.float64)
    return [
        tuple(part.astype(np.int64) for part in layer) for layer in network.unpack(places) if layer
    ]


def inner_rows(setting: Setting, parameters: np.ndarray) -> Iterator[Row]:
    """Yield the cosine of the gradients of L and of Q along the inner steps of one M-step.

    Full-batch gradient steps on Q with the posterior of the first point, for all parameters; at
    step 0 the two gradients are one (V3).
    """
    model, expected = setting.model, ExpectedModel(setting.model)
    outputs, _ = model.forward(parameters[: setting.network.n_weights], setting.x)
    channel = model.unpack(parameters)[1:]
    data = em_baseline.Completed(
        setting.z, em_baseline.e_step(model, outputs, channel, setting.z).posterior
    )
    at, adam = parameters.copy(), nalayer.Adam()
    state = adam.initial_state(at)
    for number in range(N_INNER + 1):
        loss, d_joint = model.loss_and_gradient(at, setting.x, setting.z)
        _, d_expected = expected.loss_and_gradient(at, setting.x, data)
        scale = np.linalg.norm(d_joint) * np.linalg.norm(d_expected)
        yield {
            "study": "inner steps",
            "step": number,
            "cosine": float(d_joint @ d_expected / scale),
            "log_likelihood": -float(loss),
        }
        adam.update(at, d_expected, state)


def check_rows(setting: Setting, parameters: np.ndarray) -> Iterator[Row]:
    """Yield the error of measured derivatives against the step they were measured with."""
    x, z, model = setting.x[:200], setting.z[:200], setting.model
    _, gradient = model.loss_and_gradient(parameters, x, z)

    def loss(at: np.ndarray) -> float:
        return model.loss(at, x, z)

    def literal(at: np.ndarray) -> complex:
        return -np.log(statements.Literal.of(model, at, x, z).m).sum() / z.size

    def second_order(function, at, direction, step):
        return (function(at + step * direction) - function(at - step * direction)) / (2 * step)

    # Behind the last ReLU the loss is smooth; through the whole network a step crosses kinks.
    behind = np.zeros(parameters.size)
    behind[np.concatenate([part.ravel() for part in _positions(setting.network)[-1]])] = 1
    behind[setting.network.n_weights :] = 1
    rng = stream(setting.seed, "directions")
    everywhere = rng.normal(size=(N_DIRECTIONS, parameters.size))
    measures = {
        "central, second order": (second_order, loss, everywhere * behind),
        "central, fourth order": (fourth_order_difference, loss, everywhere * behind),
        "fourth order, through ReLUs": (fourth_order_difference, loss, everywhere),
        "complex step, through ReLUs": (complex_step_derivative, literal, everywhere),
    }
    for name, (measure, function, directions) in measures.items():
        directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        size = np.abs(directions @ gradient).max()
        for step in STEPS:
            errors = [measure(function, parameters, d, step) - d @ gradient for d in directions]
            yield {
                "study": "gradient check",
                "method": name,
                "step": step,
                "error": float(np.abs(errors).max() / size),
            }


def rows_of(setting: Setting) -> Iterator[Row]:
    """Yield everything of one seed."""
    fresh = setting.network.initial_weights(stream(setting.seed, "initialisation"))
    baseline = setting.train(setting.plain, fresh)
    # The same network at the same age with a noise layer: from the baseline's last epoch on
    joint = setting.train(setting.model, setting.s_start(baseline[-1]))
    for name, trace in zip(MODELS, (baseline, joint), strict=True):
        for epoch, parameters in enumerate(trace):
            yield from sample_rows(setting, name, epoch, parameters)
            yield from layer_rows(setting, name, epoch, parameters)
    yield from inner_rows(setting, joint[0])
    if setting.seed == 0:
        yield from check_rows(setting, joint[-1])


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the study."""
    if options.seeds < 1 or options.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")
    data = load_dataset("digits")
    try:
        nalayer.make_noise_matrix(
            options.noise_kind, data.n_classes, options.noise, stream(0, "label noise")
        )
        for path in (options.json, options.picture):
            if path:
                records.require_writable(path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    base = records.provenance(
        "gradients", options.command, kernels.api.DEFAULT_BACKEND, kernels.thread_count(), 1
    )
    base |= {"dataset": "digits", "noise": options.noise, "noise_kind": options.noise_kind}
    rows: list[Row] = []
    with threadpool_limits(1, user_api="blas"):
        for seed in range(options.seeds):
            found = rows_of(Setting(options, data, seed))
            rows += [base | {"seed": seed} | row for row in found]
            if options.json:
                records.write_rows(options.json, rows)
    print("\n".join(lines(rows)))
    if options.picture:
        draw(rows, options.picture)
        print(f"\nPicture: {options.picture}")
    return 0


# --- what is shown ---------------------------------------------------------------------------


def lines(rows: list[Row]) -> list[str]:
    """Return the tables: samples at the first and last epoch, layers at the last, inner steps."""
    last = max(row["epoch"] for row in rows if row["study"] == "samples")
    found = ["Gradients of samples for their logits, mean and 95 % interval over seeds", ""]
    body = []
    for name in MODELS:
        for epoch in (0, 1, last):
            for kind in KINDS_OF_SAMPLE:
                at = {"study": "samples", "model": name, "epoch": epoch, "samples": kind}
                keys = ("norm", "cosine", "to_true", "to_label")
                entries = [studies.interval(studies.values_of(rows, key, **at)) for key in keys]
                body.append([name, str(epoch), kind, *entries])
    heads = ["model", "epoch", "samples", "norm", "cosine with the true label's",
             "raise the true class most", "raise the label most"]  # fmt: skip
    found += [*studies.table(heads, body), "", "Layers at the last epoch", ""]
    body = []
    for name in MODELS:
        of_model = [r for r in rows if r["study"] == "layers" and r["model"] == name]
        for layer in dict.fromkeys(row["layer"] for row in of_model):
            entries = [
                studies.interval(studies.values_of(of_model, key, layer=layer, epoch=last))
                for key in ("norm", "signal_to_noise")
            ]
            body.append([name, layer, *entries])
    found += [*studies.table(["model", "layer", "norm", "signal / noise"], body), ""]
    found += ["Cosine of the gradients of L and Q along the steps of one M-step", ""]
    body = [
        [str(step), studies.interval(studies.values_of(rows, "cosine", step=step))]
        for step in (0, 1, 2, 5, 10, 20, N_INNER)
    ]
    return found + studies.table(["step", "cosine"], body)


COLOURS = {"baseline": "black", "s-model": "#0072B2"}


def draw(rows: list[Row], path: Path) -> None:
    """Draw size and direction through training, the inner steps, and the V of gradient checks."""
    figure, grid = plt.subplots(2, 3, figsize=(16, 8.6), layout="constrained")
    _through_training(grid[0, 0], rows, "norm", "norm of a sample's gradient")
    _through_training(grid[0, 1], rows, "cosine", "cosine with the true label's gradient")
    _through_training(grid[0, 2], rows, "to_true", "share that raise the true class most")
    _layers(grid[1, 0], rows)
    inner = [row for row in rows if row["study"] == "inner steps"]
    steps = sorted({row["step"] for row in inner})
    groups = [studies.values_of(inner, "cosine", step=step) for step in steps]
    studies.curve(grid[1, 1], steps, groups, color="#009E73")
    grid[1, 1].set_xlabel("gradient step of one M-step")
    grid[1, 1].set_ylabel("cosine of the gradients of L and Q")
    _gradient_check(grid[1, 2], rows)
    first = rows[0]
    figure.suptitle(
        f"What the noise layer does to gradients: digits, {first['noise']:.0%} "
        f"{first['noise_kind']} noise, {studies.seeds_in(rows)}"
    )
    studies.save(figure, path)


def _through_training(axes: Axes, rows: list[Row], key: str, words: str) -> None:
    samples = [row for row in rows if row["study"] == "samples"]
    n_epochs = max(row["epoch"] for row in samples)
    for name in MODELS:
        shift = 0 if name == "baseline" else n_epochs
        for kind, style in zip(KINDS_OF_SAMPLE, ("-", "--"), strict=True):
            means = [
                np.mean(studies.values_of(samples, key, model=name, samples=kind, epoch=epoch))
                for epoch in range(n_epochs + 1)
            ]
            axes.plot(
                np.arange(n_epochs + 1) + shift,
                means,
                color=COLOURS[name],
                linestyle=style,
                label=f"{name}, {kind}",
            )
    axes.axvline(n_epochs, color="grey", linewidth=0.8)
    axes.set_xlabel("epoch; the noise layer is put on at the line")
    axes.set_ylabel(words)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _layers(axes: Axes, rows: list[Row]) -> None:
    of_layers = [row for row in rows if row["study"] == "layers"]
    n_epochs = max(row["epoch"] for row in of_layers)
    layers = list(dict.fromkeys(row["layer"] for row in of_layers))
    for layer, colour in zip(layers, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False):
        for name in MODELS:
            shift = 0 if name == "baseline" else n_epochs
            groups = [
                studies.values_of(of_layers, "signal_to_noise", layer=layer, model=name, epoch=e)
                for e in range(n_epochs + 1)
            ]
            places = [e + shift for e, group in enumerate(groups) if group]
            means = [np.mean(group) for group in groups if group]
            label = layer if name == MODELS[1] else None
            axes.plot(places, means, color=colour, label=label)
    axes.axvline(n_epochs, color="grey", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("epoch; the noise layer is put on at the line")
    axes.set_ylabel("gradient's signal to noise, by layer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _gradient_check(axes: Axes, rows: list[Row]) -> None:
    checks = [row for row in rows if row["study"] == "gradient check"]
    styles = {
        "central, second order": "o-",
        "central, fourth order": "s-",
        "fourth order, through ReLUs": "s:",
        "complex step, through ReLUs": "^:",
    }
    for method, style in styles.items():
        found = [row for row in checks if row["method"] == method]
        tiny = np.finfo(np.float64).eps / 10
        errors = [max(row["error"], tiny) for row in found]
        axes.plot([row["step"] for row in found], errors, style, label=method)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("step h")
    axes.set_ylabel("relative error of the measured derivative")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
