"""Comparing runs: what is read from their folders, what is an arm, and what is said of it."""

import csv
import io
import itertools
import json

import pytest
from matplotlib.figure import Figure

from tdmpc_prune.analysis import compare, compare_report
from tdmpc_prune.errors import UserError
from tests.commands import run


def write_run(folder, method, seed, history, **settings):
    folder.mkdir(parents=True)
    values = {"task": "cartpole-swingup", "seed": seed, "prune": {"method": method, "steps": 8}}
    values |= {"run_dir": str(folder), "start_from": None, "eval_every": 100} | settings
    (folder / "run.json").write_text(json.dumps({"settings": values, "command": ["train.py"]}))
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    return folder


def evaluation(env_steps, returns, **size):
    return {"kind": "evaluation", "env_steps": env_steps, "returns": returns} | size


def tracking(env_steps, moment, returns, **size):
    return evaluation(env_steps, returns, **size) | {"kind": "tracking", "moment": moment}


DENSE = {"sparsity": 0.0, "parameters": 1000, "planning_macs": 9000, "decision_ms": 8.0}
HALF = {"sparsity": 0.5, "parameters": 500, "macs": 5000, "decision_ms": 6.0}
TENTH = {"sparsity": 0.9, "parameters": 100, "macs": 900, "decision_ms": 2.0}


def pruned_history(shift=0.0):
    """Two cuts; the second is undone, and the run goes on with the first's networks."""
    return [
        evaluation(100, [700 + shift], **DENSE),
        tracking(150, "before", [800 + shift], **DENSE),
        {"kind": "cut", "env_steps": 150, "step": 1},
        tracking(150, "after", [10 + shift], **HALF),
        tracking(200, "recovered", [780 + shift], **HALF),
        {"kind": "cut", "env_steps": 200, "step": 2},
        tracking(200, "after", [5 + shift], **TENTH),
        tracking(250, "not recovered", [50 + shift], **TENTH),
        {"kind": "undone", "env_steps": 250, "step": 2},
        evaluation(300, [790 + shift, 810 + shift], **HALF),
    ]


@pytest.fixture
def folders(tmp_path):
    dense = [evaluation(100, [600.0, 800.0], **DENSE), evaluation(300, [1000.0], **DENSE)]
    write_run(tmp_path / "dense1", "none", 1, dense)
    write_run(tmp_path / "pruned1", "bayesian", 1, pruned_history())
    write_run(tmp_path / "pruned2", "bayesian", 2, pruned_history(shift=-100))
    write_run(tmp_path / "starting", "random", 1, [])
    return tmp_path


def test_points_are_the_last_settled_measurement_of_each_network(folders):
    measured, without = compare.read(compare.find_runs([folders]))
    assert [path.name for path in without] == ["starting"]
    found = {(p.arm, p.cut): p for p in compare.points(measured)}
    assert set(found) == {("dense", 0), ("bayesian", 0), ("bayesian", 1), ("bayesian", 2)}
    assert found["bayesian", 2].last == []  # it was undone
    assert [m.mean for m in found["bayesian", 2].undone] == [50, -50]
    assert found["bayesian", 0].each == [800, 700]
    assert found["bayesian", 1].each == [800, 700]
    assert found["bayesian", 1].mean_of("sparsity") == 0.5
    assert found["bayesian", 1].mean_of("decision_ms") == 6.0
    assert found["dense", 0].each == [1000]


def test_table_csv_and_picture(folders):
    done = run("compare.py", str(folders), "--out", "here", cwd=folders)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 120
    above, _, below = (folders / "here.md").read_text().partition("The path of pruning:")
    (row,) = [line for line in above.splitlines() if "| bayesian" in line and "500" in line]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == [
        *("cartpole-swingup", "bayesian", "1", "2", "", "300", "0.500", "500", "5,000", "6.0"),
        *("750 (800, 700)", "75%"),
    ]
    (row,) = [line for line in below.splitlines() if "undone)" in line]
    assert [cell.strip() for cell in row.split("|")[2:6]] == [
        "bayesian",
        "2",
        "2 (1 undone)",
        "0.500",
    ]
    assert "left out: " in done.stdout and "starting" in done.stdout
    assert "| dense    | 100         | 1      | 700" in (folders / "here.md").read_text()
    rows = list(csv.DictReader(io.StringIO((folders / "here.csv").read_text())))
    episodes = 3 + 2 * 8
    assert len(rows) == episodes
    assert {row["moment"] for row in rows} >= {"evaluation", "after", "not recovered"}
    assert (folders / "here.png").stat().st_size > 10_000


