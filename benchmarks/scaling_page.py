"""The page on sparse against dense, from the rows of `scaling` and `sparsity`; measures nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks import sparsity, studies
from benchmarks.performance import BUSY_CORES
from benchmarks.records import Row
from benchmarks.scaling import MAIN_KEPT, OWN, fitted_words
from benchmarks.scaling_arms import DENSE, N_HIDDEN, N_IN, NAIVE, SOFTMAX, sparse_name
from nalayer.memory import size_words

SPARSE = sparse_name(MAIN_KEPT)
WORDS = {
    "s": "s-model, loss and gradients, 256 samples",
    "c": "c-model, loss and gradients, 256 samples, 64 features",
    "step": f"a whole training step, mlp({N_IN}, ({N_HIDDEN},), K) with Adam, 256 samples",
    "s-kept": "s-model, in memory that the process keeps",
    "c-kept": "c-model, in memory that the process keeps",
    "step-kept": "a whole training step, in memory that the process keeps",
}
KEPT = "-kept"
STYLES = {
    NAIVE: ("tab:red", "x-"),
    DENSE: ("tab:orange", "o-"),
    SPARSE: ("tab:blue", "s-"),
    SOFTMAX: ("tab:grey", ".--"),
    "torch naive": ("tab:pink", "x:"),
    "torch column": ("tab:brown", "o:"),
    "torch flat": ("tab:brown", "o:"),
    f"torch sparse, l = {MAIN_KEPT}": ("tab:cyan", "s:"),
}
BATCH, SAMPLES, CLASSES, EPOCHS = 256, 10**7, 10**6, 10  # of the problem that is worked out
FLOAT, INTEGER = 4, 8
LARGE_ARRAY = 2**25  # bytes; what is larger glibc has from the system, and gives back
ENOUGH_ROUNDS = 5


def of(rows: Iterable[Row], series: str, arm: str, key: str = "median_ms") -> dict[int, Any]:
    """Return a figure by number of classes."""
    return {
        row["k"]: row[key]
        for row in rows
        if row["series"] == series and row["arm"] == arm and row.get(key) is not None
    }


def best_of(rows: list[Row], series: str, arm: str) -> dict[int, float]:
    """Return the times by number of classes, those with kept memory where there are any."""
    return of(rows, series, arm) | of(rows, series + KEPT, arm)


def arms_in(rows: list[Row], series: str) -> list[str]:
    """Return the arms that were timed in a series, in the order of the file."""
    timed = [row for row in rows if row["series"] == series and row.get("median_ms") is not None]
    return list(dict.fromkeys(row["arm"] for row in timed))


def ms(value: float) -> str:
    """Return milliseconds with three digits, or all there are before the point.

    Examples
    --------
    >>> ms(0.02341), ms(3508.7)
    ('0.0234', '3509')
    """
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def page(rows: list[Row], quality: list[Row], cifar: list[Row], images: Path) -> Iterator[str]:
    """Yield the page in Markdown, drawing its pictures on the way."""
    yield "# Sparse against dense, from ten classes to a million"
    yield ""
    yield (
        "The paper keeps the l largest entries of every row of θ and says that the cost then "
        "grows linearly with the number of classes K. Its authors did not measure it. Here it is "
        "measured, against the layer that everyone ships (*naive dense*: the product of every "
        "sample with all of θ) and against a dense layer that only reads column z of θ (*nalayer "
        "dense*). The softmax of the classifier (*softmax alone*) is the floor: no noise layer "
        "can do without it. "
        "Made by `python -m benchmarks report` from `benchmarks/results/scaling.jsonl` and "
        "`sparsity.jsonl`."
    )
    yield from ("", "## What it means", "", *(f"- {one}" for one in conclusions(rows)))
    yield from which_memory(rows)
    draw(rows, images / "scaling.png")
    yield from ("", "## Time and memory", "", "![Time and memory](images/scaling.png)")
    for series, words in WORDS.items():
        if arms_in(rows, series):
            yield from ("", f"### {words[0].upper()}{words[1:]}", "", "Milliseconds, median:", "")
            yield from _table(rows, series, "median_ms", ms)
            yield from ("", "Memory beyond arguments and results, peak:", "")
            yield from _table(rows, series, "peak_extra_bytes", size_words)
    yield from ("", "A dash: not run, for lack of memory or of code; the rows say which.")
    for series in WORDS:
        few = few_rounds(rows, series)
        if few:
            yield (
                f"Of fewer than {ENOUGH_ROUNDS} rounds, and uncertain by factors where a call is "
                f"given gigabytes of new memory: {series} at K = {', '.join(map(str, few))}."
            )
    busy = busy_sizes(rows)
    if busy:
        yield f"While these were measured, other programs kept a core busy in part: {busy}."
    yield from new_memory(rows)
    yield from ("", "## How time grows", "", *exponents(rows))
    yield from ("", "## Where one overtakes the other", "", *crossovers(rows))
    if quality:
        sparsity.draw_study(quality, images / "sparsity.png")
        yield from ("", "## How many links are enough", "", *how_many_links(quality))
    if cifar:
        yield from ("", *how_many_links_of_cifar(cifar))
    yield from ("", "## Ten million samples of a million classes", "", *worked_out(rows))


def which_memory(rows: list[Row]) -> Iterator[str]:
    """Yield for which sizes the best times are those with kept memory, if any are."""
    found = [
        f"of series {series} from K = {min(kept)} to {max(kept)}"
        for series in ("s", "c", "step")
        if (kept := of(rows, series + KEPT, SPARSE))
    ]
    if found:
        yield ""
        yield (
            f"Here, in the picture and where one overtakes the other, times {', '.join(found)} are "
            "in memory that the process keeps."
        )


def new_memory(rows: list[Row]) -> Iterator[str]:
    """Yield what it costs that a large array is new memory at each call, if that was measured."""
    if not arms_in(rows, "s" + KEPT):
        return
    size = size_words(BATCH * CLASSES * FLOAT)
    yield from ("", "## New memory at every call", "")
    yield (
        f"At K = {CLASSES} the gradient of the logits alone is {size}. The C library asks the "
        "system for any array of more than 32 MiB and gives it back when it is no longer used; so "
        "each call, and each step of training, is given new memory, and the system clears it "
        "first, huge page after huge page. On a system with other things to do that takes many "
        "times as long as the work, and all who allocate pay for it alike. A process that keeps "
        "its memory does not:"
    )
    yield from ("", "```sh", "export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000")
    yield from ("```", "")
    yield (
        "(glibc; set before Python starts. The process then never returns memory to the system.) "
        "Milliseconds, median, and where known the quickest and the slowest round:"
    )
    body = []
    for series in ("s", "step"):
        for arm in arms_in(rows, series + KEPT):
            kept, new = of(rows, series + KEPT, arm), of(rows, series, arm)
            body += [
                [
                    series,
                    arm,
                    str(k),
                    *(_spread(rows, series + kind, arm, k) for kind in ("", KEPT)),
                ]
                for k in sorted(kept.keys() & new.keys())
                if BATCH * k * FLOAT > LARGE_ARRAY
            ]
    yield from ("", *studies.table(["series", "arm", "K", "new memory", "kept memory"], body))


def _spread(rows: list[Row], series: str, arm: str, k: int) -> str:
    """Return a median with the least and the most of its rounds."""
    median = ms(of(rows, series, arm)[k])
    rounds = of(rows, series, arm, "rounds_ms").get(k)
    return f"{median} ({ms(min(rounds))} to {ms(max(rounds))})" if rounds else median


def few_rounds(rows: list[Row], series: str) -> list[int]:
    """Return the sizes at which our sparse layer was timed in too few rounds for a median."""
    rounds = of(rows, series, SPARSE, "rounds")
    return [k for k, n in sorted(rounds.items()) if n < ENOUGH_ROUNDS]


def busy_sizes(rows: list[Row]) -> str:
    """Return at which sizes other programs ran, and how many cores they took."""
    found = {
        f"{row['series']} at K = {row['k']} ({row['busy_elsewhere']:.1f} cores)": None
        for row in rows
        if (row.get("busy_elsewhere") or 0) > BUSY_CORES
    }
    return ", ".join(found)


def _table(rows: list[Row], series: str, key: str, words) -> list[str]:
    """Return arms down and numbers of classes across."""
    arms = arms_in(rows, series)
    ks = sorted({k for arm in arms for k in of(rows, series, arm)})
    body = []
    for arm in arms:
        found = of(rows, series, arm, key)
        body.append([arm, *(words(found[k]) if k in found else "-" for k in ks)])
    return studies.table(["K", *map(str, ks)], body)


def exponents(rows: list[Row]) -> Iterator[str]:
    """Yield the fitted exponents beside the theory's."""
    yield (
        "Time ~ K^a, fitted over medians; 95 % bootstrap interval over rounds. *Own time* is what "
        "the sparse layer adds to the classifier's softmax, round by round, measured with 16 "
        "samples so that the difference is not lost. Theory counts the largest term only: naive "
        "dense s: n K² ; gathered dense s: K² for each batch beside n K; sparse: n K for the "
        "softmax, and for the layer itself K l to clear and return its gradient beside n l; dense "
        "c: n d K²; sparse c: K l d beside n l² d. Where matrices grow out of a cache within the "
        "range, time grows faster than the work."
    )
    body = [
        [
            row["series"],
            row["arm"],
            f"{row['k_from']} to {row['k_to']}",
            fitted_words(row),
            f"{row['theory']:g}" if not row["arm"].endswith(OWN) else f"at most {row['theory']:g}",
        ]
        for row in rows
        if "theory" in row
    ]
    yield from ("", *studies.table(["series", "arm", "K", "a", "theory"], body))


