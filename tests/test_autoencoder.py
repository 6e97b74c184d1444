"""The autoencoder: its images, its groups, exact cuts, and a run that is pruned and resumed."""

import errno
import gzip
import json
import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmpc_prune.autoencoder.computation import autoencoder_computation
from tdmpc_prune.autoencoder.config import LearningConfig, NetworkConfig
from tdmpc_prune.autoencoder.data import load_images, read_idx
from tdmpc_prune.autoencoder.learner import AutoencoderLearner
from tdmpc_prune.autoencoder.model import Autoencoder, Widths, psnr
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.pruning.allocation import make_plan
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.pruning.groups import find_groups
from tdmpc_prune.pruning.surgery import commit, kept_units
from tdmpc_prune.saving.autoencoders import load_autoencoder
from tdmpc_prune.saving.run_folder import RunFolder
from tdmpc_prune.training import launch
from tdmpc_prune.training.config import AutoencoderConfig, PruneCheckpointConfig
from tdmpc_prune.training.log import RunLog
from tests.commands import run

pytestmark = pytest.mark.usefixtures("undrawn")

PRUNE = PruneConfig(
    method="bayesian",
    refit=False,  # test_an_autoencoder_is_refitted has it
    sparsity=0.6,
    steps=3,
    min_width=2,
    round_to=1,
    max_return_drop=10.0,
)


def small(run_dir, **changes) -> AutoencoderConfig:
    config = AutoencoderConfig(
        network=NetworkConfig(widths=[8, 12], latent_width=8),
        learning=LearningConfig(batch=16),
        prune=PRUNE,
        updates=60,
        eval_every=20,
        run_dir=str(run_dir),
    )
    return replace(config, **changes)


def idx(images):
    return bytes([0, 0, 8, 3]) + struct.pack(">3I", *images.shape) + images.tobytes()


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 5)), packed=st.booleans()
)
def test_idx_files_are_read_gzipped_or_not(tmp_path_factory, shape, packed):
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path_factory.mktemp("idx") / ("x.gz" if packed else "x")
    path.write_bytes(gzip.compress(idx(images)) if packed else idx(images))
    assert np.array_equal(read_idx(path), images)