def test_what_sets_an_arm_apart_is_in_its_name(tmp_path):
    for name, steps, seed in (("a", 1, 1), ("b", 8, 1), ("c", 8, 2)):
        prune = {"method": "bayesian", "steps": steps}
        write_run(tmp_path / name, "bayesian", seed, pruned_history(), prune=prune)
    prune = {"method": "bayesian", "steps": 8}
    write_run(tmp_path / "d", "bayesian", 1, pruned_history(), prune=prune, start_from="runs/x")
    measured, _ = compare.read(compare.find_runs([tmp_path]))
    arms = {m.run.rpartition("/")[2]: m.arm for m in measured}
    assert arms == {
        "a": "bayesian prune.steps=1",
        "b": "bayesian prune.steps=8",
        "c": "bayesian prune.steps=8",
        "d": "bayesian of a finished agent prune.steps=8",
    }


def test_runs_of_autoencoders_beside_them_are_none_of_its_business(folders):
    (folders / "autoencoder").mkdir()
    description = {"settings": {"data": {"name": "digits"}, "seed": 1}, "command": []}
    (folders / "autoencoder" / "run.json").write_text(json.dumps(description))
    assert folders / "autoencoder" not in compare.find_runs([folders])
    with pytest.raises(UserError, match="holds none"):
        compare.find_runs([folders / "autoencoder"])


def test_runs_of_one_seed_are_not_mixed_up(tmp_path):
    for name, value in (("a", 100.0), ("b", 200.0), ("c", 300.0)):
        history = [evaluation(100, [value], **DENSE)]
        settings = {"start_from": f"runs/{name}", "env_steps": 50_000 + int(value)}
        write_run(tmp_path / name, "bayesian", 1, history, **settings)
    (point,) = compare.points(compare.read(compare.find_runs([tmp_path]))[0])
    assert sorted(point.each) == [100, 200, 300]
    assert point.arm == "bayesian of a finished agent"


def test_a_share_of_dense_is_at_equal_env_steps_or_says_at_which(tmp_path):
    dense = [evaluation(steps, [value], **DENSE) for steps, value in ((100, 500.0), (200, 1000.0))]
    write_run(tmp_path / "dense", "none", 1, dense)
    pruned = [
        tracking(100, "before", [400.0], **DENSE),
        {"kind": "cut", "env_steps": 100, "step": 1},
        tracking(100, "after", [10.0], **HALF),
        tracking(201, "recovered", [800.0], **HALF),
        {"kind": "cut", "env_steps": 201, "step": 2},
        evaluation(300, [900.0], **TENTH),
    ]
    write_run(tmp_path / "pruned", "bayesian", 1, pruned)
    measured, _ = compare.read(compare.find_runs([tmp_path]))
    shares = [
        line.split("|")[-2].strip() for line in compare_report.table(measured).splitlines()[2:6]
    ]
    assert shares == ["80%", "80%", "90% (dense at 200)", "100%"]


def test_times_of_the_end_stand_for_those_meanwhile(tmp_path):
    agents = {name: {"decision_ms": {"median": ms, "p95": 2 * ms}} for name, ms in
              (("dense", 4.0), ("step-1", 3.0), ("final", 3.1))}  # fmt: skip
    times = {"kind": "times", "env_steps": 300, "agents": agents}
    write_run(tmp_path / "run", "bayesian", 1, [*pruned_history(), times])
    found = compare.points(compare.read([tmp_path / "run"])[0])
    assert [p.mean_of("decision_ms") for p in found[:2]] == [4.0, 3.0]
    assert "CPU time per decision, measured at the end of a run" in compare_report.table(
        compare.read([tmp_path / "run"])[0]
    )


