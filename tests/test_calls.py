"""Runs from Python: the same as the commands', with the same checks."""

import pytest

from tdmpc_prune import UserError, evaluate, load, load_agent, prune, train
from tdmpc_prune.evaluation import Evaluation
from tests.commands import REACH, SMALL, run

TINY = {
    "task": REACH.removeprefix("task="),
    **{
        name: int(value) if value.isdigit() else value
        for name, value in (word.split("=") for word in SMALL if not word.startswith("task="))
    },
}
CUT = {"steps": 1, "sparsity": 0.4, "min_width": 2, "round_to": 1, "max_return_drop": 10}


def test_a_run_from_python_is_that_of_the_command(tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(tmp_path)
    ours = train(**TINY, run_dir="ours")
    done = run("train.py", *SMALL, "run_dir=theirs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = [load_agent(tmp_path / name).model.state_dict() for name in ("ours", "theirs")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    kinds = [line["kind"] for line in ours.history]
    assert kinds.count("evaluation") == 2 and ours.measured.returns
    assert load(ours.folder)([0.5]).shape == (1,)

    cut = prune(
        ours.folder,
        env_steps=40,
        eval_every=40,
        eval_episodes=1,
        run_dir="cut",
        **{f"prune.{name}": value for name, value in CUT.items()},
        seed=3,
    )
    assert load_agent(cut.folder).size()["sparsity"] >= 0.4
    assert [line["kind"] for line in cut.history].count("cut") == 1
    longer = train(resume="ours", env_steps=140)
    assert longer.now == 140


def test_groups_are_dicts_and_choices_are_names(tmp_path, undrawn):
    settings = TINY
    done = train(
        **settings,
        prune="magnitude",
        run_dir=str(tmp_path / "run"),
        **{
            "prune.protect": ["policy"],
            "prune.steps": 1,
            "prune.start": 0.5,
            "prune.sparsity": 0.3,
            "prune.min_width": 2,
            "prune.round_to": 1,
        },
    )
    assert done.config.prune.protect == ["policy"] and done.config.prune.method == "magnitude"
    assert done.config.model.planner.samples == 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "cartpole-swngup"}, "the closest are cartpole-swingup"),
        ({"sede": 3}, "unknown setting 'sede'; did you mean seed"),
        ({"prune": "nothing"}, "prune=nothing is not a choice"),
        ({"model": {"planner": {"elites": 300}}}, "elites=300 cannot exceed"),
        ({"resume": "nowhere"}, "'nowhere' is not the folder of a run"),
    ],
)
def test_wrong_settings_are_named(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=message) as error:
        train(**settings)
    assert isinstance(error.value, (UserError, ValueError)) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_how_much_actions_change_is_measured(small_run):
    agent = load_agent(small_run[0])
    found = evaluate(agent, 2, 0)
    assert 0 < found.mean_change <= found.largest_change <= 2
    assert Evaluation([1.0], 2, 0.1).mean_change is None
    done = run("evaluate.py", str(small_run[0]), "episodes=2", "decisions=torch", cwd=small_run[0])
    said = f"changes by {found.mean_change:.2f} on average and {found.largest_change:.2f} at most"
    assert done.returncode == 0 and said in " ".join(done.stdout.split())
