"""The whole argument in one page, from the results files: statements, studies, experiments, speed.

Writes Markdown, the pictures it shows, and one HTML file that needs no network. Nothing is measured
here.
"""

from __future__ import annotations

import argparse
import base64
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import (
    accelerations,
    accuracy_figures,
    figures,
    gradients,
    initialisation,
    performance,
    records,
    scaling_page,
    suite,
    summaries,
    timescale,
    transition,
    versions_page,
)
from benchmarks.records import ROOT, Row

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
FORMULAS = {
    "V1": "L = Σₜ log Σᵢ qₜᵢ θᵢ,zₜ, summed over hidden labels or run through the network",
    "V2": "∂L/∂a = c - q, ∂L/∂Bᵢⱼ = Nᵢⱼ - nᵢ θᵢⱼ",
    "V3": "∇L(w, θ) = ∇Q(w, θ; w₀, θ₀) at w₀ = w, θ₀ = θ",
    "V4": "θᵢ⁺ - θᵢ = Pᵢ ∂L/∂θᵢ, Pᵢ = (diag θᵢ - θᵢθᵢᵀ) / nᵢ; c: Ī_c (B⁺ - B) = ∂L/∂B",
    "V5": "ΔL = ΔQ + Σₜ KL(cₜ ‖ cₜ⁺)",
    "V6": "∂Q/∂B = 0 at Eq. 4, and no other θ has a higher Q",
    "V7": "L(q π, π⁻¹ θ) = L(q, θ) for every permutation π",
    "V8": "θ = I: cross-entropy; l = k: dense; U = 0: s-model; equal rows: no gradient; k = 2",
    "V9": "L(w⁺, θ⁺) ≥ L(w, θ)",
    "V10": "∇L = 0 at EM's limit; EM's map is the identity at joint training's",
    "V11": "0 ≤ L* - L(θ) ≤ Σᵢ (maxⱼ gᵢⱼ - nᵢ), g = ∂L/∂θ (c: L* of one θ for all samples)",
    "V12": "rate = λₘₐₓ(I_c⁻¹ I_mis); I_obs = I_c - I_mis",
    "V13": "equal L at both ends ⇒ equal θ, once the classes are matched",
}


@dataclass(frozen=True)
class Study:
    """A study's results files, what they say, and its picture."""

    title: str
    files: str
    """pattern of the results files; each gets a part of its own"""
    text: str
    lines: Callable[[list[Row]], list[str]]
    draw: Callable[[list[Row], Path], None]


