"""One thread per process, small runs that all tests share, and which tests stay together."""

import io
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from tdmpc_prune.envs import suite_tasks

torch.set_num_threads(1)
suite_tasks()  # loads MuJoCo's renderer before a command in this process leaves it out


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)`: a folder that `make(folder)` filled, and the plain value it returned.

    The first process that asks makes it, all others of the session wait and read: whoever writes
    copies.
    """
    # Each process of pytest-xdist has a folder of its own in that of the session.
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name, make):
        folder = base / f"shared-{name}"
        done = base / f"shared-{name}.json"
        with FileLock(f"{done}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a failure left
                folder.mkdir()
                done.write_text(json.dumps(make(folder)))
        return folder, json.loads(done.read_text())

    return get


def _counted(trainer, pruning):
    """Run to the end: the number of steps, and those that prune with what was due."""
    steps, due_at = 0, []

    def count(step=trainer.step):
        nonlocal steps
        due = pruning and trainer.pruner.due(trainer.now)
        if due and trainer.trainee.episode is None and trainer.trainee.progress.updates_due < 1:
            due_at.append((steps, due))
        steps += 1
        return step()

    trainer.step = count
    trainer.run()
    return {"steps": steps, "pruning": due_at}


@pytest.fixture(scope="session")
def small_run(once):
    """`small_config`'s run that nothing happened to, and the number of its steps."""
    from tdmpc_prune.training import launch
    from tests.small import small_config

    def make(folder):
        return _counted(launch.start(small_config(folder / "run"), ["train.py"]), False)

    folder, counts = once("small", make)
    return folder / "run", counts["steps"]


@pytest.fixture(scope="session")
def pruned_run(once):
    """`pruning_config`'s run that nothing happened to, and its steps that prune: (number, what)."""
    from tdmpc_prune.training import launch
    from tests.small import pruning_config

    def make(folder):
        return _counted(launch.start(pruning_config(folder / "run"), ["train.py"]), True)

    folder, counts = once("pruned", make)
    return folder / "run", [tuple(step) for step in counts["pruning"]]


@pytest.fixture(scope="session")
def trained(once, small_run):
    """A folder with two tiny dense networks, `agent` and `autoencoder`."""
    from tdmpc_prune.pruning.config import PruneConfig
    from tdmpc_prune.training import launch
    from tests.test_autoencoder import small

    def make(folder):
        shutil.copytree(small_run[0], folder / "agent")
        config = small(folder / "autoencoder", prune=PruneConfig(), updates=150)
        launch.start(config, []).run()

    return once("trained", make)[0]


@pytest.fixture
def undrawn(request, monkeypatch):
    """Figures are composed but not rendered, which takes a third of a small pruned run.

    What shared fixtures make is rendered: they are made before. So is what a test marked `drawn`
    makes.
    """
    if "drawn" in request.keywords:
        return
    picture = io.BytesIO()
    Figure().savefig(picture, format="png", dpi=10)

    def save(self, to, **_):
        if isinstance(to, str | Path):
            Path(to).write_bytes(picture.getvalue())
        else:
            to.write(picture.getvalue())

    monkeypatch.setattr(Figure, "savefig", save)
