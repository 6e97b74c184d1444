"""Pruning while training: records, exact resume, exact rollback, finished agents, wrong input."""

import copy
import json
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.world_model import Widths
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.evaluation import Evaluation
from tdmpc_prune.pruning.config import METRICS
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.surgery import SurgeryError
from tdmpc_prune.saving.agents import load_agent, save_agent
from tdmpc_prune.saving.run_folder import RunFolder, checkpoint_dir, load_training
from tdmpc_prune.settings import to_plain
from tdmpc_prune.signals import Stopped
from tdmpc_prune.training import launch
from tdmpc_prune.training import log as run_log
from tdmpc_prune.training import report as pruning_report
from tdmpc_prune.training.config import AutoencoderConfig, PruneCheckpointConfig
from tests.commands import REACH, SMALL, run
from tests.small import PRUNE, pruning_config, small_config
from tests.test_resume import Killed, assert_same_run

pytestmark = pytest.mark.usefixtures("undrawn")


def resume(run_dir):
    return launch.resume(small_config(run_dir, resume=str(run_dir)), ["resume"])


def pruning_state(run_dir):
    """The tracker's tensors and the stage in the newest checkpoint, without wall-clock times."""
    training, files = load_training(checkpoint_dir(run_dir))
    stage = training["pruning"]["stage"]
    for moment in ("before", "after", "recovered"):
        stage["record"].get(moment, {}).pop("decision_ms", None)
    return training["pruning"], files["pruning"]


def assert_same_pruning(ours, theirs):
    assert_same_run(ours, theirs)
    (stage, tensors), (other_stage, others) = pruning_state(ours), pruning_state(theirs)
    assert stage == other_stage
    assert set(tensors) == set(others)
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert load_agent(ours).model.widths == load_agent(theirs).model.widths


@pytest.fixture
def whole_run(pruned_run):
    return pruned_run


def test_a_run_is_pruned_in_steps_and_says_what_each_did(whole_run):
    run_dir, pruning = whole_run
    assert [due for _, due in pruning][:3] == ["measure", "cut", "measure"]
    cuts, steps = (
        RunFolder(run_dir).read_history("cut"),
        RunFolder(run_dir).read_history("pruning step"),
    )
    assert [cut["step"] for cut in cuts] == [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["kept"] for step in steps)
    assert [cut["env_steps"] for cut in cuts] == [80, 120, 160]
    assert all(cut["sparsity"] >= cut["target"] for cut in cuts)
    assert 0.7 <= cuts[-1]["sparsity"] < 0.8
    for step in steps:
        for moment in ("before", "after", "recovered"):
            assert set(step[moment]) == {"mean", "std"}
        if step["after"]["mean"] >= step["before"]["mean"] - 0.05 * abs(step["before"]["mean"]):
            assert step["recovery"] == 0
    moments = [t["moment"] for t in RunFolder(run_dir).read_history("tracking") if t["step"] == 2]
    assert moments[:2] == ["before", "after"] and moments[-1] == "recovered"

    dense = load_agent(run_dir / "agents" / "dense")
    assert dense.provenance["pruning"]["sparsity"] == 0 and dense.parent is None
    for cut in cuts:
        kept = load_agent(run_dir / "agents" / f"step-{cut['step']}")
        assert sum(p.numel() for p in kept.model.parameters()) == cut["parameters"]
        assert kept.parent.resolve() == (run_dir / "agents" / "dense").resolve()

    agent = load_agent(run_dir)
    assert agent.parent.resolve() == (run_dir / "agents" / "dense").resolve()
    left = sum(p.numel() for p in agent.model.parameters())
    assert left == cuts[-1]["parameters"]
    said = agent.provenance["pruning"]
    assert set(RunFolder(run_dir).read_history("importance")[0]["components"]["bayesian"]) == {
        *("encoder", "dynamics", "reward", "policy", "q_ensemble.0", "q_ensemble.1", "coupling")
    }
    assert (said["method"], said["cuts"], said["parameters"]) == ("bayesian", 3, left)
    assert said["dense_score"] == steps[0]["before"]["mean"]
    assert said["sparsity"] == pytest.approx(1 - left / said["dense_parameters"])


