"""How fast theta moves: the s-model from frozen theta to EM's full step, from three starts.

Joint training moves theta by a factor on Adam's step, EM by a share of its closed-form step. A
third way to hold theta back is a Dirichlet prior that pulls it towards its start, however fast it
could move: EM's full step, and joint training at a hundred times the paper's speed. The network,
the noisy labels and the baseline that all of them start from are the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks import studies
from benchmarks.cells import Cell
from benchmarks.records import Row

STARTS = ("hard", "soft", "true")
CHANNEL_STEPS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
PULLS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""weight of the prior: its samples for each sample of the training set"""
FAST = 100.0  # times the network's step, where theta is pulled
ARMS = ("joint", "em", "pull")
NETWORKS = ("mlp", "mlp-no-dropout")
COLOURS = {"hard": "#0072B2", "soft": "#D55E00", "true": "#009E73"}
MARKERS = {"hard": "o", "soft": "s", "true": "^"}
PANELS = {
    "test_accuracy": "clean-test accuracy",
    "train_loss": "training loss, nats per sample",
    "validation_loss": "held-out loss, nats per sample",
    "noise_matrix_error": "error of theta",
}
SPEEDS: dict[str, dict[str, dict]] = {
    "joint": {
        f"{step:g} x the network's step" if step else "nothing (frozen)": {
            "method": "s",
            "channel_step": step,
        }
        for step in CHANNEL_STEPS
    },
    "em": {
        f"{damping:g} of EM's step": {"method": "em-s", "damping": damping} for damping in DAMPINGS
    },
    "pull": {
        f"{FAST:g} x the network's step, prior {pull:g}": {
            "method": "s",
            "channel_step": FAST,
            "pull": pull,
        }
        for pull in PULLS
    }
    | {f"EM's step, prior {pull:g}": {"method": "em-s", "pull": pull} for pull in PULLS},
}
"""the settings of every arm's cells, by what the table calls them"""
FROZEN = 0.03  # where a step of zero is drawn on a logarithmic axis


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    studies.add_arguments(parser, (0.4,), "timescale-output")
    parser.add_argument(
        "--networks",
        nargs="+",
        default=list(NETWORKS),
        help="such as mlp, mlp-512-256, mlp-8, mlp-no-dropout",
    )
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what sets theta's speed"
    )


def cells(options: argparse.Namespace) -> list[Cell]:
    """Return the study's cells."""
    found = []
    for at in studies.product(options, network=options.networks):
        found.append(studies.cell(options, "baseline", **at))
        for start in STARTS:
            found += [
                studies.cell(options, start=start, **speed, **at)
                for arm in options.arms
                for speed in SPEEDS[arm].values()
            ]
    return found


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the study."""
    return studies.run("timescale", cells(options), options, parser, lines, draw)


def groups(rows: list[Row]) -> list[dict]:
    """Return the settings under which curves are compared, in the rows' order."""
    keys = ("dataset", "network", "fraction", "noise")
    return [
        dict(zip(keys, values, strict=True))
        for values in dict.fromkeys(tuple(row[key] for key in keys) for row in rows)
    ]


def arms_in(rows: list[Row]) -> list[str]:
    """Return the arms of which there are rows."""
    pulled = any("pull" in row for row in rows)
    return [arm for arm in ARMS if pulled or arm != "pull"]


def lines(rows: list[Row]) -> list[str]:
    """Return one table for each group: accuracy by start and speed."""
    found = []
    for at in groups(rows):
        baseline = studies.values_of(rows, "test_accuracy", method="baseline", **at)
        found += [
            f"{at['dataset']}, {at['network']}, {at['fraction']:g} of the data, {at['noise']:g} "
            f"noise: clean-test accuracy over {studies.seeds_in(rows)}; "
            f"baseline {studies.interval(baseline)}",
            "",
        ]
        heads = ["theta moves by", *(f"{start} start" for start in STARTS)]
        body = [
            [name, *(studies.interval(_of(rows, "test_accuracy", s, at, **speed)) for s in STARTS)]
            for arm in arms_in(rows)
            for name, speed in SPEEDS[arm].items()
        ]
        found += [*studies.table(heads, body), ""]
    return found


def _of(rows: list[Row], key: str, start: str, at: dict, **speed) -> list[float]:
    return studies.values_of(rows, key, start=start, **at, **{"pull": None} | speed)


def draw(rows: list[Row], path: Path) -> None:
    """Draw the four figures against what holds theta back, for the first group of settings."""
    at, n_arms = groups(rows)[0], len(arms_in(rows))
    figure, grid = plt.subplots(
        n_arms, 4, figsize=(17, 3.8 * n_arms), layout="constrained", sharey="col"
    )
    for column, (key, words) in enumerate(PANELS.items()):
        joint, em, *pulled = grid[:, column]
        for start in STARTS:
            style = {"color": COLOURS[start], "marker": MARKERS[start], "label": f"{start} start"}
            by_step = [_of(rows, key, start, at, method="s", channel_step=s) for s in CHANNEL_STEPS]
            studies.curve(joint, [s or FROZEN for s in CHANNEL_STEPS], by_step, **style)
            by_share = [_of(rows, key, start, at, method="em-s", damping=d) for d in DAMPINGS]
            studies.curve(em, DAMPINGS, by_share, linestyle="--", **style)
            for axes in pulled:
                for method, line in (("s", "-"), ("em-s", "--")):
                    by_pull = [_of(rows, key, start, at, method=method, pull=p) for p in PULLS]
                    studies.curve(axes, PULLS, by_pull, linestyle=line, **style)
                axes.set_xlabel(f"prior: its samples / samples (- joint, {FAST:g} x; -- EM)")
        for axes in grid[:, column]:
            axes.set_xscale("log")
            axes.set_ylabel(words)
        joint.set_xticks([FROZEN, 0.1, 1, 10, 100], ["frozen", "0.1", "1\n(paper)", "10", "100"])
        joint.minorticks_off()
        joint.set_xlabel("joint: step of theta / step of the network")
        em.set_xlabel("EM: share of the closed-form step")
    if baseline := studies.values_of(rows, "test_accuracy", method="baseline", **at):
        for axes in grid[:, 0]:
            level = sum(baseline) / len(baseline)
            axes.axhline(level, color="black", linestyle=":", label="baseline")
    grid[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"How fast theta moves: {at['dataset']}, {at['network']}, {at['noise']:.0%} permutation "
        f"noise, mean and 95 % bootstrap interval over {studies.seeds_in(rows)}"
    )
    studies.save(figure, path)
