"""Returns beside the published ones: what is averaged, what is refused, and what the page says."""

import csv
import io
import json
import tomllib

import pytest
from matplotlib.figure import Figure

from tdmpc_prune.analysis import compare, published, returns, returns_report
from tdmpc_prune.errors import UserError
from tests.commands import ROOT, run
from tests.test_compare import evaluation, write_run

MODEL = {"learning": {"seed_decisions": 500, "updates_per_decision": 2.0}}


def dense(folder, task, seed, curve, **settings):
    """A dense run that was evaluated as `curve` says: env steps → return of each episode."""
    history = [evaluation(env_steps, each) for env_steps, each in curve.items()]
    return write_run(folder, "none", seed, history, task=task, eval_every=5_000, **settings)


@pytest.fixture
def folders(tmp_path):
    first = {25_000: [800.0, 900.0], 50_000: [860.0], 100_000: [880.0, 884.0]}
    dense(tmp_path / "cartpole-1", "cartpole-swingup", 1, first, model=MODEL)
    second = {24_600: [700.0], 50_400: [840.0]}
    dense(tmp_path / "cartpole-2", "cartpole-swingup", 2, second, model=MODEL)
    dense(tmp_path / "cheetah", "cheetah-run", 1, {26_000: [10.0]})
    dense(tmp_path / "pendulum", "gym:Pendulum-v1", 1, {25_000: [-1200.0, -1000.0]})
    write_run(tmp_path / "starting", "none", 3, [])
    return tmp_path