def crossover(slow: dict[int, float], fast: dict[int, float]) -> float | None:
    """Return from which K on ``fast`` takes less time, between sizes by interpolation; or None.

    0 where it does at every size; None where at the largest size it does not.

    Examples
    --------
    >>> crossover({10: 1.0, 1000: 100.0}, {10: 10.0, 1000: 10.0})
    100.0
    """
    ks = sorted(slow.keys() & fast.keys())
    lead = [np.log(slow[k] / fast[k]) for k in ks]
    if not ks or lead[-1] <= 0:
        return None
    for (k_0, lead_0), (k_1, lead_1) in reversed(list(pairwise(zip(ks, lead, strict=True)))):
        if lead_0 <= 0:
            share = -lead_0 / (lead_1 - lead_0)
            return float(round(np.exp(np.log(k_0) + share * np.log(k_1 / k_0)), 6))
    return 0.0


def crossovers(rows: list[Row]) -> Iterator[str]:
    """Yield from which K on each of our layers is ahead of another."""
    pairs = ((SPARSE, NAIVE), (SPARSE, DENSE), (DENSE, NAIVE))
    body = []
    for series in ("s", "c", "step"):
        for fast, slow in pairs:
            ours, theirs = best_of(rows, series, fast), best_of(rows, series, slow)
            both = sorted(ours.keys() & theirs.keys())
            if not both:
                continue
            at = crossover(theirs, ours)
            words = "not up to" if at is None else "from" if at else "at every size up to"
            where = round(at) if at else both[-1]
            last = f"{ms(theirs[both[-1]] / ours[both[-1]])} times at K = {both[-1]}"
            body.append([series, fast, slow, f"{words} K = {where}", last])
    heads = ["series", "this", "takes less time than", "where", "the other takes"]
    yield from studies.table(heads, body)


