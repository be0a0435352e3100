"""Where theta starts, and whether a share of the plain loss beside the s-model's helps.

All start from the same baseline; theta starts uniform, random, from the baseline's confusion matrix
(hard or soft), from clusters of its outputs, or from the truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import studies
from benchmarks.cells import Cell
from benchmarks.methods import STARTS
from benchmarks.records import Row

PLAIN_WEIGHTS = (0.0, 0.1)
FIGURES = {
    "test_accuracy": "accuracy",
    "relabelled_accuracy": "accuracy, relabelled",
    "noise_matrix_error": "error of theta",
    "relabelled_error": "error of theta, relabelled",
    "train_loss": "training loss (nats)",
    "validation_loss": "held-out loss (nats)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    studies.add_arguments(parser, (0.3, 0.4, 0.46), "initialisation-output")


def cells(options: argparse.Namespace) -> list[Cell]:
    """Return the study's cells."""
    found = []
    for at in studies.product(options):
        found.append(studies.cell(options, "baseline", **at))
        found += [
            studies.cell(options, "s", start=start, plain_weight=weight, **at)
            for start in STARTS
            for weight in PLAIN_WEIGHTS
        ]
    return found


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the study."""
    return studies.run("initialisation", cells(options), options, parser, lines, draw)


def _of(rows: list[Row], key: str, **at) -> list[float]:
    return studies.values_of(rows, key, method="s", **at)


def lines(rows: list[Row]) -> list[str]:
    """Return a table for each noise level."""
    found = []
    for fraction, noise in dict.fromkeys((row["fraction"], row["noise"]) for row in rows):
        at = {"fraction": fraction, "noise": noise}
        baseline = studies.values_of(rows, "test_accuracy", method="baseline", **at)
        found += [
            f"{rows[0]['dataset']}, {fraction:g} of the data, {noise:g} permutation noise, "
            f"{studies.seeds_in(rows)}; baseline {studies.interval(baseline)}",
            "",
        ]
        body = []
        for start in STARTS:
            for weight in PLAIN_WEIGHTS:
                here = at | {"start": start, "plain_weight": weight}
                entries = [studies.interval(_of(rows, key, **here)) for key in FIGURES]
                worst = max(_of(rows, "certificate", **here), default=np.nan)
                body.append([start, f"{weight:g}", *entries, f"{worst:.1e}"])
        heads = ["start", "plain share", *FIGURES.values(), "certificate V11, worst (nats)"]
        found += [*studies.table(heads, body), ""]
    return found


def draw(rows: list[Row], path: Path) -> None:
    """Draw accuracy and the error of theta by start, side by side for each share."""
    levels = sorted({row["noise"] for row in rows})
    fraction = max(row["fraction"] for row in rows)
    shown = {key: FIGURES[key] for key in ("test_accuracy", "relabelled_error", "train_loss")}
    figure, grid = plt.subplots(
        len(shown),
        len(levels),
        squeeze=False,
        figsize=(1 + 4 * len(levels), 8),
        layout="constrained",
        sharey="row",
        sharex=True,
    )
    for column, noise in enumerate(levels):
        for line, (key, words) in enumerate(shown.items()):
            axes = grid[line, column]
            for shift, weight in zip((-0.12, 0.12), PLAIN_WEIGHTS, strict=True):
                at = {"noise": noise, "fraction": fraction, "plain_weight": weight}
                groups = [_of(rows, key, start=start, **at) for start in STARTS]
                style = {"marker": "s" if weight else "o", "linestyle": "none"}
                label = f"{weight:g} of the plain loss" if weight else "s-model alone"
                places = [place + shift for place in range(len(STARTS))]
                studies.curve(axes, places, groups, label=label, **style)
            if column == 0:
                axes.set_ylabel(words)
            axes.set_xticks(range(len(STARTS)), STARTS, rotation=30)
        grid[0, column].set_title(f"{noise:.0%} noise")
    grid[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"Where theta starts ({rows[0]['dataset']}): mean and 95 % interval over "
        f"{studies.seeds_in(rows)}"
    )
    studies.save(figure, path)