def test_tensorboard_and_pictures_show_it(whole_run):
    run_dir, _ = whole_run
    events = EventAccumulator(str(run_dir))
    events.Reload()
    scalars = events.Tags()["scalars"]
    tracked = RunFolder(run_dir).read_history("tracking")
    both = RunFolder(run_dir).read_history("tracking", "evaluation")
    for tag, key, records in (
        ("pruning/return", "mean", tracked),
        ("networks/sparsity", "sparsity", both),
        ("networks/macs", "macs", both),
    ):
        logged = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in logged] == [record["env_steps"] for record in records]
        assert [value for _, value in logged] == pytest.approx([r[key] for r in records])
    names = RunFolder(run_dir).read_history("importance")[0]["groups"]["bayesian"]
    groups = {f"unit importance by group/{metric}/{name}" for metric in METRICS for name in names}
    assert len(names) == 12 and groups <= set(scalars)
    assert "unit importance by component/bayesian/coupling" in scalars
    assert "unit rank correlation/bayesian ~ magnitude" in scalars
    assert all(tag.startswith("unit ") for tag in sorted(scalars)[-len(METRICS) * len(names) :])
    assert {"pruning/importance", "pruning/course"} <= set(events.Tags()["images"])
    for picture in ("course.png", "importance.png"):
        assert (run_dir / picture).stat().st_size > 10_000


@pytest.mark.parametrize("method", ["none", "fisher"])
def test_hyperparameters_start_with_what_tells_runs_apart(tmp_path, method):
    settings = to_plain(small_config(tmp_path, prune=replace(PRUNE, method=method)))
    shown = run_log._shown(settings)
    dense = method == "none"
    assert list(shown)[:4] == ["task", "method", "sparsity", "seed"]
    assert list(shown.values())[1:3] == (["dense", 0.0] if dense else ["fisher", 0.7])
    assert any(name.startswith("prune.") for name in shown) == (not dense)
    plain = to_plain(AutoencoderConfig())
    assert run_log._shown(plain)["task"] == f"autoencoder of {plain['data']['name']}"


def test_importance_is_on_file_for_every_metric(whole_run):
    for record in RunFolder(whole_run[0]).read_history("importance"):
        assert set(record["groups"]) == set(METRICS)
        assert record["correlations"]["gradient ~ taylor"] <= 1
    densities = RunFolder(whole_run[0]).read_history("importance")[0]["groups"]
    assert all(value > 0 for value in densities["bayesian"].values())


STOPS = [*((which, False) for which in (1, 2, 4)), *((which, True) for which in (0, 1, 2, 3, 7))]


@pytest.mark.parametrize(
    ("which", "saved"),  # the last of each kind here, all others with -m slow
    [pytest.param(*stop, marks=[pytest.mark.slow] * (stop[0] not in (4, 7))) for stop in STOPS],
)
def test_a_run_stopped_in_a_pruning_step_resumes_exactly(whole_run, tmp_path, which, saved):
    """Killed before the step's `which`-th action, or stopped with its state saved after it."""
    whole, pruning = whole_run
    left = pruning[which][0]
    trainer = launch.start(pruning_config(tmp_path / "run"), [])

    def interrupted(step=trainer.step):
        nonlocal left
        left -= 1
        if left < 0:
            if not saved:
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    trainer.step = interrupted
    with pytest.raises(Stopped if saved else Killed):
        trainer.run()
    resume(tmp_path / "run").run()
    assert_same_pruning(whole, tmp_path / "run")


def returns(monkeypatch, script):
    """Let evaluations return what `script(cut count)` says."""

    def evaluate(agent, *_, **__):
        value = script(sum(p.numel() for p in agent.model.parameters()))
        return Evaluation([value, value], 1, 0.0)

    monkeypatch.setattr("tdmpc_prune.training.agent.evaluate", evaluate)


def everything(trainer):
    """Networks, optimisers and tracker, bit for bit."""
    return {name: tensor.clone() for name, tensor in trainer.pruner._snapshot().items()}


def test_what_is_cut_is_the_average_that_was_measured(tmp_path):
    trainer, cut = launch.start(pruning_config(tmp_path / "run"), []), []

    def watch(step=trainer.step):
        first = trainer.pruner.due(trainer.now) == "cut" and not cut
        trainee = trainer.trainee
        played = copy.deepcopy(trainee.agent().model.state_dict())
        apart = not torch.equal(played["policy.0.weight"], trainee.model.policy[0].weight)
        left = step()
        if first and trainer.pruner.sparsity:
            cut.append(apart)
            before, _ = trainer.pruner.before_cut()
            assert all(torch.equal(before[name], weights) for name, weights in played.items())
            assert trainee.learner.average is None
        return left

    trainer.step = watch
    trainer.run()
    assert cut == [True]


