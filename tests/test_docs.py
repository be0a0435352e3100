"""Every Python block of the pages in docs/ runs as it stands; names, links and pictures are there.

The site is looked at without building it, for its tools are not in the tests' environment.
"""

import importlib
import inspect
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import em_baseline
from benchmarks import loops
from benchmarks.records import read_rows
from kernels import numpy_backend

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ["beyond_one_machine.md", "kernel_versions.md", "theory.md", "your_data.md"]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(page: str) -> dict:
    names: dict = {"__name__": "__main__"}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    return names


def test_pages_are_all_run():
    with_code = {path.name for path in DOCS.glob("*.md") if "```python" in path.read_text()}
    assert with_code == set(PAGES)


def test_beyond_one_machine(elsewhere, capsys):
    found = run("beyond_one_machine.md")
    model, x, z = found["model"], np.asarray(found["x"]), found["noisy_labels"]
    # three rounds on the cluster are three rounds here
    here = model.pack(found["baseline"], found["start"])
    for _ in range(3):
        before = em_baseline.e_step_statistics(model, here, x, z)
        here = em_baseline.with_m_step(model, here, before)
    theirs, ours = (
        np.exp(model.unpack(parameters)[-1]) for parameters in (found["parameters"], here)
    )
    assert np.abs(theirs - ours).max() <= 100 * np.finfo(np.float32).eps
    printed = capsys.readouterr().out.splitlines()
    likelihoods = [float(line.split()[-1]) for line in printed if line[0] in "012"]
    assert likelihoods == sorted(likelihoods)
    # the noise is found again: the true link of each class
    links = found["links"].support
    assert ((links == (np.arange(20)[:, None] + 1) % 20).any(axis=1)).mean() > 0.9


def test_theory(elsewhere, capsys):
    run("theory.md")
    assert "gain in L" in capsys.readouterr().out


def test_kernel_versions(elsewhere, capsys):
    run("kernel_versions.md")
    assert "nats per sample" in capsys.readouterr().out


def test_the_versions_shown_are_those_of_the_repository():
    page = (DOCS / "kernel_versions.md").read_text()
    for shown in (loops.softmax, loops.s_model_nll, numpy_backend.s_model_nll):
        assert f"\n{inspect.getsource(shown)}" in page


def test_your_data(elsewhere, capsys):
    run("your_data.md")
    printed = capsys.readouterr().out
    lows, highs = np.array(re.findall(r": 0\.\d+ \[(0\.\d+), (0\.\d+)\]", printed), float).T
    assert len(lows) == 3
    assert lows[0] > max(highs[1:]) + 0.1  # against MLPClassifier, without early stopping and with
    accuracy, precision, recall = (
        float(found) for found in re.findall(r"(0\.\d+) (?:on clean|of them|of all)", printed)
    )
    assert accuracy > 0.9
    assert precision > 0.9
    assert recall > 0.8


def named(text: str):
    """Return what a dotted name names: a module, or something in one."""
    parts = text.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(text)


def test_every_equation_has_code_and_a_test():
    lines = (DOCS / "equations.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if re.match(r"\| (Eq|V|Section)", line)]
    for *_, code, test in rows:
        assert named(code.strip("` "))
        assert named(test.strip("` |"))
    firsts = " ".join(row[0] for row in rows)
    for number in range(1, 13):
        assert re.search(rf"Eqs?\. (\d+, )?{number}\b", firsts), number
    for number in range(1, 14):
        assert re.search(rf"V{number}\b", firsts), number


def test_counts_of_the_fuzzer_are_those_of_its_rows():
    rows = read_rows(ROOT / "benchmarks" / "results" / "fuzz.jsonl")
    page = (DOCS / "robustness.md").read_text()
    for reader in {row["reader"] for row in rows}:
        read, refused = (
            sum(row.get(key, 0) for row in rows if row["reader"] == reader)
            for key in ("accepted", "refused")
        )
        assert f"| {reader} | {read + refused} | {read} | {refused} |" in page
    assert page.count("000 | ") == len({row["reader"] for row in rows})


SITE = runpy.run_path(str(DOCS / "conf.py"))
LINK = re.compile(r"\]\((?!https?:)([^)]+)\)")


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def links(page: Path) -> list[tuple[Path, str]]:
    """Return the files that a page links to or shows, and the headings in them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    targets = [target.partition("#") for target in LINK.findall(text)]
    return [((page.parent / path) if path else page, anchor) for path, _, anchor in targets]


def site_pages() -> dict[str, Path]:
    return {name: ROOT / name for name in SITE["include_patterns"]}


def test_every_page_is_on_the_site_in_the_order_of_the_reading_path():
    pages = site_pages()
    assert set(DOCS.glob("*.md")) <= set(pages.values())
    assert all(page.exists() for page in pages.values())
    first, *others = [f"docs/{target}" for target in LINK.findall((DOCS / "README.md").read_text())]
    order = [f"{name}.md" for name in SITE["READING_PATH"]]
    assert order == ["docs/README.md", first, *(name for name in others if "../" not in name)]


@pytest.mark.parametrize("name", SITE["include_patterns"])
def test_links_and_pictures_resolve_in_the_repository_and_on_the_site(name):
    page, pages = site_pages()[name], {path.resolve() for path in site_pages().values()}
    for path, anchor in links(page):
        there = path.resolve()
        assert there.exists(), f"{name}: {path}"
        assert there.is_relative_to(ROOT), f"{name}: {path} is outside of the repository"
        assert there in pages or there.suffix != ".md", f"{name}: {path} is not on the site"
        if anchor:
            assert anchor in anchors(there), f"{name}: {path}#{anchor}"


def test_a_link_to_a_folder_is_words_on_the_site():
    text = "[`kernels/`](kernels), [a file](kernels/api.py), ![a picture](docs/images/scaling.png)"
    found = SITE["links_to_folders_off"](text, ROOT)
    assert found == text.replace("[`kernels/`](kernels)", "`kernels/`")
    with_folders = [
        name for name in site_pages() for path, _ in links(ROOT / name) if path.is_dir()
    ]
    assert with_folders  # or the function has nothing to do


def test_every_picture_in_docs_is_shown_somewhere():
    shown = {path.resolve() for page in site_pages().values() for path, _ in links(page)}
    assert set((DOCS / "images").iterdir()) <= shown