def rows(text):
    """The first table of a Markdown text: cells by the names of the columns."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    names, _, *found = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines[start:]
        if line.startswith("|")
    ][: next((i for i, line in enumerate(lines[start:]) if not line), len(lines))]
    return [dict(zip(names, cells, strict=True)) for cells in found]


def test_page_csv_and_picture(folders):
    done = run("compare.py", ".", "--published", "--out", "here", cwd=folders)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 120
    page = (folders / "here.md").read_text()
    first, second, third, *others = rows(page)
    assert first == {
        "task": "cartpole-swingup",
        "env steps": "25,000",
        "ours (each seed)": "775 (850, 700)",
        "seeds": "2 (1, 2)",
        "episodes of each": "2, 1",
        "published: TD-MPC": "98 ± 17 (5 seeds) at 20,000, before its first update; "
        "574 ± 123 (5 seeds) at 40,000",
        "published: others": "BRO 848 ± 22",
    }
    assert (second["ours (each seed)"], second["episodes of each"]) == ("850 (860, 840)", "1")
    assert (third["env steps"], third["seeds"]) == ("100,000", "1 (1)")
    assert third["published: TD-MPC"] == "859 ± 7 (5 seeds)"
    assert third["published: others"] == "TD-MPC2 839 ± 43 (3 seeds); SimbaV2 880 ± 2"
    # An evaluation a whole episode away is none, and 100,000 has a row only where ours got there.
    assert [row["env steps"] for row in others] == ["25,000", "50,000"] * 2
    assert [row["seeds"] for row in others] == ["0", "0", "1 (1)", "0"]
    assert others[2]["ours (each seed)"] == "-1100 (-1100)"
    assert "Nothing published is on file of gym:Pendulum-v1." in page
    assert "left out: 'starting' has not been evaluated yet" in page and "starting" in done.stdout
    assert "python scripts/compare.py . --published --out here\n```" in page

    found = list(csv.DictReader(io.StringIO((folders / "here.csv").read_text())))
    ours = [row for row in found if row["agent"] == "this project"]
    assert [(row["env_steps"], row["mean"], row["episodes"]) for row in ours[:2]] == [
        ("25000", "850.000", "2"),
        ("50000", "860.000", "1"),
    ]
    assert len(ours) == 3 + 2 + 1 + 1 and all(row["source"] for row in found)
    of_tasks = [f for f in published.figures() if f.task in ("cartpole-swingup", "cheetah-run")]
    assert len(found) == len(ours) + len(of_tasks)
    assert (folders / "here.png").stat().st_size > 10_000


def test_the_page_says_how_each_agent_begins(folders):
    found, without = returns.read(compare.find_runs([folders]))
    page = returns_report.page(found, without, "x/here", "command")
    agents = {row["agent"]: row for row in rows(page.partition("## What the agents do")[2])}
    assert {"TD-MPC", "TD-MPC2", "BRO", "Simba", "SimbaV2", "MR.Q"} < set(agents)
    assert all(row["action repeat"] for row in agents.values())
    assert agents["BRO"]["updates per decision"] == "10" and "here.png" in page
    lines = [line for line in page.splitlines() if line.startswith("| this project")]
    cartpole, others = ([cell.strip() for cell in line.split("|")[2:5]] for line in lines)
    begins = "500 random decisions; env steps: 4,000 (cartpole-swingup); then 1,000 updates at once"
    assert cartpole == ["8 (cartpole-swingup)", begins, "2"]
    assert others[0] == "4 (cheetah-run), 1 (gym:Pendulum-v1)"


def test_tasks_come_in_the_order_of_the_benchmark(tmp_path):
    tasks = ["gym:Pendulum-v1", "cartpole-balance", *reversed(returns.TASKS)]
    for i, task in enumerate(tasks):
        dense(tmp_path / str(i), task, 1, {25_000: [1.0]})
    found, _ = returns.read(compare.find_runs([tmp_path]))
    assert [own.task for own in found] == [
        *returns.TASKS,
        "cartpole-balance",
        "gym:Pendulum-v1",
    ]


def test_no_task_of_ours_has_published_figures(tmp_path):
    dense(tmp_path / "a", "gym:Pendulum-v1", 1, {5_000: [-900.0], 10_000: [-300.0]})
    done = run("compare.py", "a", "--published", "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "here.md").read_text()
    assert "Nothing published is on file of gym:Pendulum-v1." in page and "BRO" not in page
    assert (tmp_path / "here.png").is_file()


def test_a_curve_joins_seeds_at_equal_env_steps(tmp_path):
    dense(tmp_path / "1", "cheetah-run", 1, {5_000: [1.0], 10_000: [2.0], 15_000: [3.0]})
    dense(tmp_path / "2", "cheetah-run", 2, {5_000: [1.0], 10_500: [4.0], 12_000: [9.0]})
    (own,) = returns.read(compare.find_runs([tmp_path]))[0]
    assert [[m.mean for m in point] for point in own.curve()] == [[1, 1], [2, 4], [9], [3]]


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({}, {}, "are one seed twice: cheetah-run, seed=1"),
        ({}, {"prune": {"method": "bayesian"}}, "differ in prune (none and bayesian)"),
        ({}, {"start_from": "runs/x"}, "differ in start_from (None and runs/x)"),
        ({"action_repeat": 4}, {"action_repeat": 2}, "differ in action_repeat (4 and 2)"),
        (
            {"model": {"planner": {"samples": 512}}},
            {"seed": 2},
            "differ in model.planner.samples (512 and 256)",
        ),
    ],
)
def test_runs_that_cannot_be_averaged_are_refused(tmp_path, one, other, message):
    for name, settings in (("one", one), ("other", other)):
        settings = {"task": "cheetah-run", "eval_every": 5_000, "seed": 1} | settings
        seed, method = settings.pop("seed"), settings.pop("prune", {"method": "none"})["method"]
        write_run(tmp_path / name, method, seed, [evaluation(5_000, [1.0])], **settings)
    done = run("compare.py", "one", "other", "--published", cwd=tmp_path)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and message in line and "'one' and 'other'" in line
    assert not list(tmp_path.glob("compare.*"))


def test_what_is_told_by_its_own_settings_is_no_difference(tmp_path):
    """A task's own action repeat, given or not; other seeds, lengths, threads."""
    dense(tmp_path / "1", "cheetah-run", 1, {5_000: [1.0]}, action_repeat=4, threads=2)
    dense(tmp_path / "2", "cheetah-run", 2, {5_000: [3.0]}, env_steps=100_000)
    (own,) = returns.read(compare.find_runs([tmp_path]))[0]
    assert [found.seed for found in own.runs] == [1, 2] and own.action_repeat == 4
    assert returns.mean_of(own.at(5_000)) == 2


