"""Every Python block of the pages in docs/ runs as it stands, one after the other."""

import re
from pathlib import Path

import numpy as np
import pytest

import em_baseline

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["beyond_one_machine.md"]


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
