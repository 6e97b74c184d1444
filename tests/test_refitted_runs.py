"""Cuts that are refitted, ranked by data and mended offline: in runs, on file, and in words."""

import contextlib
import os
import shutil
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tdmpc_prune.agent.distillation import Teaching
from tdmpc_prune.agent.world_model import WorldModel
from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.saving.agents import load_agent, save_agent
from tdmpc_prune.saving.run_folder import RunFolder
from tdmpc_prune.signals import Stopped
from tdmpc_prune.training import launch, mending
from tdmpc_prune.training.config import PruneCheckpointConfig
from tests.commands import run as command
from tests.small import PRUNE, pruning_config
from tests.test_pruning_runs import assert_same_pruning, resume

pytestmark = pytest.mark.usefixtures("undrawn")

ONE_CUT = replace(
    PRUNE,
    method="compensated",
    refit=True,
    start=0.0,
    steps=1,
    distil=310,
    sparsity=0.6,
    compare=False,
)


def finished(dense, run_dir, env_steps=0, **prune):
    return PruneCheckpointConfig(
        str(dense),
        replace(ONE_CUT, **prune),
        run_dir=str(run_dir),
        env_steps=env_steps,
        eval_every=60,
        eval_episodes=2,
        device="cpu",
    )


def begin(config):
    return launch.start(launch.pruning_run(config, []), [])


def says(trainer, *returns):
    """Make the measured returns these ones, the last again and again."""
    told = list(returns)

    def measure(*given, measure=trainer.trainee.measure):
        measured = measure(*given)
        value = told.pop(0) if len(told) > 1 else told[0]
        return replace(measured, returns=[value] * len(measured.returns))

    trainer.trainee.measure = measure
    trainer.measured = None  # the checkpoint's own is of the true return
    trainer._measured_version = None


def records(run_dir, kind):
    return RunFolder(run_dir).read_history(kind)


@pytest.fixture(scope="module")
def dense(small_run):
    return small_run[0]


def test_one_cut_by_data_is_refitted_and_says_so(dense, tmp_path):
    begin(finished(dense, tmp_path / "run")).run()
    agent = load_agent(tmp_path / "run")
    said = agent.provenance["pruning"]
    assert (said["method"], said["refit"], said["cuts"]) == ("compensated", True, 1)
    assert 0.6 <= said["sparsity"] < 0.7
    plan = Plan.load(tmp_path / "run/plans/step-1.json")
    assert plan.rotated == ["encoder.2+dynamics.4"]
    explained = (tmp_path / "run/plans/step-1.md").read_text()
    assert "error of the fit" in explained and "| dynamics.4 " in explained
    (refit,) = records(tmp_path / "run", "refit")
    errors = {layer["layer"]: (layer["before"], layer["after"]) for layer in refit["layers"]}
    assert "policy.4" in errors and all(after <= before for before, after in errors.values())
    assert sum(after for _, after in errors.values()) < sum(before for before, _ in errors.values())
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    shown = {f"refit/{layer}/{which}" for layer in errors for which in ("as cut", "fitted")}
    assert shown <= set(events.Tags()["scalars"])