def conclusions(rows: list[Row]) -> Iterator[str]:
    """Yield what a user should know, with the numbers."""
    s, c, step = (
        {arm: best_of(rows, series, arm) for arm in arms_in(rows, series)}
        for series in ("s", "c", "step")
    )
    at = max(s[DENSE].keys() & s[NAIVE].keys())
    yield (
        f"**The naive layer is what is slow, not density.** At K = {at} it takes "
        f"{ms(s[NAIVE][at])} ms; a dense layer that gathers its columns takes "
        f"{ms(s[DENSE][at])} ms, the sparse one {ms(s[SPARSE][at])} ms, the classifier's softmax "
        f"alone {ms(s[SOFTMAX][at])} ms."
    )
    small = [k for k in sorted(s[DENSE]) if s[DENSE][k] <= 2 * s[SPARSE][k]]
    if small:
        yield (
            f"**Up to about K = {small[-1]} a good dense s-model is enough**: there it takes at "
            f"most twice the time of the sparse one ({ms(s[DENSE][small[-1]])} against "
            f"{ms(s[SPARSE][small[-1]])} ms), chooses no links and can lose none."
        )
    both = max(step[DENSE])
    yield (
        f"**In training, sparsity pays through Adam.** A dense noise layer is K² parameters to "
        f"update: at K = {both} a whole step takes {ms(step[DENSE][both])} ms dense, "
        f"{ms(step[SPARSE][both])} sparse, {ms(step[SOFTMAX][both])} without a noise layer."
    )
    both = max(c[DENSE])
    yield (
        f"**The c-model needs it much earlier**: its dense form costs K² d for each sample; at "
        f"K = {both} {ms(c[DENSE][both])} ms against {ms(c[SPARSE][both])} sparse."
    )
    last = max(
        k
        for series in ("s", "s" + KEPT)
        for k in of(rows, series, SPARSE)
        if k not in few_rounds(rows, series)
    )
    share = s[SPARSE][last] / s[SOFTMAX][last]
    yield (
        f"**At K = {last} the sparse s-model takes {share:.3g} times the classifier's softmax "
        f"alone.** What then limits is the classifier itself."
    )