def test_a_step_that_does_not_recover_is_undone_exactly(tmp_path, monkeypatch, capsys):
    """Every agent under 600 parameters is said to be bad; what the first cut leaves is not."""
    config = pruning_config(tmp_path / "run")
    config = replace(config, prune=replace(config.prune, max_return_drop=0.1), env_steps=400)
    returns(monkeypatch, lambda parameters: 100.0 if parameters > 900 else 50.0)
    trainer = launch.start(config, [])
    before, undone = {}, []

    def watch(step=trainer.step):
        due = trainer.pruner.due(trainer.now)
        at_rest = trainer.trainee.episode is None and trainer.trainee.progress.updates_due < 1
        sparsity = trainer.pruner.sparsity
        if at_rest and due == "cut":
            trainer.trainee.settle()  # the cut is of the average
            before.clear()
            before.update(everything(trainer))
        left = step()
        if at_rest and due == "undo":
            after = everything(trainer)
            assert set(after) == set(before)
            assert all(torch.equal(after[name], before[name]) for name in before)
            undone.append((sparsity, trainer.pruner.sparsity))
        return left

    trainer.step = watch
    trainer.run()
    steps = RunFolder(tmp_path / "run").read_history("pruning step")
    failed = [step for step in steps if not step["kept"]]
    assert failed and len(failed) == len(undone)
    assert all(step["recovered"]["mean"] == 50 and step["least"] == 90 for step in failed)
    assert "UNDONE: below 90" in capsys.readouterr().out
    assert load_agent(tmp_path / "run").provenance["returns"] == [100.0, 100.0]
    assert trainer.now == 400  # the run went on
    # What follows an undone step aims halfway to it.
    number = steps.index(failed[0])
    if number + 1 < len(steps):
        kept = undone[0][1]
        assert steps[number + 1]["target"] <= (kept + failed[0]["sparsity"]) / 2 + 1e-9
    (last,) = RunFolder(tmp_path / "run").read_history("undone")[-1:]
    assert last["sparsity"] == pytest.approx(undone[-1][1])
    agent = load_agent(tmp_path / "run")
    assert agent.provenance["pruning"]["cuts"] == len(steps) - len(failed)


@pytest.mark.parametrize(
    "part",  # seconds each
    [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2))],
)
def test_a_run_killed_around_an_undone_step_resumes_exactly(once, tmp_path, monkeypatch, part):
    returns(monkeypatch, lambda parameters: 100.0 if parameters > 900 else 50.0)

    def start(run_dir):
        config = pruning_config(run_dir)
        return launch.start(replace(config, prune=replace(config.prune, max_return_drop=0.1)), [])

    whole = once("undone", lambda folder: start(folder / "run").run().mean)[0] / "run"
    assert any(not step["kept"] for step in RunFolder(whole).read_history("pruning step"))
    trainer = start(tmp_path / "run")

    def interrupted(step=trainer.step):
        due = trainer.pruner.due(trainer.now)
        cut = trainer.pruner.stage.phase in ("cut", "recovering") and trainer.pruner
        if part == 0 and due == "undo":
            raise Killed
        if part == 1 and cut and trainer.pruner.stage.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        left = step()
        if part == 2 and due == "undo" and trainer.pruner.stage.phase == "waiting":
            raise Killed
        return left

    trainer.step = interrupted
    with pytest.raises((Killed, Stopped)):
        trainer.run()
    resume(tmp_path / "run").run()
    assert_same_pruning(whole, tmp_path / "run")


def undoing_config(run_dir, **changes):
    """Two cuts, of which the last asks for more than the scripted returns allow; then time."""
    config = pruning_config(run_dir, env_steps=400)
    prune = replace(config.prune, start=0.2, end=0.4, steps=2, max_return_drop=0.1, compare=False)
    return replace(config, prune=replace(prune, **changes))


