"""The paper's Figures 2 to 4, and what was learned of the noise, out of `accuracy`'s rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

import nalayer
from benchmarks import studies, summaries
from benchmarks.records import Row
from nalayer import stream

# Okabe & Ito's colours; markers and dashes say the same without colour.
STYLES: dict[str, dict[str, Any]] = {
    "baseline": {"color": "black", "marker": "o", "linestyle": ":"},
    "reed-soft": {"color": "#999999", "marker": "v", "linestyle": "--"},
    "reed-hard": {"color": "#999999", "marker": "^", "linestyle": "-"},
    "s": {"color": "#0072B2", "marker": "s", "linestyle": "-"},
    "s-clustered": {"color": "#0072B2", "marker": "<", "linestyle": "--"},
    "c": {"color": "#D55E00", "marker": "D", "linestyle": "-"},
    "sparse-s": {"color": "#56B4E9", "marker": "s", "linestyle": "--"},
    "sparse-c": {"color": "#E69F00", "marker": "D", "linestyle": "--"},
    "em-s": {"color": "#009E73", "marker": "P", "linestyle": "-."},
    "em-c": {"color": "#CC79A7", "marker": "X", "linestyle": "-."},
    "oracle": {"color": "#F0E442", "marker": "*", "linestyle": "-"},
}
MARKERS = ">1234hHpd8"  # of the other methods, in the order they come
MATRICES_SHOWN = ("em-s", "s", "c")


def _style(method: str, methods: list[str]) -> dict[str, Any]:
    others = [name for name in methods if name not in STYLES]
    if method in STYLES:
        return STYLES[method]
    number = others.index(method)
    return {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "linewidth": 0.8}


def _unique(rows: list[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows if row.get(key) is not None))


def draw_accuracy(rows: list[Row], path: Path) -> None:
    """Draw accuracy, and the error of the learned noise matrix, against noise, size by size.

    Points are means over seeds and bars the 95 % bootstrap interval of the mean.
    """
    sizes = sorted(_unique(rows, "fraction"))
    with_error = any(row.get("noise_matrix_error") is not None for row in rows)
    keys = ["test_accuracy"] + ["noise_matrix_error"] * with_error
    figure, grid = plt.subplots(
        len(keys),
        len(sizes),
        squeeze=False,
        figsize=(1.5 + 4.2 * len(sizes), 0.8 + 3.6 * len(keys)),
        layout="constrained",
        sharey="row",
    )
    for line, key in enumerate(keys):
        for column, fraction in enumerate(sizes):
            found = [row for row in rows if row["fraction"] == fraction]
            _curves(grid[line, column], found, key, _unique(rows, "method"))
            n = found[0]["n_samples"] + found[0]["n_held_out"]
            grid[0, column].set_title(f"{n:,} training samples")
        words = {"test_accuracy": "clean-test accuracy", "noise_matrix_error": "error of theta"}
        grid[line, 0].set_ylabel(words[key])
    for axes in grid[-1]:
        axes.set_xlabel("share of changed labels")
    if len(_unique(rows, "method")) > summaries.MOST_COLUMNS:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center")
    else:
        grid[0, 0].legend(fontsize=8)
    seeds = len(_unique(rows, "seed"))
    first = rows[0]
    figure.suptitle(
        f"{first['dataset']}, {first['network'].upper()}, {first['noise_kind']} noise:\n"
        f"mean and 95 % bootstrap interval over {seeds} seed{'s' * (seeds > 1)}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(axes: Axes, rows: list[Row], key: str, methods: list[str]) -> None:
    for method in methods:
        by_noise: dict[float, list[float]] = {}
        for row in rows:
            if row["method"] == method and row.get(key) is not None:
                by_noise.setdefault(row["noise"], []).append(row[key])
        levels = sorted(by_noise)
        groups = [by_noise[level] for level in levels]
        studies.curve(axes, levels, groups, label=method, **_style(method, methods))
    axes.grid(alpha=0.3)


def draw_matrices(rows: list[Row], path: Path) -> bool:
    """Draw the noise matrices of the first seed, learned and true; return whether there are any."""
    shown = [row for row in rows if "theta" in row and row["method"] in MATRICES_SHOWN]
    if not shown:
        return False
    most = max(row["fraction"] for row in shown)
    shown = [row for row in shown if row["fraction"] == most]
    levels = sorted(_unique(shown, "noise"))
    methods = [name for name in MATRICES_SHOWN if name in _unique(shown, "method")]
    figure, grid = plt.subplots(
        1 + len(methods),
        len(levels),
        squeeze=False,
        figsize=(1 + 1.9 * len(levels), 0.6 + 2 * (1 + len(methods))),
        layout="constrained",
    )
    for column, noise in enumerate(levels):
        k = int(np.sqrt(len(shown[0]["theta"])))
        truth = nalayer.make_noise_matrix(
            shown[0]["noise_kind"], k, noise, stream(shown[0]["seed"], "label noise")
        )
        _matrix(grid[0, column], truth)
        grid[0, column].set_title(f"noise {noise:g}")
        for line, method in enumerate(methods, 1):
            found = [r for r in shown if r["method"] == method and r["noise"] == noise]
            if found:
                image = _matrix(grid[line, column], np.reshape(found[0]["theta"], (k, k)))
            else:
                grid[line, column].set_visible(False)
    for line, name in enumerate(["true", *methods]):
        grid[line, 0].set_ylabel(name)
    figure.colorbar(image, ax=grid, location="right", label="p(observed | true)", shrink=0.5)
    figure.suptitle(
        f"Noise matrices of seed {shown[0]['seed']}, {shown[0]['dataset']}: rows true, columns "
        "observed"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _matrix(axes: Axes, theta: np.ndarray) -> Any:
    axes.set_xticks([])
    axes.set_yticks([])
    return axes.imshow(theta, vmin=0, vmax=1, cmap="viridis")
