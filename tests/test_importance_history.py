"""Importance over a run: ranks, where they change, and the words for it, from made-up histories."""

import json

import numpy as np
import pytest

from tdmpc_prune.training import importance_history
from tests.commands import run

GROUPS = ("encoder.0", "latent", "reward.0")


def write(folder, values, metrics=("fisher",), unit="env_steps"):
    """A run whose groups had these importances, `[T, G]`, one hundred apart."""
    folder.mkdir()
    records = [
        {
            "kind": "importance",
            unit: 100 * (i + 1),
            "groups": {m: dict(zip(GROUPS, row, strict=True)) for m in (*metrics, "random")},
        }
        for i, row in enumerate(values)
    ]
    records.insert(2, {"kind": "cut", unit: 250, "step": 1})
    (folder / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "plans").mkdir()
    plan = {"format": "tdmpc_prune plan", "method": "x", "allocation": "x", "sparsity": 0.1}
    plan |= {"dense_parameters": 9, "widths": dict.fromkeys(GROUPS, 2), "removed": {}, "macs": {}}
    homes = ("encoder", "coupling", "reward")
    plan |= {"parameters": {}, "homes": dict(zip(GROUPS, homes, strict=True))}
    (folder / "plans" / "step-1.json").write_text(json.dumps(plan))
    return folder


SWAP = [[3.0, 2.0, 1.0]] * 4 + [[3.0, 1.0, 2.0]] * 2 + [[1.0, 2.0, 3.0]] * 2


def test_ranks_and_where_they_change(tmp_path):
    history = importance_history.read(write(tmp_path / "run", SWAP))
    assert history.unit == "env_steps" and history.cuts == (250,)
    assert history.coupling == ("latent",) and set(history.values) == {"fisher"}
    assert history.ranks("fisher")[:, 0].tolist() == [1, 2, 3]
    assert history.ranks("fisher")[:, -1].tolist() == [3, 2, 1]
    changed = np.zeros((3, 8), bool)
    changed[1:, 4] = True  # latent and reward change places
    changed[:, 6] = True
    assert np.array_equal(history.changes("fisher"), changed)


def test_the_summary_names_who_rose_fell_and_led(tmp_path):
    text = importance_history.summary(importance_history.read(write(tmp_path / "run", SWAP)))
    assert "rose reward.0 (rank 3.0 to 1.0); fell encoder.0 (rank 1.0 to 3.0)" in text
    assert "changed between 2 of 7 neighbouring times, start and end correlate with -1.00" in text
    assert "the coupling group latent led at 0 of 8 times (mean rank 2.2 of 3)" in text
    assert "before the first cut (2 times): first and last correlate with 1.00 to 1.00" in text
    assert text.endswith(
        "importance shifted (start against end, over the 1 gradient metrics: -1.00 to -1.00); "
        "the coupling group was never the most critical (0% to 0% of the times)"
    )


def test_what_does_not_move_is_said_not_to(tmp_path):
    still = [[1.0, 3.0, 2.0]] * 8
    text = importance_history.summary(importance_history.read(write(tmp_path / "run", still)))
    assert "rose none; fell none; the order changed between 0 of 7" in text
    assert "hardly shifted" in text and "always the most critical" in text


def test_a_group_that_vanishes_has_no_rank_any_more(tmp_path):
    folder = write(tmp_path / "run", [[3.0, 2.0, 1.0]] * 3 + [[3.0, float("nan"), 1.0]] * 3)
    history = importance_history.read(folder)
    ranks = history.ranks("fisher")
    assert ranks[[0, 2], -1].tolist() == [1, 2] and np.isnan(ranks[1, -1])
    assert not history.changes("fisher")[1].any() and history.changes("fisher")[2, 3]
    words = importance_history.summary(history)
    assert words.endswith("too few groups lasted to say whether importance shifted")
    importance_history.draw(history)


def test_a_run_that_tracks_random_alone_is_drawn_all_the_same(tmp_path):
    """It could not end once, because there was nothing to draw."""
    history = importance_history.read(write(tmp_path / "run", SWAP, metrics=()))
    assert set(history.values) == {"random"}
    importance_history.draw(history)
    assert "in this run" not in importance_history.summary(history)


def test_as_typed_from_a_run_of_an_agent(pruned_run, tmp_path):
    done = run("importance.py", f"run={pruned_run[0]}", "out=i", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"i.png", "i.md", "i.csv"} <= {path.name for path in tmp_path.iterdir()}
    for metric in ("bayesian", "fisher", "taylor", "gradient", "magnitude"):
        assert f"{metric}: rose " in done.stdout
    assert "in this run: importance " in done.stdout and "; the coupling group was " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nowhere"], "'nowhere' has no history of importance; only pruning runs have one"),
        ([], "checkpoint=… is needed"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, arguments, message):
    done = run("importance.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert not list(tmp_path.iterdir())