@pytest.mark.drawn
def test_an_undone_cut_is_tried_again_smaller_while_there_is_time(tmp_path, monkeypatch):
    returns(monkeypatch, lambda parameters: 100.0 if parameters > 900 else 50.0)
    run_dir = tmp_path / "run"
    trainer = launch.start(undoing_config(run_dir), [])
    said = launch.finish(trainer)
    steps = RunFolder(run_dir).read_history("pruning step")
    assert len(steps) > 3 and not steps[1]["kept"]
    assert steps[2]["cut_at"] == steps[1]["until"]  # at once
    present, failed = steps[0]["sparsity"], steps[1]["sparsity"]
    for step in steps[2:]:
        assert step["target"] <= (present + failed) / 2 + 1e-9 and step["sparsity"] < failed
        assert step["until"] - step["cut_at"] >= 40  # the usual time to recover
        present, failed = (
            (step["sparsity"], failed) if step["kept"] else (present, step["sparsity"])
        )
    assert present > steps[0]["sparsity"] or all(not step["kept"] for step in steps[2:])

    (end,) = RunFolder(run_dir).read_history("end")
    assert end == [*map(json.loads, (run_dir / "history.jsonl").read_text().splitlines())][-1]
    assert end["asked_sparsity"] == 0.7 and end["sparsity"] == pytest.approx(present)
    assert end["undone"] == sum(not step["kept"] for step in steps)
    last = [step for step in steps if not step["kept"]][-1]
    why = f"cut {last['step']} (to {last['sparsity']:.3f}) was undone because its return 50 stayed"
    assert end["shortfall"].startswith(f"{why} below 90; ")
    assert "0.7 was asked for" in said and f"less than asked for: {why}" in said
    assert load_agent(run_dir).provenance["pruning"]["shortfall"] == end["shortfall"]


def test_a_smaller_cut_is_not_tried_without_the_time_to_recover(tmp_path, monkeypatch):
    returns(monkeypatch, lambda parameters: 100.0 if parameters > 900 else 50.0)
    launch.start(undoing_config(tmp_path / "run", start=0.4, end=0.8), []).run()
    assert [step["kept"] for step in RunFolder(tmp_path / "run").read_history("pruning step")] == [
        True,
        False,
    ]
    (end,) = RunFolder(tmp_path / "run").read_history("end")
    assert end["shortfall"].endswith("0 env steps were left, and a smaller cut needs 80 to recover")


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 4])  # seconds each
def test_a_run_killed_while_it_tries_again_resumes_exactly(once, tmp_path, monkeypatch, step):
    returns(monkeypatch, lambda parameters: 100.0 if parameters > 900 else 50.0)

    def make(folder):
        launch.start(undoing_config(folder / "run"), []).run()

    whole = once("tried-again", make)[0] / "run"
    trainer = launch.start(undoing_config(tmp_path / "run"), [])

    def interrupted(go_on=trainer.step):
        stage = trainer.pruner.stage
        if stage.step == step and stage.phase == "recovering":
            os.kill(os.getpid(), signal.SIGTERM)
        return go_on()

    trainer.step = interrupted
    with pytest.raises(Stopped):
        trainer.run()
    resume(tmp_path / "run").run()
    assert_same_pruning(whole, tmp_path / "run")


def test_a_stage_of_an_older_release_is_taken_up(tmp_path):
    old = {"phase": "waiting", "gathered": 0, "step": 2, "kept": 1, "changes": 3}
    old |= {"reference": 100.0, "failed": 0.7, "came_back": False, "record": {}}
    course = launch.start(undoing_config(tmp_path / "run"), []).pruner
    values, tensors = course.state()
    course.load_state(values | {"stage": old}, tensors)
    assert course.stage.undone == [] and course.stage.dense_scores == []
    assert course.provenance(160)["dense_score"] == 100.0
    assert "a cut to 0.700 was undone" in course.shortfall(400)
    assert course.due(160) is None  # nothing to rank by yet, in this new tracker


def test_a_cut_of_an_older_release_is_undone(tmp_path, monkeypatch):
    """Its record knows of no offline steps."""
    returns(monkeypatch, lambda parameters: 100.0 if parameters > 900 else 50.0)
    trainer = launch.start(undoing_config(tmp_path / "run", start=0.4, end=0.8), [])

    def step(step=trainer.step):
        if trainer.pruner.due(trainer.now) == "undo":
            for name in ("offline_steps", "useful_steps"):
                del trainer.pruner.stage.record[name]
            trainer.step = step
        return step()

    trainer.step = step
    trainer.run()
    assert RunFolder(tmp_path / "run").read_history("undone")
    assert load_agent(tmp_path / "run").provenance["pruning"]["offline_steps"] == 0


