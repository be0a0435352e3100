"""What the studies of the noise layer share: a grid of cells, its table and its picture.

A study trains the s-model many times and changes one thing: where theta starts, how fast it moves,
what kind of noise there is. Its cells are those of ``accuracy``, kept and resumed in the same way.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import nalayer
from benchmarks import accuracy, records
from benchmarks.cells import Cell
from benchmarks.methods import Task, cell_of, hidden_layers
from benchmarks.records import Row
from benchmarks.summaries import bootstrap_interval
from nalayer import stream
from nalayer.datasets import load_dataset

DATASETS = ("digits", "mnist")  # ten classes, of which the kinds of noise speak


def add_arguments(parser: argparse.ArgumentParser, noise: Sequence[float], out: str) -> None:
    """Declare what all studies can be told."""

    def option(name: str, help: str, **details: Any) -> None:
        parser.add_argument(name, help=help, **details)

    option("--dataset", "data to learn from", choices=DATASETS, default="digits")
    option("--noise", "shares of changed labels", nargs="+", type=float, default=list(noise))
    option("--fractions", "shares of the training data", nargs="+", type=float, default=[1.0])
    option("--seeds", "run seeds 0 to N-1", type=int, default=5, metavar="N")
    option("--epochs", "at most so many (None: the data set's protocol)", type=int)
    option(
        "--patience", "epochs without improvement before stopping", type=int,
        default=accuracy.PATIENCE,
    )  # fmt: skip
    option("--inner-epochs", "epochs of EM's network M-step", type=int, default=5, metavar="S")
    option("--picture", "draw the study here (.png or .svg)", type=Path, metavar="FILE")
    accuracy.add_run_options(parser, out)


def cell(options: argparse.Namespace, method: str, **settings: Any) -> Cell:
    """Return a cell of this study: the options, and what the study sets itself."""
    protocol = accuracy.PROTOCOLS[options.dataset]
    given: dict[str, Any] = {
        "dataset": options.dataset,
        "network": "mlp",
        "method": method,
        "noise_kind": "permutation",
        "epochs": protocol["epochs"] if options.epochs is None else options.epochs,
        "patience": options.patience,
        "batch_size": protocol["batch_size"],
        "dtype": options.dtype,
        "backend": options.backend,
        "threads": options.threads,
        "inner_epochs": options.inner_epochs,
    }
    return cell_of(Cell(**given | settings), method)


def product(options: argparse.Namespace, **others: Iterable[Any]) -> Iterable[dict[str, Any]]:
    """Yield the settings of every combination: seeds, noise, fractions and what the study adds."""
    axes: dict[str, Iterable[Any]] = {
        **others,
        "fraction": options.fractions,
        "noise": options.noise,
        "seed": range(options.seeds),
    }
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def run(
    name: str,
    cells: list[Cell],
    options: argparse.Namespace,
    parser: argparse.ArgumentParser,
    lines_of: Callable[[list[Row]], list[str]],
    draw: Callable[[list[Row], Path], None],
) -> int:
    """Check the options, run the cells, print the study's table and draw its picture."""
    accuracy.check_numbers(options, parser, () if options.epochs is None else ("epochs",))
    cells = list(dict.fromkeys(cells))
    try:
        data = load_dataset(options.dataset, np.dtype(options.dtype))
        for noise, kind in {(c.noise, c.noise_kind) for c in cells}:
            nalayer.make_noise_matrix(kind, data.n_classes, noise, stream(0, "label noise"))
        for network in {c.network for c in cells}:
            hidden_layers(network, options.dataset)
        for one in {c.fraction: c for c in cells}.values():
            Task(one)
        for path in (options.json, options.picture):
            if path:
                records.require_writable(path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rows, status = accuracy.run_cells(cells, options, parser, name)
    if rows:
        print("\n" + "\n".join(lines_of(rows)))
        if options.picture:
            draw(rows, options.picture)
            print(f"\nPicture: {options.picture}")
    return status


def values_of(rows: list[Row], key: str, **settings: Any) -> list[float]:
    """Return a figure of all rows with these settings that have it."""
    return [
        row[key]
        for row in rows
        if row.get(key) is not None and all(row.get(k) == v for k, v in settings.items())
    ]


def interval(values: list[float]) -> str:
    """Return a mean with its 95 % bootstrap interval."""
    if not values:
        return "-"
    low, high = bootstrap_interval(values)
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"


def table(heads: list[str], lines: Iterable[list[str]]) -> list[str]:
    """Return a table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return ["| " + " | ".join(row) + " |" for row in rows]


def curve(axes: Axes, places: Sequence[float], groups: list[list[float]], **style: Any) -> None:
    """Draw means with their bootstrap intervals; places without values are left out."""
    kept = [(place, group) for place, group in zip(places, groups, strict=True) if group]
    if not kept:
        return
    means = np.array([np.mean(group) for _, group in kept])
    intervals = np.array([bootstrap_interval(group) for _, group in kept])
    spread = np.maximum([means - intervals[:, 0], intervals[:, 1] - means], 0)
    axes.errorbar([place for place, _ in kept], means, yerr=spread, capsize=2, **style)
    axes.grid(alpha=0.3)


def save(figure: Figure, path: Path) -> None:
    """Write a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def seeds_in(rows: list[Row]) -> str:
    """Return how many seeds there are, in words."""
    n = len({row["seed"] for row in rows})
    return f"{n} seed{'s' * (n > 1)}"