def how_many_links(quality: list[Row]) -> Iterator[str]:
    """Yield the study of the number of links."""
    yield (
        f"Synthetic problems: softmax regression on {sparsity.N_IN} features; classes come in "
        f"clusters of {sparsity.CLUSTER}, {sparsity.NOISE:.0%} of the labels are changed to others "
        "of the cluster in random proportions, so the true number of links is known. A baseline is "
        "trained on the noisy labels; its confusion on the training samples, accumulated sparsely, "
        "gives links and start: by *arg max*, or by *posterior mass* of the ten likeliest classes. "
        "Clean labels are used to count right answers on fresh samples and for nothing else."
    )
    yield from ("", "![Quality against links](images/sparsity.png)", "")
    yield from sparsity.lines(quality)
    yield (
        "The certificate bounds what a better θ *over the same links* could gain; it does not see "
        "links that are missing. Links that the confusion holds no count for start at the floor "
        "of 10⁻⁸ and stay there: l larger than the data supports changes nothing."
    )


def how_many_links_of_cifar(rows: list[Row]) -> Iterator[str]:
    """Yield the table of CIFAR-100 against the number of links."""
    n, epochs = rows[0]["n_samples"], rows[0]["max_epochs"]
    yield (
        f"CIFAR-100 with the authors' CNN, {n} training images, at most {epochs} epochs, labels "
        "changed by random derangements of the 100 classes: each class is taken for one other. "
        "With l = 1 a class keeps only its own label, which is the baseline; the truth needs "
        "l = 2. Links are chosen by the arg max of a baseline that is right for less than a fifth "
        "of the images. Losses are of noisy labels. A dash: the baseline, which has no noise "
        "layer, or cells whose parameters were not kept."
    )
    yield from ("", *sparsity.cell_lines(rows), "")
    for command in sorted({row["certified_by"] for row in rows if "certified_by" in row}):
        yield f"Training loss and certificate: `{command}`."