def scored(tmp_path, scores):
    course = launch.start(undoing_config(tmp_path / "run"), []).pruner
    for now, score in enumerate(scores):
        course.scored(now, score)
    return course


@pytest.mark.parametrize(
    ("scores", "levelled_off"),
    [
        ([219.0], None),
        ([100.0, 219.0], False),
        ([100.0, 800.0, 820.0, 810.0], True),
        ([100.0, 800.0, 820.0, 810.0, 815.0], True),
        ([700.0, 730.0, 760.0, 790.0], False),
        ([-900.0, -400.0], False),
        ([-400.0, -405.0], True),
    ],
)
def test_whether_the_dense_networks_had_learnt_out(tmp_path, scores, levelled_off):
    course = scored(tmp_path, scores)
    assert course.levelled_off is levelled_off
    assert course.stage.reference == max(scores)
    assert (pruning_report.doubt(course) is None) == (levelled_off is True)


def test_what_is_pruned_is_judged_by_the_best_return_so_far(tmp_path, monkeypatch, capsys):
    """The return rises to 100 and is 60 when the first cut is due; it goes on rising later."""
    values = iter([40.0, 100.0, 60.0, *[80.0] * 4, *[200.0] * 100])

    def evaluate(*_, **__):
        return Evaluation([next(values)] * 2, 1, 0.0)

    monkeypatch.setattr("tdmpc_prune.training.agent.evaluate", evaluate)
    config = undoing_config(tmp_path / "run", start=0.3, end=0.6, max_return_drop=0.1)
    launch.start(config, []).run()
    steps = RunFolder(tmp_path / "run").read_history("pruning step")
    assert steps[0]["before"]["mean"] == 60 and steps[0]["least"] == 90 and not steps[0]["kept"]
    assert steps[-1]["least"] == 160  # nothing was lost right after it, so that 40 may be
    assert RunFolder(tmp_path / "run").read_history("end")[0]["reference"] == 200


@pytest.mark.parametrize(
    ("after", "later", "kept"),
    [(98, 91, True), (98, 81, True), (98, 79, False), (89, 91, True), (89, 89, False)],
)
def test_a_harmless_cut_answers_for_what_comes_later_half_as_much(
    tmp_path, monkeypatch, after, later, kept
):
    """A tenth may be lost, a fifth by what had cost less than a tenth right after the cut."""
    values = iter([100.0, 100.0, 100.0, after, *[later] * 100])
    monkeypatch.setattr(
        "tdmpc_prune.training.agent.evaluate",
        lambda *_, **__: Evaluation([next(values)] * 2, 1, 0.0),
    )
    config = undoing_config(tmp_path / "run", start=0.3, end=0.6, max_return_drop=0.1)
    launch.start(config, []).run()
    first = RunFolder(tmp_path / "run").read_history("pruning step")[0]
    assert first["before"]["mean"] == 100 and first["after"]["mean"] == after
    assert first["recovered"]["mean"] == later and first["kept"] is kept


def test_a_return_that_still_rose_at_the_first_cut_is_said(tmp_path, monkeypatch, capsys):
    values = iter([100.0, 219.0, *[850.0] * 100])
    monkeypatch.setattr(
        "tdmpc_prune.training.agent.evaluate",
        lambda *_, **__: Evaluation([next(values)] * 2, 1, 0.0),
    )
    launch.start(undoing_config(tmp_path / "run"), []).run()
    (warning,) = RunFolder(tmp_path / "run").read_history("warning")
    assert "the return was still rising at the first cut (100 at 60, 219 at " in warning["text"]
    assert capsys.readouterr().out.count("note: the return was still rising") == 1


def test_times_are_measured_once_at_the_end_of_all_agents(whole_run):
    (times,) = RunFolder(whole_run[0]).read_history("times")
    names = ["dense", "step-1", "step-2", "step-3", "final"]
    assert list(times["agents"]) == names and times["threads"] >= 1
    for agent in times["agents"].values():
        assert 0 < agent["decision_ms"]["median"] <= agent["decision_ms"]["p95"]
    macs = [agent["macs"] for agent in times["agents"].values()]
    assert macs == sorted(macs, reverse=True)
    for entry in RunFolder(whole_run[0]).read_history("evaluation", "tracking"):
        assert "decision_ms" not in entry