STUDIES = (
    Study(
        "How fast θ moves",
        "timescale-*.jsonl",
        "The same network, the same noisy labels, the same baseline to start from; only the start "
        "of θ and its speed differ. Joint training moves θ by a factor on Adam's step, EM by a "
        "share of its closed-form step. *prior*: a Dirichlet prior pulls θ to its start, with so "
        "many pseudo-samples for each sample; the losses are without it.",
        timescale.lines,
        timescale.draw,
    ),
    Study(
        "The drop near one half",
        "transition-*.jsonl",
        "The paper's Figure 2 falls where half of the labels are permuted. *singular*: the least "
        "singular value of the true noise matrix; *rows apart*: the least total variation of "
        "two of its rows. The oracle has the true θ and keeps it. The last column renames the "
        "classes of the clustered start as fits best: what it has lost beyond that are not the "
        "classes but their names.",
        transition.lines,
        transition.draw,
    ),
    Study(
        "Where θ starts",
        "initialisation-*.jsonl",
        "All from the same baseline, with and without a share of the plain loss. *relabelled*: "
        "after the best matching of the model's classes to the true ones (V7).",
        initialisation.lines,
        initialisation.draw,
    ),
    Study(
        "What the noise layer does to gradients",
        "gradients-*.jsonl",
        "The baseline is trained first; then the noise layer is put on top and training goes on. "
        "The last panel is about checking gradients: with differences the step has to be chosen, "
        "between rounding on the left and truncation, or kinks of the ReLUs, on the right; a "
        "complex step only has to be small.",
        gradients.lines,
        gradients.draw,
    ),
    Study(
        "Who climbs fastest",
        "accelerations-*.jsonl",
        "Passes over the data: an E-step or a gradient is one, SQUAREM's safeguard included. θ "
        "alone starts from the hard confusion matrix of the network's own outputs; the certificate "
        "(V11) bounds what is left to gain. Everything at once is a softmax regression on four "
        "principal components; *alpha* is a pseudo-count on θ, and L includes it.",
        accelerations.lines,
        accelerations.draw,
    ),
    Study(
        "The paper's experiments",
        "accuracy-*.jsonl",
        "Accuracy on clean test labels, mean over seeds and 95 % bootstrap interval of the mean. "
        "The settings of `sukhbaatar` were chosen on clean test labels of digits, seeds 0 to 2.",
        summaries.summary_table,
        accuracy_figures.draw_accuracy,
    ),
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.8rem; display: block; overflow-x: auto; }
td, th { border: 1px solid #ccc; padding: 0.15rem 0.4rem; text-align: left; white-space: nowrap; }
pre { overflow-x: auto; font-size: 0.75rem; background: #f6f6f6; padding: 0.5rem; }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results files")
    parser.add_argument(
        "--out", type=Path, default=DOCS, help="folder for report.md, report.html and images/"
    )


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Write the report."""
    try:
        import markdown
    except ImportError:
        parser.error("the report needs the package Markdown: pip install 'nalayer[report]'")
    try:
        images = options.out / "images"
        images.mkdir(parents=True, exist_ok=True)
        text = "\n".join(page(options.results, images)) + "\n"
        (options.out / "report.md").write_text(text)
        write_scaling(options.results, options.out)
        write_versions(options.results, options.out)
        body = markdown.markdown(text, extensions=["tables", "fenced_code", "toc"])
        (options.out / "report.html").write_text(html(body, options.out))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"Report: {options.out / 'report.md'}, {options.out / 'report.html'}")
    return 0


def write_scaling(results: Path, out: Path) -> None:
    """Write the page on sparse against dense, if there are rows of it."""
    timed, studied = results / "scaling.jsonl", results / "sparsity.jsonl"
    if not timed.exists():
        return
    rows = records.read_rows(timed)
    quality = records.read_rows(studied) if studied.exists() else []
    cells = [results / f"{name}-cifar100.jsonl" for name in ("accuracy", "links")]
    cifar = {path: records.read_rows(path) for path in cells if path.exists()}
    both = [row for found in cifar.values() for row in found]
    lines = [*scaling_page.page(rows, quality, both, out / "images"), "", _source(timed, rows)]
    for path, found in {studied: quality, **cifar}.items():
        if found:
            lines += ["", _source(path, found)]
    (out / "scaling.md").write_text("\n".join(lines) + "\n")


def write_versions(results: Path, out: Path) -> None:
    """Write the page on one kernel in four versions, if there are rows of it; its text stays."""
    timed = results / "versions.jsonl"
    if not timed.exists():
        return
    rows, gpu = records.read_rows(timed), versions_page.gpu_rows(results)
    block = list(versions_page.block(rows, gpu))
    for path, quoted in versions_page.sources(results, rows, gpu):
        block += ["", _source(path, quoted)]
    text = (DOCS / versions_page.NAME).read_text()
    block = ["", *block, ""]
    markers = versions_page.BEGIN, versions_page.END
    (out / versions_page.NAME).write_text(performance.with_block(text, block, *markers))


def html(body: str, folder: Path) -> str:
    """Return a whole HTML page with its pictures inside."""

    def embedded(found: re.Match[str]) -> str:
        picture = base64.b64encode((folder / found[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{picture}"'

    body = re.sub(r'src="(images/[^"]+\.png)"', embedded, body)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>nalayer: the argument in numbers</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def page(results: Path, images: Path) -> Iterator[str]:
    """Yield the lines of the report in Markdown, drawing its pictures on the way."""
    yield "# Joint noise layer and EM: the argument in numbers"
    yield ""
    yield (
        "Made by `python -m benchmarks report` from the rows in `benchmarks/results/`; each part "
        "says which. Likelihoods are in nats. The README explains the method and the words."
    )
    equivalence = results / "equivalence.jsonl"
    if equivalence.exists():
        yield from _statements(records.read_rows(equivalence), results, images)
    for study in STUDIES:
        found = sorted(results.glob(study.files))
        if not found:
            continue
        yield from ("", f"## {study.title}", "", study.text)
        for path in found:
            rows = records.read_rows(path)
            picture = images / f"{path.stem}.png"
            study.draw(rows, picture)
            yield from ("", f"![{study.title}: {path.stem}](images/{picture.name})", "")
            yield from study.lines(rows)
            yield from ("", _source(path, rows))
    timings = performance.committed_rows(results)
    if timings:
        yield from ("", "## Speed", "")
        yield from performance.performance_block(timings)


def _statements(rows: list[Row], results: Path, images: Path) -> Iterator[str]:
    yield from ("", "## One function, step by step", "")
    yield (
        "Joint training and EM on real digits, from the same start. Each statement, the case that "
        "came closest to its bound, and whether it holds:"
    )
    picture = images / "equivalence.png"
    figures.draw_equivalence(rows, picture)
    yield from ("", f"![Both methods on digits](images/{picture.name})", "")
    yield from ("| | formula |", "|---|---|")
    for name, formula in FORMULAS.items():
        yield f"| {name} | {formula} |"
    yield from ("", "```text", *summaries.statement_table(rows), "```", "")
    yield from ("Who ends where:", "", "```text", *summaries.accuracy_table(rows), "```", "")
    yield from (f"- {sentence}" for sentence in summaries.conclusions(rows))
    yield from ("", _source(results / "equivalence.jsonl", rows))
    for everywhere in sorted(results.glob("suite-*.jsonl")):
        found = records.read_rows(everywhere)
        yield from ("", f"## The same for every model: {found[0]['dataset']}", "")
        heads = {
            row["head"]
            for row in found
            if row["statement"] in ("V4", "V11") and row["model"] in ("c", "sparse-c")
        }
        only = f"; the c-models' V4 and V11: {heads.pop()}" if len(heads) == 1 else ""
        yield (
            "The residual closest to its bound over two heads (V10, V13 and the c-models' V12: "
            f"softmax regression{only}), three kinds of noise and all seeds."
        )
        yield from ("", *suite.table(found), "", _source(everywhere, found))


def _source(path: Path, rows: list[Row]) -> str:
    """Return where rows come from, as a line."""
    commits, dates, machines = (
        sorted({row[key] for row in rows if key in row}) for key in ("commit", "date", "machine")
    )
    return (
        f"*Rows: `benchmarks/results/{path.name}`; commit {', '.join(commits)}; "
        f"{', '.join(dates)}; {'; '.join(machines)}; {rows[0].get('versions', '')}.*"
    )
