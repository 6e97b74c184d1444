"""The ways to decide side by side: what is said of them, the picture, and the page of machines."""

import json

import numpy as np
import pytest

from tdmpc_prune.deploy import candidates
from tests.commands import ROOT, run


def timed(what, cold, warm):
    return candidates.Candidate(what, cold, [2 * ms for ms in cold], [warm], [warm])


@pytest.fixture
def found():
    ways = [
        timed("dense parent", [30.0] * 20, 25.0),
        timed("PyTorch", [0.9] * 18 + [3.0] * 2, 0.8),
        timed("C", [0.1] * 19 + [50.0], 0.09),
    ]
    return candidates.Candidates(ways, 0.05, "Abacus", 8)


def test_a_rate_is_kept_by_95_percent_of_cold_decisions(found):
    assert [one.reached_hz for one in found.found] == [10, 100, 1000]
    rates = [[cell.strip() for cell in row.split("|")[1:-1]] for row in found.rates().splitlines()]
    assert rates[0][1:] == ["10 Hz", "50 Hz", "100 Hz", "400 Hz", "1000 Hz"]
    assert rates[2] == ["dense parent", "yes", "no", "no", "no", "no"]
    assert rates[3] == ["PyTorch", "yes", "yes", "yes", "90% of them", "90% of them"]
    assert rates[4] == ["C", *["yes"] * 5]
    assert "| 300.0, 277.8 " in found.text() and "8 numbers at once in C" in found.text()


def test_the_picture_and_the_page(found, tmp_path):
    assert found.picture().startswith(b"\x89PNG")
    line = found.line("mine")
    assert line == (
        "| Abacus | 8 | mine | 30.000; 25.000 | 0.900; 0.800 | — | 0.100; 0.090 | 0.050 |"
    )
    page = tmp_path / "machines.md"
    page.write_text(candidates.add_to_page(page, line))
    page.write_text(candidates.add_to_page(page, line))
    assert page.read_text().endswith(f"|\n{line}\n{line}\n")
    assert (ROOT / ".readme/machines.md").read_text().startswith(candidates.PAGE)


def test_benchmark_as_typed(pruned_run, tmp_path):
    arguments = [f"checkpoint={pruned_run[0]}", "episodes=1", "repeats=2", "device=cpu"]
    files = {"json": "speed.json", "picture": "speed.png", "page": "machines.md"}
    done = run("benchmark.py", *arguments, *map("=".join, files.items()), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| PyTorch " in done.stdout and "| 1000 Hz " in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == set(files.values())
    measured = json.loads((tmp_path / "speed.json").read_text())["candidates"]
    assert all(np.all(np.array(one["cold_cpu"]) > 0) for one in measured["found"])
    assert measured["reached_hz"].keys() == {one["what"] for one in measured["found"]}
    for setting in files:
        refused = run("benchmark.py", *arguments, f"{setting}=nowhere/x", cwd=tmp_path)
        assert refused.returncode == 2 and f"{setting}=nowhere/x cannot" in refused.stderr
