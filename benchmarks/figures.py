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

from benchmarks import accuracy_figures, records, summaries
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
    parser.add_argument(
        "results", type=Path, help="JSON Lines of `accuracy`, `equivalence` or `kernels`"
    )
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
    if rows and all(row.get("benchmark") == "accuracy" for row in rows):
        for key in ("dataset", "network", "noise_kind"):
            if len(found := {row[key] for row in rows}) > 1:
                parser.error(f"{options.results} must hold one {key}; found {sorted(found)}")
        accuracy_figures.draw_accuracy(rows, options.picture)
        print(f"Picture: {options.picture}")
        beside = options.picture.with_stem(options.picture.stem + "-theta")
        if accuracy_figures.draw_matrices(rows, beside):
            print(f"Picture: {beside}")
        print("\n".join(summaries.summary_table(rows)))
        return 0
    if any(row.get("kernel") for row in rows):
        draw_kernels(rows, options.picture)
        print(f"Picture: {options.picture}")
        return 0
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


# By library: colour, marker. The best form of each is drawn.
LIBRARIES: dict[str, tuple[str, str, str]] = {
    "nalayer": ("black", "o", "nalayer"),
    "nalayer, dense": ("#999999", "s", "nalayer, dense"),
    "torch": ("#D55E00", "^", "PyTorch, best eager form"),
    "torch.compile": ("#CC79A7", "v", "torch.compile, best form"),
    "jax.jit": ("#0072B2", "D", "jax.jit, best form"),
}


def _library(row: Row) -> str:
    """Return under which heading of :data:`LIBRARIES` an arm is drawn; nothing for none."""
    if row["ours"]:
        return "nalayer"
    if row["arm"] == "nalayer, dense":
        return row["arm"]
    name = str(row["arm"]).partition(",")[0]
    return name if name in LIBRARIES and name != "nalayer" else ""


def draw_kernels(rows: list[Row], path: Path) -> None:
    """Draw, for each kernel and dtype, every library's time in ours, size by size."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("kernel"):
            panels.setdefault((row["kernel"], row["dtype"]), []).append(row)
    columns = min(3, len(panels))
    figure, grid = plt.subplots(
        -(-len(panels) // columns),
        columns,
        squeeze=False,
        figsize=(1 + 4 * columns, 4 * -(-len(panels) // columns)),
        layout="constrained",
    )
    for axes in grid.flat:
        axes.set_visible(False)
    for axes, ((kernel, dtype), found) in zip(grid.flat, panels.items(), strict=False):
        axes.set_visible(True)
        _ratio_panel(axes, found)
        axes.set_title(f"{kernel}, {dtype}")
    figure.supylabel("time / our time (median, 10-90 %)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _ratio_panel(axes: Axes, rows: list[Row]) -> None:
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    for library, (colour, marker, label) in LIBRARIES.items():
        best: dict[str, Row] = {}
        for row in rows:
            if _library(row) == library and row["ratio_to_us"] is not None:
                other = best.get(row["size"])
                if other is None or row["ratio_to_us"] < other["ratio_to_us"]:
                    best[row["size"]] = row
        if not best:
            continue
        ratio, low, high = (
            np.array([row[key] for row in best.values()])
            for key in ("ratio_to_us", "ratio_to_us_low", "ratio_to_us_high")
        )
        # The median of few rounds may lie outside their percentiles by a rounding.
        spread = np.maximum([ratio - low, high - ratio], 0)
        places = [sizes.index(size) for size in best]
        style = {"color": colour, "marker": marker, "capsize": 2, "linewidth": 1}
        axes.errorbar(places, ratio, yerr=spread, label=label, **style)  # type: ignore[arg-type]
    axes.set_yscale("log")
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set_xticks(range(len(sizes)), sizes, rotation=30, ha="right", fontsize=8)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
