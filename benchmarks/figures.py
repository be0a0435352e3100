"""Draw the figures from results files; nothing is measured here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import MaxNLocator

from benchmarks import records
from benchmarks.records import Row

SUFFIXES = (".png", ".svg", ".pdf")

# Okabe & Ito's colours can be told apart by everyone; dashes say the same without colour.
STYLES: dict[str, dict[str, Any]] = {
    "s-model, joint": {"color": "#0072B2", "linestyle": "-"},
    "s-model, EM": {"color": "#D55E00", "linestyle": "--"},
    "s-model, damped EM": {"color": "#009E73", "linestyle": "-."},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("results", type=Path, help="JSON Lines of `equivalence`")
    parser.add_argument("picture", type=Path, help="file to write, .png or .svg")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Draw one file's figure."""
    if options.picture.suffix not in SUFFIXES:
        parser.error(f"picture must end in one of {SUFFIXES}; found {options.picture}")
    try:
        rows = records.read_rows(options.results)
        records.require_writable(options.picture)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    drawn = {row.get("curve") for row in rows} & {row.get("matrix") for row in rows}
    if not drawn >= STYLES.keys():
        parser.error(
            f"{options.results} holds no curves of {', '.join(STYLES)}: not a complete run"
        )
    draw_equivalence(rows, options.picture)
    print(f"Picture: {options.picture}")
    return 0


def draw_equivalence(rows: list[Row], path: Path) -> None:
    """Draw the four panels of ``python -m benchmarks equivalence`` for its first seed."""
    curves = {
        method: [row for row in rows if row.get("curve") == method]
        for method in STYLES
        if any(row.get("curve") == method for row in rows)
    }
    figure = plt.figure(figsize=(11, 8.2), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    _likelihood_panel(figure.add_subplot(grid[0, 0]), curves, "epoch")
    _likelihood_panel(figure.add_subplot(grid[0, 1]), curves, "gradients")
    _matrix_panel(figure, grid[1, 0], rows)
    _ledger_panel(figure, grid[1, 1], curves)
    first = next(row for row in rows if "test_accuracy" in row)
    figure.suptitle(
        f"Joint noise layer and EM climb the same likelihood ({first['dataset']}, "
        f"{first['noise']:.0%} {first['noise_kind']} noise, seed {first['seed']})"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _likelihood_panel(axes: Axes, curves: dict[str, list[Row]], against: str) -> None:
    for method, rows in curves.items():
        axes.plot(
            [row[against] for row in rows],
            [row["log_likelihood"] for row in rows],
            label=method,
            **STYLES[method],
        )
    axes.set_xlabel("epoch (joint) or round (EM)" if against == "epoch" else "mini-batch gradients")
    axes.set_ylabel("training log-likelihood, nats per sample")
    axes.set_title(
        "Same start, same function, different ways up"
        if against == "epoch"
        else "The same against the work done"
    )
    axes.grid(alpha=0.3)
    if against == "epoch":
        axes.legend(loc="lower right")


def _matrix_panel(figure: Figure, place: SubplotSpec, rows: list[Row]) -> None:
    wanted = {"true": "true noise matrix", "s-model, joint": "joint", "s-model, EM": "EM"}
    matrices = {row["matrix"]: row["theta"] for row in rows if row.get("matrix") in wanted}
    parts = place.subgridspec(1, len(wanted))
    shown = []
    for column, (name, title) in enumerate(wanted.items()):
        axes = figure.add_subplot(parts[0, column])
        shown.append(axes)
        k = int(np.sqrt(len(matrices[name])))
        image = axes.imshow(np.reshape(matrices[name], (k, k)), vmin=0, vmax=1, cmap="viridis")
        axes.set_title(title)
        axes.set_xlabel("observed class")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        if column == 0:
            axes.set_ylabel("true class")
    figure.colorbar(image, ax=shown, location="bottom", label="p(observed | true)", shrink=0.6)


def _ledger_panel(figure: Figure, place: SubplotSpec, curves: dict[str, list[Row]]) -> None:
    methods = [method for method in ("s-model, joint", "s-model, EM") if method in curves]
    parts = place.subgridspec(len(methods), 1)
    for index, method in enumerate(methods):
        axes = figure.add_subplot(parts[index, 0])
        rows = curves[method][1:]
        epochs = [0] + [row["epoch"] for row in rows]
        gain, expected, divergence = (
            np.concatenate([[0.0], np.cumsum([row[part] for row in rows])])
            for part in ("gain", "expected", "divergence")
        )
        axes.plot(epochs, divergence, color="#CC79A7", linestyle=":", label="sum of KL(c || c+)")
        axes.plot(epochs, expected, color="#E69F00", linestyle="--", label="gain in Q")
        axes.plot(epochs, gain, color="black", label="gain in L")
        axes.plot(
            epochs, expected + divergence, "x", color="black", markersize=4, label="their sum"
        )
        axes.set_title(f"Ledger of {method.removeprefix('s-model, ')}: dL = dQ + KL", fontsize=10)
        axes.set_ylabel("nats per sample", fontsize=8)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("epoch (joint) or round (EM), summed from the start")
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.38))
