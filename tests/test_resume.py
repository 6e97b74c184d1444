"""A run that is stopped or killed anywhere goes on with the numbers it would have had."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tdmpc_prune.envs import StepError

from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.saving.files import load_tensors
from tdmpc_prune.saving.run_folder import RunFolder, checkpoint_dir
from tdmpc_prune.signals import Stopped
from tdmpc_prune.training import launch
from tdmpc_prune.training.agent import EVALUATION_SEED
from tests.commands import run
from tests.small import AGENT, small_config
from tests.synthetic import Reach

ROOT = Path(__file__).parents[1]


class Killed(BaseException):
    pass


def history(run_dir):
    """The history without wall-clock times."""

    def timeless(value):
        if isinstance(value, dict):
            times = ("seconds", "decision_ms")
            return {k: timeless(v) for k, v in value.items() if k not in times}
        return value

    lines = (run_dir / "history.jsonl").read_text().splitlines()
    return [timeless(json.loads(line)) for line in lines]


def final_state(run_dir):
    """Every tensor of the newest checkpoint, and its counters."""
    folder = checkpoint_dir(run_dir)
    training_json = json.loads((folder / "training.json").read_text())
    agent_json = json.loads((folder / "agent.json").read_text())
    sums = training_json["sha256"] | agent_json["sha256"]
    tensors = {
        (name, key): value
        for name in ("agent", "training", "replay")
        for key, value in load_tensors(folder, name, sums).items()
    }
    return tensors, training_json["progress"], training_json["rng"]


def assert_same_run(ours, theirs):
    assert history(ours) == history(theirs)
    (tensors, *rest), (others, *other_rest) = final_state(ours), final_state(theirs)
    assert rest == other_rest
    assert set(tensors) == set(others)
    for key, value in tensors.items():
        assert torch.equal(value, others[key]), key


def resume(run_dir):
    return launch.resume(small_config(run_dir, resume=str(run_dir)), ["resume"])


@pytest.fixture
def whole_run(small_run):
    return small_run


def test_the_average_is_saved_as_the_agent_and_learning_goes_on_beside_it(whole_run):
    folder, _ = whole_run
    tensors, *_ = final_state(folder)
    trainee = resume(folder).trainee
    learns, plays = trainee.model.state_dict(), trainee.agent().model.state_dict()
    assert trainee.learner.averaged > 1
    for name in plays:
        assert torch.equal(plays[name], tensors["agent", name])
        assert torch.equal(learns[name], tensors["training", f"online.{name}"])
    assert not torch.equal(plays["policy.0.weight"], learns["policy.0.weight"])


def test_the_same_seed_gives_the_same_run(whole_run, tmp_path):
    launch.start(small_config(tmp_path / "again"), []).run()
    assert_same_run(whole_run[0], tmp_path / "again")


def test_another_seed_gives_another_run(whole_run, tmp_path):
    launch.start(small_config(tmp_path / "other", seed=2), []).run()
    assert history(whole_run[0]) != history(tmp_path / "other")


@pytest.mark.parametrize("part", [0.1, 0.31, 0.5, 0.68, 0.9, 0.999])
def test_a_run_killed_anywhere_resumes_exactly(whole_run, tmp_path, part):
    """Killed: nothing is saved at that moment."""
    whole, steps = whole_run
    trainer = launch.start(small_config(tmp_path / "run"), [])
    left = int(part * steps)

    def killed(step=trainer.step):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return step()

    trainer.step = killed
    with pytest.raises(Killed):
        trainer.run()
    resume(tmp_path / "run").run()
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("every", [1, 7, 50])
def test_a_run_stopped_again_and_again_resumes_exactly(whole_run, tmp_path, every):
    """Stopped: by a signal, at any step, in the middle of episodes and of series of updates."""
    whole, steps = whole_run
    run_dir = tmp_path / "run"
    trainer = launch.start(small_config(run_dir), [])
    stops = 0
    while True:
        left = every if stops < 40 else steps  # 40 stops are enough

        def interrupted(step=trainer.step, trainer=trainer):
            nonlocal left
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return step()

        trainer.step = interrupted
        try:
            trainer.run()
            break
        except Stopped as stopped:
            assert stopped.signal_number == signal.SIGTERM
            stops += 1
            trainer = resume(run_dir)
    assert stops >= min(40, steps // every - 2)
    assert_same_run(whole, run_dir)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_signals_save_and_say_how_to_go_on(tmp_path, number, code):
    process = command(tmp_path, "env_steps=100000", "eval_every=100000")
    wait_for_line(tmp_path / "run/history.jsonl", 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert re.search(r"train\.py resume=\S*run", errors)
    assert "Traceback" not in errors
    assert (checkpoint_dir(tmp_path / "run") / "training.json").exists()


def test_a_killed_process_resumes(whole_run, tmp_path):
    process = command(tmp_path)
    wait_for_line(tmp_path / "run/history.jsonl", 6)
    process.kill()
    process.communicate()
    resume(tmp_path / "run").run()
    assert_same_run(whole_run[0], tmp_path / "run")


def command(folder, *overrides):
    """`small_config` as a command line."""
    settings = ["task=gym:tests.synthetic:Reach-v0", "env_steps=200", "eval_every=60"]
    settings += ["eval_episodes=2", "device=cpu", f"run_dir={folder / 'run'}"]
    for part in ("network", "planner", "learning"):
        given = vars(getattr(AGENT, part)).items()
        settings += [f"model.{part}.{k}={'null' if v is None else v}" for k, v in given]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/train.py"), *settings, *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_line(path, count):
    deadline = time.monotonic() + 60
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, f"{path} never had {count} lines"
        time.sleep(0.02)


def test_a_longer_run_starts_from_a_finished_one(whole_run, tmp_path):
    launch.start(small_config(tmp_path / "run"), []).run()
    longer = small_config(tmp_path / "run", resume=str(tmp_path / "run"), env_steps=300)
    launch.resume(longer, ["resume", "env_steps"]).run()
    # The agents' times are of a run's end, which has moved.
    kept = [line for line in history(whole_run[0]) if line["kind"] != "times"]
    assert history(tmp_path / "run")[: len(kept)] == kept
    assert [line["env_steps"] for line in history(tmp_path / "run") if line["kind"] == "times"] == [
        300
    ]


def test_other_settings_cannot_change_on_resume(whole_run):
    run_dir = whole_run[0]
    config = small_config(run_dir, resume=str(run_dir), seed=5)
    with pytest.raises(UserError, match="seed cannot change"):
        launch.resume(config, ["resume", "seed"])


def test_two_processes_never_work_in_one_folder(tmp_path):
    process = command(tmp_path, "env_steps=100000")
    wait_for_line(tmp_path / "run/history.jsonl", 6)
    before = len((tmp_path / "run/history.jsonl").read_text().splitlines())
    done = run("train.py", f"resume={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: another process is at work in")
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert len((tmp_path / "run/history.jsonl").read_text().splitlines()) >= before
    resume(tmp_path / "run")  # what a killed process left behind blocks nobody
    with RunFolder(tmp_path / "run").owned():
        pass


def test_one_of_two_that_start_at_once_gets_the_folder(tmp_path):
    both = [command(tmp_path, "env_steps=60") for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    evaluations = [line for line in history(tmp_path / "run") if line["kind"] == "evaluation"]
    assert len(evaluations) == 1


def test_a_run_that_another_process_went_on_with_is_not_taken_back(tmp_path):
    launch.start(small_config(tmp_path / "run", env_steps=120), []).run()
    late = resume(tmp_path / "run")
    longer = small_config(tmp_path / "run", resume=str(tmp_path / "run"), env_steps=200)
    launch.resume(longer, ["resume", "env_steps"]).run()
    with pytest.raises(UserError, match="another process went on"):
        late.run()


def test_a_finished_run_says_so_and_how_to_go_on(whole_run, tmp_path):
    shutil.copytree(whole_run[0], tmp_path / "a run")
    done = run("train.py", "resume=a run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the run is finished: it has its 200 env steps" in done.stdout
    assert """train.py 'resume="a run"' env_steps=400""" in done.stdout
    assert_same_run(whole_run[0], tmp_path / "a run")


def test_a_folder_that_cannot_be_written_is_one_line(whole_run, tmp_path, monkeypatch):
    shutil.copytree(whole_run[0], tmp_path / "run")

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tdmpc_prune.training.log.SummaryWriter", refused)
    done = run("train.py", "resume=run", "env_steps=300", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: 'run' cannot be written: Permission denied"


def test_a_run_is_never_overwritten(whole_run):
    with pytest.raises(UserError, match="already holds a run"):
        launch.start(small_config(whole_run[0]), [])


def test_a_non_finite_loss_stops_the_run_with_a_saved_state(tmp_path):
    model = replace(AGENT, learning=replace(AGENT.learning, learning_rate=1e30))
    trainer = launch.start(small_config(tmp_path / "run", model=model), [])
    with pytest.raises(RunError, match=r"is inf; the state is saved in .* try a smaller"):
        trainer.run()
    tensors, *_ = final_state(tmp_path / "run")
    for (_, key), value in tensors.items():
        assert torch.isfinite(value.float()).all(), key


def test_a_reward_that_stays_non_finite_stops_the_run_and_none_is_saved(tmp_path):
    task = "gym:tests.synthetic:Exploding-v0"
    trainer = launch.start(small_config(tmp_path / "run", task=task), [])
    with pytest.raises(RunError, match=r"3 episodes in a row .* its reward is nan \(in step 1 of"):
        trainer.run()
    tensors, *_ = final_state(tmp_path / "run")
    for (_, key), value in tensors.items():
        assert torch.isfinite(value.float()).all(), key


def test_episodes_that_break_off_are_counted_and_resumed_exactly(tmp_path):
    """What came before is learnt from; the run goes on, and goes on exactly after a stop."""
    task = "gym:tests.synthetic:Rare-v0"
    whole = launch.start(small_config(tmp_path / "whole", task=task), [])
    whole.run()
    broken = [line for line in history(tmp_path / "whole") if line["kind"] == "broken episode"]
    assert broken and whole.trainee.progress.broken_episodes == len(broken)
    assert "ValueError: the solver did not converge (in step " in broken[0]["reason"]
    assert whole.now >= 200
    stored = [line.get("length", 0) for line in history(tmp_path / "whole")]
    assert sum(stored) == whole.now
    trainer = launch.start(small_config(tmp_path / "stopped", task=task), [])

    def stopped(step=trainer.step):
        if trainer.trainee.progress.broken_episodes and trainer.trainee.episode:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    trainer.step = stopped
    with pytest.raises(Stopped):
        trainer.run()
    resume(tmp_path / "stopped").run()
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_task_that_always_fails_stops_saved_and_goes_on_when_mended(tmp_path, monkeypatch):
    trainer = launch.start(small_config(tmp_path / "run"), [])

    def fail(self, action):
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(Reach, "step", fail)
        with pytest.raises(
            RunError, match=r"3 episodes in a row .* raised AssertionError .* saved"
        ):
            trainer.run()
    evaluation = resume(tmp_path / "run").run()
    assert len(evaluation.returns) == 2
    assert [line["kind"] for line in history(tmp_path / "run")][:3] == ["broken episode"] * 3


def test_a_failure_during_an_evaluation_does_not_end_the_run(tmp_path, monkeypatch):
    started = []
    whole = Reach.reset

    def first_evaluation_fails(self, *, seed=None, options=None):
        if seed == EVALUATION_SEED and not started:
            started.append(seed)
            raise RuntimeError("no licence left")
        return whole(self, seed=seed, options=options)

    monkeypatch.setattr(Reach, "reset", first_evaluation_fails)
    launch.start(small_config(tmp_path / "run"), []).run()
    (broken,) = [line for line in history(tmp_path / "run") if line["kind"] == "broken episode"]
    assert (
        broken["evaluation"]
        and f"at the reset of the episode from seed {EVALUATION_SEED}" in (broken["reason"])
    )


def test_a_task_that_does_not_repeat_itself_is_resumed_without_the_episode(tmp_path, capsys):
    """Stopped in the middle of an episode, again and again."""
    config = small_config(tmp_path / "run", task="gym:tests.synthetic:Unrepeatable-v0")
    trainer, stops = launch.start(config, []), 0
    while True:

        def stopped(step=trainer.step, trainer=trainer, stops=stops):
            if stops < 4 and trainer.trainee.episode and len(trainer.trainee.episode.actions) == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return step()

        trainer.step = stopped
        try:
            trainer.run()
            break
        except Stopped:
            stops += 1
            trainer = resume(tmp_path / "run")
    assert stops == 4
    lines = [line for line in history(tmp_path / "run") if line["kind"] == "broken episode"]
    assert len(lines) == trainer.trainee.progress.broken_episodes == 4
    assert all("does not repeat itself" in line["reason"] for line in lines)
    assert capsys.readouterr().out.count("does not repeat itself") == 4
    lengths = [line.get("length", 0) for line in history(tmp_path / "run")]
    assert sum(lengths) == trainer.now >= 200  # what was played is kept
    assert 8 in lengths or 7 in lengths


def test_episodes_of_one_decision_are_refused(tmp_path):
    """The shortest there are: terminated at once."""
    config = small_config(tmp_path / "run", task="gym:tests.synthetic:OneStep-v0")
    with pytest.raises(StepError, match="terminates in the first decision of every episode"):
        launch.start(replace(config, env_steps=120), [])
    assert not (tmp_path / "run").exists()