def test_a_cut_that_fails_stops_the_run_with_its_networks_whole(tmp_path, monkeypatch):
    def fail(*_):
        raise SurgeryError("on purpose")

    monkeypatch.setattr("tdmpc_prune.pruning.pruner.commit", fail)
    trainer = launch.start(pruning_config(tmp_path / "run"), [])
    with pytest.raises(RunError, match="cut 1 was undone and the run stopped: on purpose"):
        trainer.run()
    assert trainer.pruner.sparsity == 0


def test_the_dense_part_of_a_pruned_run_is_the_dense_run(whole_run, small_run):
    """The tracker changes nothing until the first cut."""
    ours, theirs = (
        [(e["env_steps"], e["mean_return"]) for e in RunFolder(folder).read_history("evaluation")]
        for folder in (whole_run[0], small_run[0])
    )
    assert ours[0] == theirs[0] and ours[0][0] == 60


# --- A finished agent ------------------------------------------------------------------------


@pytest.fixture
def dense(small_run):
    return small_run[0]


def finished(dense, run_dir, **changes):
    settings = {"env_steps": 120, "eval_every": 60, "eval_episodes": 2, "device": "cpu"}
    prune = replace(PRUNE, start=0.0, end=0.6)
    config = PruneCheckpointConfig(str(dense), prune, run_dir=str(run_dir), **settings)
    return replace(config, **changes)


def test_a_finished_agent_is_pruned_and_recovers(dense, tmp_path):
    trainer = launch.start(launch.pruning_run(finished(dense, tmp_path / "run"), []), [])
    assert trainer.now == 200
    trainer.run()
    cuts = RunFolder(tmp_path / "run").read_history("cut")
    assert [cut["env_steps"] for cut in cuts] == [240, 260, 280]
    assert trainer.now == 320
    assert load_agent(tmp_path / "run").provenance["pruning"]["sparsity"] >= 0.7


def test_the_checkpoints_evaluation_is_not_played_again(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("tdmpc_prune.training.agent.evaluate", lambda *_, **__: None)

    def begun(run_dir, start_from):
        config = small_config(run_dir, start_from=str(start_from), env_steps=320)
        trainer = launch.start(config, [])
        trainer.log = SimpleNamespace(progress=lambda **_: None)
        return trainer

    trainer = begun(tmp_path / "run", dense)
    saved = load_training(checkpoint_dir(dense))[0]["evaluation"]["returns"]
    assert trainer.measure(2).returns == saved
    assert trainer.measure(3) is None  # more episodes than there are on file
    trainer.take_networks(trainer.trainee.model)
    assert trainer.measure(2) is None  # nothing is known of another learner

    learnt_on = shutil.copytree(dense, tmp_path / "learnt on")
    path = checkpoint_dir(learnt_on) / "training.json"
    values = json.loads(path.read_text())
    values["evaluated"][0] -= 1
    path.write_text(json.dumps(values))
    assert begun(tmp_path / "other", learnt_on).measure(2) is None  # it was of other weights


def test_one_cut_without_recovery_changes_no_weight_that_stays(dense, tmp_path):
    config = finished(dense, tmp_path / "run", env_steps=0)
    config = replace(config, prune=replace(config.prune, steps=1))
    launch.start(launch.pruning_run(config, []), []).run()
    plan = Plan.load(tmp_path / "run/plans/step-1.json")
    before, after = load_agent(dense).model, load_agent(tmp_path / "run").model
    rows = [u for u in range(16) if u not in plan.removed.get("reward.2", [])]
    assert torch.equal(after.reward[4].weight, before.reward[4].weight[:, rows])
    (step,) = RunFolder(tmp_path / "run").read_history("pruning step")
    assert step["after"]["mean"] == step["recovered"]["mean"]


def test_an_agent_without_its_buffer_plays_episodes_first(dense, tmp_path):
    agent = load_agent(dense)
    save_agent(tmp_path / "shipped", Agent(**vars(agent)))
    config = finished(tmp_path / "shipped", tmp_path / "run")
    trainer = launch.start(launch.pruning_run(config, []), [])
    trainer.run()
    assert len(RunFolder(tmp_path / "run").read_history("cut")) == 3
    assert trainer.now == 320  # the gathered episodes are not counted
    assert len(trainer.trainee.replay) == min(110, 20 * 2 + 120)


@pytest.mark.parametrize("explained", [False, True])
def test_an_agent_without_its_buffer_can_be_cut_once_or_explained(dense, tmp_path, explained):
    save_agent(tmp_path / "shipped", Agent(**vars(load_agent(dense))))
    path = str(tmp_path / "plan.json") if explained else None
    config = finished(tmp_path / "shipped", tmp_path / "run", env_steps=0, explain=path)
    config = replace(config, prune=replace(config.prune, steps=1, max_return_drop=0.0))
    if explained:
        assert launch.explain(config, [])[0].removed
        assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "shipped"]
        return
    launch.start(launch.pruning_run(config, []), []).run()
    (step,) = RunFolder(tmp_path / "run").read_history("pruning step")
    assert step["kept"]  # there was no recovery that could have failed
    assert load_agent(tmp_path / "run").provenance["pruning"]["sparsity"] >= 0.7