def test_mnist_from_its_files_and_digits_without_any(tmp_path):
    train = np.full((3, 28, 28), 255, np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(train))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(train[:1])))
    images = load_images("mnist", str(tmp_path))
    assert images.train.shape == (3, 1, 28, 28) and images.test.shape == (1, 1, 28, 28)
    assert images.train.dtype == torch.float32 and images.train.max() == 1
    digits = load_images("digits", None)
    assert digits.train.shape[1:] == (1, 8, 8) and len(digits.train) + len(digits.test) == 1797
    assert digits.train.min() >= 0 and digits.train.max() == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-5], "is damaged: it should hold 18 pixels"),
        (lambda content: content + b"x", "is damaged"),
        (lambda content: b"PNG" + content, "is no IDX file of images"),
        (lambda content: b"", "is no IDX file of images"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, damage, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(idx(np.zeros((2, 3, 3), np.uint8))))
    with pytest.raises(UserError, match=message):
        read_idx(path)
    packed = tmp_path / "x.gz"
    packed.write_bytes(gzip.compress(idx(np.zeros((2, 3, 3), np.uint8)))[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        read_idx(packed)


def test_psnr():
    images = torch.rand(5, 1, 4, 4)
    noisy = images + 0.1
    assert psnr(images, noisy) == pytest.approx([20.0] * 5, abs=1e-3)


@pytest.mark.parametrize("convolutional", [True, False])
@pytest.mark.parametrize("side", [8, 28, 7])
def test_the_latent_couples_and_cuts_are_exact(convolutional, side):
    """The cut network computes what the full one does without the units that were cut."""
    torch.manual_seed(0)
    widths = Widths(convolutional, side, side, (6, 10), 5, (10, 6))
    learner = AutoencoderLearner(Autoencoder(widths).double(), 1e-3)
    model = learner.model
    computation = autoencoder_computation(model)
    structure = find_groups(computation)
    assert sorted(structure.widths.values()) == [5, 6, 6, 10, 10]
    (latent,) = [group for group in structure.groups if group.coupling]
    assert latent.width == 5 and set(latent.components) == {"encoder", "decoder"}
    assert sum(structure.parameters().values()) == sum(p.numel() for p in model.parameters())

    images = torch.rand(3, 1, side, side, dtype=torch.float64)
    count = sum(structure.widths.values())
    settings = PruneConfig(method="random", min_width=1, round_to=1)
    dense = structure.parameters()
    plan = make_plan(structure, np.random.default_rng(0).random(count), settings, 0.6, dense)
    excluded = Autoencoder(widths).double()
    excluded.load_state_dict(model.state_dict())
    kept = kept_units(plan)
    with torch.no_grad():
        tensors = dict(excluded.named_parameters())
        for group in structure.groups:
            for part in group.slices:
                gone = part.index[~np.isin(part.unit, kept[group.name])]
                tensors[part.tensor].index_fill_(part.dim, torch.from_numpy(gone), 0.0)
        expected = excluded(images)
        commit(plan, structure, computation, learner.optimisers.values())
        assert torch.allclose(model(images), expected, atol=1e-12)
    assert Autoencoder(Widths.of_weights(widths, model.state_dict())).load_state_dict(
        model.state_dict()
    )
    learner.update(images)  # and it goes on learning


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    launch.start(small(run_dir), ["train_autoencoder.py"]).run()
    return run_dir


def test_a_run_is_pruned_and_shows_it(whole_run):
    steps = RunFolder(whole_run).read_history("pruning step")
    assert [step["step"] for step in steps] == [1, 2, 3] and steps[-1]["sparsity"] >= 0.6
    (last,) = RunFolder(whole_run).read_history("evaluation")[-1:]
    assert last["updates"] == 60 and last["sparsity"] == steps[-1]["sparsity"]
    model = load_autoencoder(whole_run).model
    assert sum(p.numel() for p in model.parameters()) == last["parameters"]
    dense = load_autoencoder(whole_run / "agents" / "dense").model
    assert dense.widths == Widths(True, 8, 8, (8, 12), 8, (12, 8))
    for picture in ("course.png", "importance.png", "reconstructions.png"):
        assert (whole_run / picture).stat().st_size > 5_000


def test_a_run_that_was_stopped_anywhere_goes_on_exactly(whole_run, tmp_path):
    expected = load_autoencoder(whole_run).model.state_dict()
    for stop in (7, 17, 25, 31, 45, 61):
        config = small(tmp_path / str(stop))
        trainer = launch.start(config, [])
        trainer.log = RunLog(trainer.folder, 0, 60, 0, "updates")
        for _ in range(stop):
            trainer.step()
        trainer.save()
        trainer.log.close()
        resumed = launch.resume(replace(config, resume=config.run_dir), ["resume"])
        resumed.run()
        found = resumed.trainee.model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), stop


def test_a_finished_run_can_be_resumed_and_made_longer(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    config = small(tmp_path / "run", resume=str(tmp_path / "run"))
    again = launch.resume(config, ["resume"]).run().mean
    expected = RunFolder(whole_run).read_history("evaluation")[-1]["mean"]
    assert again == pytest.approx(expected)
    launch.resume(replace(config, updates=70), ["resume", "updates"]).run()
    evaluations = RunFolder(tmp_path / "run").read_history("evaluation")
    assert [evaluation["updates"] for evaluation in evaluations][-2:] == [60, 70]


def test_a_cut_that_does_not_recover_is_undone(tmp_path):
    config = small(tmp_path / "run")
    prune = replace(PRUNE, max_return_drop=0.0, sparsity=0.9, steps=1, end=0.4)
    launch.start(replace(config, prune=prune, updates=40), []).run()
    steps = RunFolder(tmp_path / "run").read_history("pruning step")
    if not steps[0]["kept"]:
        undone = RunFolder(tmp_path / "run").read_history("undone")[0]
        assert undone["sparsity"] == 0
    for step in steps:
        assert step["kept"] == (step["recovered"]["mean"] >= step["least"])
    for again in steps[1:]:  # a smaller one in place of the one undone
        assert again["sparsity"] < steps[0]["sparsity"] and not steps[0]["kept"]


def test_as_typed(tmp_path):
    arguments = ["updates=40", "eval_every=20", "network.widths=[8,8]", "network.latent_width=6"]
    done = run(
        "train_autoencoder.py", *arguments, "prune=magnitude", "prune.sparsity=0.5", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/autoencoder-digits/magnitude/seed1"
    assert "PSNR " in done.stdout and (folder / "reconstructions.png").exists()
    assert json.loads((folder / "run.json").read_text())["settings"]["updates"] == 40
    arguments += ["prune=magnitude", "prune.sparsity=0.5"]
    again = run("train_autoencoder.py", *arguments, cwd=tmp_path)
    assert again.returncode == 2 and "already holds a run" in again.stderr


def test_a_finished_autoencoder_is_pruned_explained_and_resumed(whole_run, tmp_path):
    launch.start(small(tmp_path / "dense", prune=PruneConfig()), []).run()
    settings = ["checkpoint=dense", "prune.sparsity=0.6", "prune.gather_updates=3"]
    done = run("prune.py", *settings, "explain=plan.json", cwd=tmp_path)
    assert done.returncode == 0 and "nothing was cut" in done.stdout, done.stderr
    settings += ["updates=40", "prune.steps=2", "eval_every=20"]
    done = run("prune.py", *settings, "run_dir=pruned", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = RunFolder(tmp_path / "pruned").read_history("pruning step")
    assert [step["step"] for step in steps] == [1, 2] and steps[0]["cut_at"] >= 60
    assert RunFolder(tmp_path / "pruned").read_history("evaluation")[-1]["updates"] == 100
    (tmp_path / "plan.json").unlink()
    shutil.rmtree(tmp_path / "dense")
    longer = small(tmp_path / "pruned", resume=str(tmp_path / "pruned"), updates=110)
    launch.resume(longer, ["resume", "updates"]).run()
    wrong = run("prune.py", f"checkpoint={whole_run}", "env_steps=0", cwd=tmp_path)
    assert wrong.returncode == 2 and "env_steps is not for" in wrong.stderr
    done = run("prune.py", f"checkpoint={whole_run}", "prune.sparsity=0.999", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=mnist"], "data=mnist needs data.dir="),
        (["data=mnist", "data.dir=."], "holds neither train-images-idx3-ubyte nor"),
        (["data=cifar"], "data=cifar is not a choice; the choices are digits, mnist"),
        (["network.kind=residual"], "must be one of convolutional, connected"),
        (["network.widths=[]"], "must be positive, and at least one"),
        (["updates=0"], "updates=0 must be at least 1"),
        (["prune=bayesian", "prune.sparsity=0.9999"], "cannot be reached"),
        (["resume=nowhere"], "'nowhere' is not the folder of a run"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, arguments, message):
    done = run("train_autoencoder.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert not list(tmp_path.iterdir())


# --- As an agent's run does -------------------------------------------------------------------


def test_a_non_finite_loss_stops_the_run_before_any_weight_changes_by_it(tmp_path):
    learning = LearningConfig(batch=16, learning_rate=1e30)
    begun = launch.start(small(tmp_path / "run", prune=PruneConfig(), learning=learning), [])
    with pytest.raises(RunError, match=r"after \d+ updates because the .* is (inf|nan); the state"):
        begun.run()
    saved = load_autoencoder(tmp_path / "run").model.state_dict()
    assert all(torch.isfinite(value).all() for value in saved.values())
    assert "try a smaller learning.learning_rate" in _message(begun)


def _message(begun):
    """What stops it again when it goes on from what it saved."""
    config = replace(begun.config, resume=str(begun.folder))
    with pytest.raises(RunError) as error:
        launch.resume(config, ["resume"]).run()
    return str(error.value)


def test_a_full_disk_is_said_with_what_is_whole_and_how_to_go_on(tmp_path, monkeypatch):
    begun = launch.start(small(tmp_path / "run"), [])

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunLog, "record", full)
    with pytest.raises(RunError, match=r"No space left on device; the newest .* is whole, go on"):
        begun.run()


def test_networks_that_were_cut_keep_their_dense_parent_and_their_commands(whole_run, tmp_path):
    config = PruneCheckpointConfig(str(whole_run), PRUNE, updates=0, run_dir=str(tmp_path / "run"))
    prune = replace(PRUNE, start=0.0, steps=1, sparsity=0.8, gather_updates=3)
    settings = launch.pruning_run(replace(config, prune=prune), [])
    again = launch.start(settings, ["prune.py", "checkpoint=x"])
    said = launch.finish(again)
    assert "what each cut did" in said and "reconstructions" in said
    found, first = load_autoencoder(tmp_path / "run"), load_autoencoder(whole_run)
    assert found.parent.resolve() == (tmp_path / "run/agents/dense").resolve()
    assert load_autoencoder(found.parent).is_dense and not first.is_dense
    assert found.provenance["commands"] == [
        "python scripts/train_autoencoder.py",
        "python scripts/prune.py checkpoint=x",
    ]
    assert found.provenance["pruning"]["sparsity"] >= 0.8


def test_what_differs_from_the_checkpoint_is_said(whole_run, tmp_path):
    other = NetworkConfig(widths=[8, 12], latent_width=9)
    config = small(tmp_path / "run", start_from=str(whole_run), network=other, updates=80)
    with pytest.raises(UserError, match=r"its network is .*'latent_width': 8.*'latent_width': 9"):
        launch.start(config, [])


@pytest.mark.parametrize("method", ["compensated", "bayesian"])
def test_an_autoencoder_is_refitted(trained, tmp_path, method):
    """Right after the cut, on images that nothing was fitted to."""

    def score(refit):
        prune = replace(PRUNE, method=method, refit=refit, start=0.0, steps=1)
        prune = replace(prune, gather_updates=3)
        folder = tmp_path / str(refit)
        config = PruneCheckpointConfig(str(trained / "autoencoder"), prune, run_dir=str(folder))
        run = launch.start(launch.pruning_run(config, ["prune.min_width", "prune.round_to"]), [])
        score = run.run().mean
        assert bool(RunFolder(folder).read_history("refit")) == refit
        return score

    assert score(True) > score(False)