def test_a_plan_that_was_explained_gives_the_same_networks(dense, tmp_path):
    path = tmp_path / "plan.json"
    plan, refit = launch.explain(replace(finished(dense, ""), explain=str(path)), [])
    assert refit.layers and Plan.load(path) == plan
    begin(finished(dense, tmp_path / "one", distil=0)).run()
    given = finished(dense, tmp_path / "other", distil=0, plan=str(path), method="bayesian")
    begin(given).run()
    ours, theirs = (load_agent(tmp_path / name).model.state_dict() for name in ("one", "other"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_without_a_refit_the_weights_that_stay_are_the_rotated_networks_own(dense, tmp_path):
    begin(finished(dense, tmp_path / "run", refit=False, rotate=False)).run()
    plan = Plan.load(tmp_path / "run/plans/step-1.json")
    assert plan.rotated == [] and records(tmp_path / "run", "refit") == []
    before, after = load_agent(dense).model, load_agent(tmp_path / "run").model
    kept = [u for u in range(12) if u not in plan.removed.get("encoder.0", [])]
    assert torch.equal(after.encoder[0].weight, before.encoder[0].weight[kept])


# --- Mending offline ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returns", "moments", "steps"),
    [
        ((100, 96), ["before", "after", "recovered"], 0),
        ((100, 50, 97), ["before", "after", "mended", "recovered"], 300),
        ((100, 50, 60, 97), ["before", "after", "mended", "mended", "recovered"], 310),
        ((100, 50, 40, 60), ["before", "after", "not mended", "mended", "recovered"], 10),
        ((100, 50, 40, 30), ["before", "after", "not mended", "not mended", "recovered"], 0),
    ],
)
def test_offline_steps_are_made_while_they_are_needed_and_kept_if_they_help(
    dense, tmp_path, returns, moments, steps
):
    trainer = begin(finished(dense, tmp_path / "run"))
    says(trainer, *map(float, returns))
    trainer.run()
    assert [t["moment"] for t in records(tmp_path / "run", "tracking")] == moments
    said = load_agent(tmp_path / "run").provenance["pruning"]
    assert said["offline_steps"] == steps
    (step,) = records(tmp_path / "run", "pruning step")
    assert step["after"]["mean"] == returns[1]
    assert ("mended" in step) == bool(steps)


def test_offline_steps_go_on_in_rounds_from_the_best_so_far(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(mending, "_ROUND", 305)
    trainer = begin(finished(dense, tmp_path / "run", distil=620))
    says(trainer, 100.0, 50.0, 40.0, 60.0, 55.0, 97.0)
    drawn, kept, scored = [], [], {}

    def pool(model, draw=0, of=trainer.trainee.pool):
        drawn.append(draw)
        return of(model, draw)

    def distil(*given, of=mending.distil, **named):
        scored[named["done"]] = named["scored"]
        return of(*given, **named)

    monkeypatch.setattr(mending, "distil", distil)

    def step(step=trainer.step):
        if trainer.pruner.due(trainer.now) == "mend":
            kept.append(trainer.pruner.networks())
        return step()

    trainer.trainee.pool, trainer.step = pool, step
    trainer.run()
    assert [record["steps"] for record in records(tmp_path / "run", "mending")] == [300, 5, 305, 10]
    moments = [record["moment"] for record in records(tmp_path / "run", "tracking")]
    assert moments[2:-1] == ["not mended", "mended", "not mended", "mended"]
    assert load_agent(tmp_path / "run").provenance["pruning"]["offline_steps"] == 15
    assert drawn[-4:] == [300, 305, 555, 610]
    assert scored == {300: False, 305: True, 610: False}
    same = [all(torch.equal(one[n], two[n]) for n in one) for one, two in pairwise(kept)]
    assert same == [True, False, True], "what did not help was not taken back"


def test_what_did_not_help_is_taken_back(dense, tmp_path):
    begin(finished(dense, tmp_path / "refitted", distil=0)).run()
    trainer = begin(finished(dense, tmp_path / "run"))
    says(trainer, 100.0, 50.0, 40.0, 30.0)
    trainer.run()
    ours, theirs = (load_agent(tmp_path / n).model.state_dict() for n in ("run", "refitted"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    target = trainer.trainee.learner.target.state_dict()
    assert all(torch.equal(target[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("diverges", "returns", "steps", "why"),
    [
        ("latent steps", (100, 50, 97), 0, "distillation loss is nan"),
        ("refit", (100, 50, 97), 0, "nothing to fit by"),
        ("all at once", (100, 50, 60, 97), 300, "distillation loss is nan"),
    ],
)
def test_a_run_whose_offline_steps_fail_takes_them_back_and_goes_on(
    dense, tmp_path, monkeypatch, capsys, diverges, returns, steps, why
):
    said = 0

    def after_some_steps(error):
        nonlocal said
        said += 1
        return error if said < 4 else error * float("nan")

    def latent_error(*arguments, ask=Teaching.latent_error):
        reached, error = ask(*arguments)
        return reached, after_some_steps(error)

    def refit(*_):
        raise UserError("nothing to fit by")

    if diverges == "latent steps":
        monkeypatch.setattr(Teaching, "latent_error", latent_error)
    elif diverges == "refit":
        monkeypatch.setattr(mending, "refit", refit)
    else:
        whole = Teaching.error
        monkeypatch.setattr(Teaching, "error", lambda *a: after_some_steps(whole(*a)))
    trainer = begin(finished(dense, tmp_path / "run", env_steps=40))
    says(trainer, *map(float, returns))
    around = []

    def step(step=trainer.step):
        due, before = trainer.pruner.due(trainer.now), trainer.pruner.networks()
        more = step()
        if due == "mend":
            around.append((before, trainer.pruner.networks()))
        return more

    trainer.step = step
    trainer.run()
    before, after = around[-1]
    assert all(torch.equal(before[name], after[name]) for name in before)
    text = "the latest offline steps after cut 1 were taken back: "
    (warning,) = (r for r in records(tmp_path / "run", "warning") if text in r["text"])
    assert why in warning["text"]
    assert f"note: {warning['text']}" in capsys.readouterr().out.splitlines()
    assert [record["steps"] for record in records(tmp_path / "run", "mending")][-1] == 0
    assert trainer.now == 200 + 40 and len(records(tmp_path / "run", "pruning step")) == 1
    assert load_agent(tmp_path / "run").provenance["pruning"]["offline_steps"] == steps


def test_offline_steps_bring_the_student_closer_to_the_rotated_whole(dense, tmp_path, monkeypatch):
    trainer = begin(finished(dense, tmp_path / "run", sparsity=0.75))
    while trainer.pruner.stage.phase != "cut":
        trainer.log = trainer.log or _log(trainer)
        trainer.step()
    whole, plan = trainer.pruner.whole()
    pool = trainer.trainee.pool(trainer.trainee.model)
    teacher = WorldModel(trainer.trainee._dense_widths())
    teacher.load_state_dict(whole)
    structure = mending.find_groups(
        mending.agent_computation(teacher, teacher, trainer.config.model)
    )
    channels = mending.latent_channels(mending.kept_channels(plan, structure, teacher), teacher)
    discount = trainer.config.model.learning.discount
    teaching = Teaching.of(teacher, pool, channels, discount)
    starts = torch.arange(len(pool.observations))

    def errors():
        with torch.no_grad():
            model = trainer.trainee.model
            return teaching.latent_error(model, starts)[1], teaching.error(model, starts)

    refitted = errors()
    assert trainer.trainee.mend(whole, plan, 0, 600) == 300
    stepped = errors()
    assert stepped[0] < 0.9 * refitted[0]
    monkeypatch.setattr(mending, "_ROUND", 500)
    drawn = []

    def pool(model, draw, of=trainer.trainee.pool):
        drawn.append(of(model, draw))
        return drawn[-1]

    trainer.trainee.pool = pool
    assert trainer.trainee.mend(whole, plan, 300, 600) == 200  # to the end of the first round
    assert trainer.trainee.mend(whole, plan, 500, 600) == 100
    assert errors()[1] < 0.9 * stepped[1]
    first, second = (set(each.observations[:, 0].tolist()) for each in drawn)
    assert first != second, "later rounds have data of their own"
    trainer.trainee.close()


def _log(trainer):
    from tdmpc_prune.training.log import RunLog

    return RunLog(trainer.folder, trainer.now, trainer.now, 0, trainer.trainee.unit)


# --- In training ----------------------------------------------------------------------------------

LAST = replace(PRUNE, method="compensated", refit=True, steps=2, distil=305)


@contextlib.contextmanager
def never_back():
    """No cut brings the return back: offline steps are always tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tdmpc_prune.pruning.pruner.back_at", lambda before: float("inf"))
        patch.setattr(mending, "_ROUND", 302)
        yield


@pytest.fixture(scope="module")
def whole(once):
    def make(folder):
        with never_back():
            launch.start(replace(pruning_config(folder / "run"), prune=LAST), ["train.py"]).run()

    return once("compensated", make)[0] / "run"


@pytest.mark.parametrize(
    "due",  # ten seconds each
    [*(pytest.param(due, marks=pytest.mark.slow) for due in ("cut", "mend")), ("mend", "measure")],
)
def test_a_run_resumes_exactly_around_a_cut_that_is_ranked_by_data(whole, tmp_path, due):
    wanted = due if isinstance(due, tuple) else (None, due)
    trainer = launch.start(replace(pruning_config(tmp_path / "run"), prune=LAST), ["train.py"])
    last = [None]

    def step(step=trainer.step):
        now = trainer.pruner.due(trainer.now) or "advance"
        steps = trainer.pruner.stage.record.get("offline_steps", 0)
        late = due != ("mend", "measure") or steps >= 302  # between rounds
        if (wanted[0] in (None, last[0])) and now == wanted[1] and trainer.now >= 80 and late:
            os.kill(os.getpid(), signal.SIGTERM)
        last[0] = now
        return step()

    trainer.step = step
    with never_back():
        with pytest.raises(Stopped):
            trainer.run()
        resume(tmp_path / "run").run()
    assert records(tmp_path / "run", "mending")
    assert_same_pruning(whole, tmp_path / "run")


def test_a_cut_in_another_basis_is_undone_exactly(tmp_path):
    config = pruning_config(tmp_path / "run")
    config = replace(config, prune=replace(LAST, steps=1, distil=0, max_return_drop=0.0))
    trainer = launch.start(config, ["train.py"])
    kept = {}

    def step(step=trainer.step):
        due = trainer.pruner.due(trainer.now)
        if due == "cut":
            trainer.trainee.settle()  # the cut is of the average
            kept["before"] = {
                name: tensor.clone() for name, tensor in trainer.trainee.model.state_dict().items()
            }
        more = step()
        if due == "undo":
            kept["after"] = trainer.trainee.model.state_dict()
            trainer.step = step
        return more

    trainer.step = step
    says(trainer, 100.0, 100.0, 50.0)
    trainer.run()
    assert records(tmp_path / "run", "undone")
    assert all(torch.equal(kept["before"][name], kept["after"][name]) for name in kept["before"])


# --- Wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("prune=compensated", "prune.budgets={dynamics: 0.5}"), "prune.budgets cannot be kept"),
        (
            ("prune=compensated", "prune.allocation=uniform"),
            "prune.allocation=uniform has no effect",
        ),
        (("prune=bayesian", "prune.rotate=false"), "prune.rotate=False has no effect"),
        (("prune.distil=10", "prune.refit=false"), "prune.distil=10 has no effect"),
        (("prune.distil=-1",), "prune.distil=-1 cannot be negative"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(dense, tmp_path, more, words):
    done = command("prune.py", str(dense), *more, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_buffer_without_sequences_is_refused_with_the_state_saved(dense, tmp_path):
    trainer = begin(finished(dense, tmp_path / "run"))
    held = trainer.trainee.replay.state()
    trainer.trainee.replay.load_state(held | {"left": held["left"] * 0 + 1})
    with pytest.raises(UserError, match=r"cut 1 was not made: .* no 4 decisions in a row") as error:
        trainer.run()
    assert "\n" not in str(error.value)
    assert load_agent(tmp_path / "run").model.widths == load_agent(dense).model.widths


def test_an_agent_without_its_buffer_is_cut_with_episodes_played_for_it(dense, tmp_path):
    save_agent(tmp_path / "shipped", load_agent(dense))
    begin(finished(tmp_path / "shipped", tmp_path / "run")).run()
    shutil.rmtree(tmp_path / "shipped")
    said = load_agent(tmp_path / "run").provenance["pruning"]
    assert said["sparsity"] >= 0.6 and said["refit"]