def test_what_is_explained_is_what_is_cut(dense, tmp_path):
    config = finished(dense, tmp_path / "run", explain=str(tmp_path / "plan.json"))
    plan, _ = launch.explain(config, [])
    config = replace(config, explain=None, env_steps=0, prune=replace(config.prune, steps=1))
    launch.start(launch.pruning_run(config, []), []).run()
    assert Plan.load(tmp_path / "run/plans/step-1.json") == plan


def test_cuts_that_are_close_together_still_get_time(tmp_path):
    """Twenty env steps are an episode; the schedule's cuts are five apart."""
    config = pruning_config(tmp_path / "run")
    config = replace(config, prune=replace(config.prune, start=100.0, end=115.0))
    launch.start(config, []).run()
    steps = RunFolder(tmp_path / "run").read_history("pruning step")
    assert [step["cut_at"] for step in steps] == [120, 140, 160]


def test_a_run_cannot_be_shortened_into_its_schedule(whole_run, tmp_path):
    shutil.copytree(whole_run[0], tmp_path / "run")
    config = small_config(tmp_path / "run", resume=str(tmp_path / "run"), env_steps=150)
    with pytest.raises(UserError, match="would end the run before its pruning schedule"):
        launch.resume(config, ["resume", "env_steps"])


@pytest.mark.parametrize("after", [pytest.param(3, marks=pytest.mark.slow), 30])  # seconds each
def test_pruning_a_finished_agent_resumes_exactly(once, dense, tmp_path, after):
    def make(folder):
        launch.start(launch.pruning_run(finished(dense, folder / "run"), []), []).run()

    whole = once("finished", make)[0] / "run"
    shutil.copytree(dense, tmp_path / "dense")
    trainer = launch.start(
        launch.pruning_run(finished(tmp_path / "dense", tmp_path / "run"), []), []
    )
    shutil.rmtree(tmp_path / "dense")  # the run's own checkpoint is enough
    left = after

    def interrupted(step=trainer.step):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    trainer.step = interrupted
    with pytest.raises(Stopped):
        trainer.run()
    resume(tmp_path / "run").run()
    assert_same_pruning(whole, tmp_path / "run")


def test_a_plan_is_explained_saved_and_carried_out_on_the_checkpoint(dense, tmp_path):
    config = finished(dense, tmp_path / "run", explain=str(tmp_path / "plan.json"))
    plan, _ = launch.explain(config, [])
    assert Plan.load(tmp_path / "plan.json") == plan
    assert not (tmp_path / "run").exists()
    given = replace(config.prune, plan=str(tmp_path / "plan.json"))
    trainer = launch.start(launch.pruning_run(replace(config, explain=None, prune=given), []), [])
    trainer.step = lambda step=trainer.step: os.kill(os.getpid(), signal.SIGINT) or step()
    with pytest.raises(Stopped):
        trainer.run()
    (tmp_path / "plan.json").rename(tmp_path / "elsewhere.json")  # the checkpoint holds it
    resume(tmp_path / "run").run()
    (tmp_path / "elsewhere.json").rename(tmp_path / "plan.json")
    widths = load_agent(tmp_path / "run").model.widths
    assert widths.latent == plan.widths_after["encoder.2+dynamics.4"]
    assert widths.policy == (plan.widths_after["policy.0"], plan.widths_after["policy.2"])
    assert len(RunFolder(tmp_path / "run").read_history("cut")) == 1
    with pytest.raises(UserError, match="the plan does not fit: group '"):
        again = replace(config, explain=None, prune=given, run_dir=str(tmp_path / "again"))
        again = replace(again, checkpoint=str(tmp_path / "run"))
        launch.start(launch.pruning_run(again, []), [])