def test_tick_labels_do_not_overlap():
    figure = Figure(figsize=(8, 3), layout="constrained")  # as wide as in a picture
    for place, scale in enumerate(("linear", "log"), start=1):
        axis = figure.add_subplot(1, 2, place)
        axis.set_xscale(scale)
        axis.set_xlim(15e6, 500e6)
        compare_report.short_ticks(axis)
        figure.draw_without_rendering()
        low, high = axis.get_xlim()
        ticks = [t for t in axis.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
        boxes = [tick.label1.get_window_extent() for tick in ticks]
        assert len(boxes) > 1
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_the_path_of_pruning_is_shown(tmp_path):
    """One deep cut against two, at equal end; and a third arm that is no equal."""
    several = [
        evaluation(100, [700.0], **DENSE),
        tracking(150, "before", [800.0], **DENSE),
        {"kind": "cut", "env_steps": 150, "step": 1},
        tracking(150, "after", [300.0], **HALF),
        tracking(200, "recovered", [780.0], **HALF),
        {"kind": "cut", "env_steps": 200, "step": 2},
        tracking(200, "after", [200.0], **TENTH),
        tracking(300, "recovered", [750.0], **TENTH),
        evaluation(300, [760.0], **TENTH),
    ]
    one = [
        tracking(200, "before", [810.0], **DENSE),
        {"kind": "cut", "env_steps": 200, "step": 1},
        tracking(200, "after", [20.0], **TENTH),
        evaluation(300, [740.0], **TENTH),
    ]
    half = [*several[:5], evaluation(300, [790.0], **HALF)]
    for name, steps, history in (("several", 2, several), ("one", 1, one)):
        prune = {"method": "bayesian", "steps": steps}
        write_run(tmp_path / name, "bayesian", 1, history, prune=prune)
    write_run(tmp_path / "dense", "none", 1, [evaluation(300, [850.0], **DENSE)])
    done = run("compare.py", ".", "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 120
    written = (tmp_path / "here.md").read_text()
    rows = written.partition("The path of pruning:")[2].strip().splitlines()[2:4]
    cells = [[cell.strip() for cell in row.split("|")[2:-1]] for row in rows]
    end = ["0.900", "300", "100"]
    assert cells == [
        ["bayesian prune.steps=1", "1", "1", *end, "810 (810)", "20 (20)", "740 (740)"],
        ["bayesian prune.steps=2", "1", "2", *end, "800 (800)", "200 (200)", "760 (760)"],
    ]
    assert "not at equal" not in done.stdout
    assert (tmp_path / "here-path.png").stat().st_size > 10_000
    write_run(tmp_path / "half", "random", 1, half)
    done = run("compare.py", ".", "--out", "here", cwd=tmp_path)
    assert "not at equal sparsity (0.500 to 0.900)" in done.stdout
    without = run("compare.py", "dense", "--out", "there", cwd=tmp_path)
    assert "The path" not in without.stdout and not (tmp_path / "there-path.png").exists()


def test_curves_meet_where_episodes_end_at_different_times(tmp_path):
    for seed, late in ((1, 3), (2, 19)):
        history = [
            evaluation(100 + late, [10.0 * seed], **DENSE),
            evaluation(200 + late, [20.0 * seed], **DENSE),
        ]
        write_run(tmp_path / str(seed), "none", seed, history)
    (curve,) = compare.curves(compare.read(compare.find_runs([tmp_path]))[0]).values()
    assert curve == {100: [10.0, 20.0], 200: [20.0, 40.0]}


def test_a_line_that_was_never_finished_is_left_out(folders):
    with (folders / "dense1" / "history.jsonl").open("a") as history:
        history.write('{"kind": "evaluation", "env_st')
    assert len(compare.read([folders / "dense1"])[0]) == 2


def test_histories_of_older_releases_lack_sizes(tmp_path):
    write_run(tmp_path / "old", "none", 1, [evaluation(100, [1.0])])
    measured, _ = compare.read([tmp_path / "old"])
    assert compare.points(measured)[0].mean_of("sparsity") is None
    assert compare_report.picture(measured).startswith(b"\x89PNG")


def test_wrong_input_is_one_line(folders):
    (folders / "empty").mkdir()
    for arguments, message in (
        (["empty"], "holds none"),
        (["starting"], "has not been evaluated yet"),
        (["dense1", "--out", "nowhere/x"], "--out=nowhere/x.md cannot be written"),
    ):
        done = run("compare.py", *arguments, cwd=folders)
        assert done.returncode in (1, 2)
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], done.stderr
    with pytest.raises(UserError, match="is not the folder of an agent's run"):
        compare.find_runs([folders / "nowhere"])
