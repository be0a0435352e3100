"""Every Python block of the pages in docs/ runs as it stands; names and links are there."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

import em_baseline
from benchmarks.records import read_rows

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["beyond_one_machine.md", "theory.md", "your_data.md"]


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


def test_your_data(elsewhere, capsys):
    run("your_data.md")
    printed = capsys.readouterr().out
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
    rows = read_rows(DOCS.parent / "benchmarks" / "results" / "fuzz.jsonl")
    page = (DOCS / "robustness.md").read_text()
    for reader in {row["reader"] for row in rows}:
        read, refused = (
            sum(row.get(key, 0) for row in rows if row["reader"] == reader)
            for key in ("accepted", "refused")
        )
        assert f"| {reader} | {read + refused} | {read} | {refused} |" in page
    assert page.count("000 | ") == len({row["reader"] for row in rows})


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_between_the_pages_resolve():
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in anchors(there), f"{page.name}: {target}"