def test_a_run_that_is_not_dense_or_not_from_scratch_is_refused(tmp_path):
    pruned = [evaluation(5_000, [1.0])]
    write_run(tmp_path / "pruned", "bayesian", 1, pruned, task="cheetah-run")
    with pytest.raises(UserError, match=r"'.*pruned' is not a dense run: prune=bayesian"):
        returns.read([tmp_path / "pruned"])
    dense(tmp_path / "later", "cheetah-run", 1, {5_000: [1.0]}, start_from="runs/x")
    with pytest.raises(UserError, match=r"'.*later' is not from scratch: start_from=runs/x"):
        returns.read([tmp_path / "later"])


def test_runs_without_an_evaluation_make_no_page(tmp_path):
    write_run(tmp_path / "starting", "none", 1, [])
    done = run("compare.py", "starting", "--published", cwd=tmp_path)
    assert done.returncode == 2 and "'starting' has not been evaluated yet" in done.stderr
    assert not (tmp_path / "compare.md").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["seed={}", "run_dir=/y/{}"], "for seed in 1 2 5; do {} seed=$seed; done"),
        (["seed=1,2,5", "-m"], "{} seed=1,2,5 -m"),
    ],
)
def test_commands_that_differ_in_the_seed_alone_are_one_line(tmp_path, arguments, line):
    for seed in (1, 2, 5):
        folder = dense(tmp_path / str(seed), "cheetah-run", seed, {5_000: [1.0]})
        described = json.loads((folder / "run.json").read_text())
        words = [argument.format(seed) for argument in arguments]
        described["command"] = ["/x/train.py", "task=cheetah-run", *words]
        (folder / "run.json").write_text(json.dumps(described))
    page = returns_report.page(*returns.read(compare.find_runs([tmp_path])), "here", "this")
    made = line.format("python scripts/train.py task=cheetah-run")
    assert f"```sh\n{made}\nthis\n```" in page


def test_every_published_figure_is_whole():
    figures = published.figures()
    assert {figure.task for figure in figures} >= set(returns.TASKS)
    assert all(figure.source and figure.agent in published.AGENTS for figure in figures)
    assert len({(f.agent, f.task, f.env_steps) for f in figures}) == len(figures)
    assert all(0 <= figure.mean <= 1000 for figure in figures)
    assert all(agent.action_repeat and agent.source for agent in published.AGENTS.values())
    assert all(name in returns_report._STYLE for name in published.AGENTS)


def test_the_published_figures_are_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    data = project["tool"]["setuptools"]["package-data"]["tdmpc_prune.analysis"]
    assert published.TABLE.name in data and published.TABLE.parent.name == "analysis"


def test_nothing_published_is_interpolated():
    """TD-MPC was evaluated every 20,000 env steps, and TD-MPC2 not before 100,000."""
    for figure in published.figures():
        if figure.agent == "TD-MPC":
            assert figure.env_steps % 20_000 == 0
        assert figure.agent != "TD-MPC2" or figure.env_steps == 100_000


def test_every_figure_has_a_place_in_the_picture(folders, monkeypatch):
    """A panel for each task and one place for the legend, of agents that are shown."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    found, _ = returns.read(compare.find_runs([folders]))
    returns_report.picture(found)
    panels, legend = drawn[0].axes[: len(found)], drawn[0].axes[len(found)]
    assert [axis.get_title() for axis in panels] == [own.task for own in found]
    assert panels[0].get_xlim()[1] >= 100_000
    labels = [text.get_text() for text in legend.get_legend().get_texts()]
    assert labels[0].startswith("this project") and "MR.Q" in labels and "BMPC" not in labels
    (curve,) = [line for line in panels[0].lines if line.get_linewidth() == 2]
    assert list(curve.get_ydata()) == [775, 850, 882]