def worked_out(rows: list[Row]) -> Iterator[str]:
    """Yield time and memory of a problem that nobody here has run, from the measured constants."""
    times, peaks = of(rows, "step", SPARSE), of(rows, "step", SPARSE, "peak_extra_bytes")
    largest = max(times)
    seconds = times[largest] / 1e3 * CLASSES / largest
    n_steps = SAMPLES / BATCH
    hours = n_steps * seconds / 3600
    weights = (N_IN + 1) * N_HIDDEN + (N_HIDDEN + 1) * CLASSES
    links = CLASSES * MAIN_KEPT
    parts = [
        ("network's weights", weights * FLOAT),
        ("noise layer, K l", links * FLOAT),
        ("their gradient and Adam's two moments", 3 * (weights + links) * FLOAT),
        ("logits and their gradient, n K each", 2 * BATCH * CLASSES * FLOAT),
        ("links and their transposed index", (3 * links + CLASSES + 1) * INTEGER),
    ]
    total = sum(size for _, size in parts)
    yield (
        f"Nobody has run this here; it follows from the step measured at K = {largest} "
        f"({ms(times[largest])} ms for {BATCH} samples, mlp({N_IN}, ({N_HIDDEN},), K), float32, "
        f"this machine's two cores), scaled linearly in K and in the number of steps."
    )
    yield ""
    yield (
        f"- **Time**: {n_steps:.0f} steps of {seconds:.3g} s: {hours:.3g} hours for an epoch, "
        f"{EPOCHS * hours / 24:.3g} days for {EPOCHS} epochs."
    )
    kept = of(rows, "step" + KEPT, SPARSE)
    if largest in kept:
        hours = n_steps * kept[largest] / 1e3 * CLASSES / largest / 3600
        yield (
            f"  In memory that the process keeps ({ms(kept[largest])} ms a step): {hours:.3g} "
            f"hours for an epoch."
        )
    yield f"- **Memory**: {size_words(total)} in all, whatever the number of samples:"
    yield ""
    yield from studies.table(["what", "size"], [[name, size_words(size)] for name, size in parts])
    yield ""
    yield (
        f"  (The measured step at K = {largest} took {size_words(peaks[largest])} beyond what it "
        "holds between steps.)"
        if largest in peaks
        else ""
    )
    features, labels = SAMPLES * N_IN * FLOAT, SAMPLES * INTEGER
    yield (
        f"- **Data**: features {size_words(features)}, in a memory-mapped file of which one batch "
        f"is read at a time; labels {size_words(labels)}. The confusion has at most one entry for "
        f"each sample ({size_words(SAMPLES * (FLOAT + FLOAT + INTEGER))} as lists)."
    )
    dense = 4 * CLASSES**2 * FLOAT
    yield (
        f"- **Dense**: θ with gradient and moments would be {size_words(dense)}: refused, with "
        "that number."
    )
    yield (
        "- **More machines**: E-step counts and confusion counts of parts of the data add up "
        "([Beyond one machine](beyond_one_machine.md)). What remains is the softmax over K, which "
        "is the classifier's and not the noise layer's."
    )


def draw(rows: list[Row], path: Path) -> None:
    """Draw time and memory against the number of classes, a column for each series."""
    series = [name for name in WORDS if arms_in(rows, name) and not name.endswith(KEPT)]
    figure, grid = plt.subplots(
        2, len(series), squeeze=False, layout="constrained", figsize=(1 + 4.5 * len(series), 8)
    )
    for column, name in enumerate(series):
        for arm in arms_in(rows, name):
            if arm in STYLES:
                _line(grid[0, column], best_of(rows, name, arm), 1.0, arm)
                _line(grid[1, column], of(rows, name, arm, "peak_extra_bytes"), 2**20, arm)
        for axes in grid[:, column]:
            axes.set(xscale="log", yscale="log", xlabel="classes K")
            axes.grid(alpha=0.3)
        grid[0, column].set_title(WORDS[name].partition(",")[0])
        grid[0, column].legend(fontsize=7)
    grid[0, 0].set_ylabel("ms")
    grid[1, 0].set_ylabel("MiB beyond arguments, results")
    studies.save(figure, path)


def _line(axes: Axes, found: dict[int, float], scale: float, arm: str) -> None:
    colour, style = STYLES[arm]
    shown = {k: value / scale for k, value in sorted(found.items()) if value > 0}
    axes.plot(list(shown), list(shown.values()), style, color=colour, label=arm, ms=4, lw=1)