def test_a_run_can_start_from_a_checkpoint_only_for_the_same_task(dense, tmp_path):
    config = small_config(tmp_path / "x", start_from=str(dense), task="gym:Pendulum-v1")
    with pytest.raises(UserError, match="its task is gym:tests"):
        launch.start(config, [])


def test_widths_of_weights():
    widths = Widths(3, 2, 5, (7,), (4, 6), (8, 9), (2, 3), ((4, 5), (6, 7), (8, 9)))
    from tdmpc_prune.agent.world_model import WorldModel

    assert Widths.of_weights(WorldModel(widths).state_dict()) == widths


# --- As typed --------------------------------------------------------------------------------

PRUNED = [*SMALL, "prune=bayesian", "prune.min_width=2", "prune.round_to=1", "prune.steps=2",
          "prune.max_return_drop=10"]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune.sparsity=0.999"], "binding floors: "),
        (["prune.end=500"], "ends at 500 env steps, after the run, which ends at 120"),
        (["prune.protect=[coupling,encoder,dynamics,reward,policy,q_ensemble]"],
         "leaves nothing that may be cut"),
        (["prune.end=0.3"], "due at 30 env steps, but nothing is learnt before 40"),
        (["prune.protect=[latnt]"], "there is no 'latnt'"),
        (["prune.sparsity=1.5"], "prune.sparsity=1.5 must lie in (0, 1)"),
        (["prune.shape=cosin"], "must be one of cosine, linear, cubic"),
        (["prune.budgets={dynamics: 3}"], "must lie in [0, 1]"),
        (["prune.spasity=0.5"], "did you mean prune.sparsity"),
        (["prune.plan=nowhere.json"], "prune.min_width=2 has no effect with prune.plan=…"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_nothing_starts(tmp_path, arguments, message):
    refused([*PRUNED, *arguments], message, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune=bayesan"], "the choices are none, compensated"),
        (["prune=bayesian", "prune.plan=nowhere.json"], "plan 'nowhere.json' cannot be read"),
    ],
)
def test_a_wrong_choice_or_plan_is_one_line(tmp_path, arguments, message):
    refused([*SMALL, *arguments], message, tmp_path)


def refused(arguments, message, tmp_path):
    done = run("train.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert not list(tmp_path.iterdir())


def test_commands_train_prune_groups(tmp_path):
    done = run("train.py", *PRUNED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/gym-tests.synthetic-Reach-v0/bayesian/seed1"
    assert "cut 2 of 2 at" in done.stdout and "are left (sparsity 0.9" in done.stdout
    assert (folder / "course.png").exists()
    assert "| all " in (folder / "plans/step-1.md").read_text()

    done = run("groups.py", f"checkpoint={folder}", "json=groups.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(1 coupling)" in done.stdout
    assert json.loads((tmp_path / "groups.json").read_text())
    done = run("groups.py", REACH, "model=paper", cwd=tmp_path)
    assert "12 groups (1 coupling)" in done.stdout

    shutil.rmtree(tmp_path / "runs")
    run("train.py", *SMALL, cwd=tmp_path)
    dense = tmp_path / "runs/gym-tests.synthetic-Reach-v0/none/seed1"
    settings = ["prune.gather_updates=3", "device=cpu", f"checkpoint={dense}"]
    floors = ["prune.min_width=2", "prune.round_to=1"]
    done = run("prune.py", *settings, *floors, "explain=plan.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| all " in done.stdout and "nothing was cut" in done.stdout
    done = run(
        "prune.py", *settings, "prune.plan=plan.json", "env_steps=40", "eval_episodes=2",
        "prune.max_return_drop=10", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "are left (sparsity 0.9" in done.stdout
    done = run("prune.py", *settings, "prune=none", cwd=tmp_path)
    assert done.returncode == 2 and "prune=none cuts nothing" in done.stderr
