"""The planner in C: the same decisions as PyTorch, in every build; and who decides in a run."""

import ctypes
import json
import shutil
import subprocess
import tempfile
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from tdmpc_prune.agent import deciding
from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.config import AgentConfig, PlannerConfig
from tdmpc_prune.agent.controller import Controller
from tdmpc_prune.agent.planner import draw_noise, first_means, plan
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.deploy.export import PlannerStep
from tdmpc_prune.errors import UserError
from tdmpc_prune.evaluation import evaluate
from tdmpc_prune.native import build
from tdmpc_prune.native.planner import Planner
from tdmpc_prune.training import launch
from tdmpc_prune.training.config import TrainConfig
from tests.commands import SMALL, run
from tests.small import small_config

pytestmark = [
    pytest.mark.skipif(deciding.unavailable() is not None, reason="there is no C compiler"),
    pytest.mark.xdist_group("native"),
]
STRICT = [*build.STRICT, "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror"]
WIDTHS = Widths(5, 2, 7, (19,), (23, 9), (8, 11), (13, 6), ((10, 17), (12, 5)))
PLANNER = PlannerConfig(horizon=3, iterations=3, samples=43, elites=6, policy_fraction=0.1)


def random_agent(widths=WIDTHS, planner=PLANNER, seed=0):
    model = WorldModel(widths)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return Agent(model, replace(AgentConfig(), planner=planner), "cartpole-swingup", 8)


def weights_of(agent):
    return {name: tensor.numpy() for name, tensor in agent.model.state_dict().items()}


def compiled(folder, *flags, compiler="gcc", source=build.SOURCES[1]):
    target = folder / f"planner{len(list(folder.iterdir()))}.so"
    command = [compiler, *build.STRICT, *flags, "-fPIC", "-shared", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


def decisions(library, agent, count=5):
    """Chained decisions with the planner's own noise: all that it says."""
    planner = Planner(library, weights_of(agent), agent.config.planner, 0.99, seed=7)
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        planner.observation[:] = rng.normal(size=len(planner.observation))
        planner.key.decision = number
        planner.plan(explore=number % 2 == 1)
        parts = planner.action, planner.means, planner.std, planner.values, planner.scores
        found.append(np.concatenate([part.ravel() for part in parts]))
    return np.stack(found)


# --- The numbers -----------------------------------------------------------------------------


def test_it_decides_as_pytorch_does_in_1000_random_cases():
    """Networks and budgets of all kinds; what is off hangs on a tie."""
    rng, off = np.random.default_rng(0), 0
    for case in range(50):
        sizes = [int(size) for size in rng.integers(1, 40, 14)]
        widths = Widths(
            *(sizes[0], 1 + sizes[1] % 7, sizes[2], (sizes[3],)),
            *(tuple(sizes[i : i + 2]) for i in (4, 6, 8)),
            tuple(tuple(sizes[i : i + 2]) for i in (10, 12))[: 1 + case % 2],
        )
        samples = int(rng.integers(1, 70))
        planner = PlannerConfig(
            horizon=int(rng.integers(1, 5)),
            iterations=int(rng.integers(1, 5)),
            samples=samples,
            elites=int(rng.integers(1, samples + 1)),
            policy_fraction=float(rng.choice([0.0, 0.1, 1.0])),
        )
        agent = random_agent(widths, planner, case)
        native = deciding.NativeDeciding(agent.model, agent.config, 0)
        generator = torch.Generator().manual_seed(case)
        for _ in range(20):
            observation = torch.randn(1, widths.observation, generator=generator)
            means = torch.randn(planner.horizon, 1, widths.action, generator=generator) / 3
            noise = draw_noise(planner, 1, widths.action, generator)
            ours = plan(agent.model, observation, means, noise, planner, 0.99)
            theirs = native.decide(observation, means, noise=noise)
            pairs = (ours.actions, theirs.actions), (ours.means, theirs.means)
            difference = max(float((one - other).abs().max()) for one, other in pairs)
            if difference > 1e-4:
                off += 1
                given = [getattr(noise, name) for name in _given(noise)]
                inputs = [observation[0], means[:, 0], *given]
                assert PlannerStep(agent).hangs_on_rounding(inputs, difference)
            else:
                np.testing.assert_allclose(ours.std, theirs.std, atol=1e-4)
                np.testing.assert_allclose(ours.value, theirs.value, atol=1e-3, rtol=1e-4)
    assert off <= 10


def _given(noise):
    names = ("samples", "sample_ends", "policy", "policy_ends", "choice")
    return [name for name in names if getattr(noise, name).numel()]


def test_several_environments_a_shorter_horizon_and_exploration():
    agent = random_agent()
    native = deciding.NativeDeciding(agent.model, agent.config, 0)
    generator = torch.Generator().manual_seed(1)
    noise = draw_noise(PLANNER, 3, 2, generator, horizon=2)
    observations, means = torch.randn(3, 5, generator=generator), first_means(PLANNER, 3, 2)
    means += torch.randn(means.shape, generator=generator) / 3
    settings = {"min_std": 0.4, "explore": True}
    ours = plan(agent.model, observations, means, noise, PLANNER, 0.99, **settings)
    theirs = native.decide(observations, means, (0, 1, 2), horizon=2, noise=noise, **settings)
    for name in ("actions", "means", "std", "value", "scores"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-4)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_every_width_decides_the_same_bit_for_bit(compiler, tmp_path):
    """Without fused multiply-adds."""
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    agent = random_agent()
    plain = decisions(compiled(tmp_path, "-O1", "-DPLANNER_WIDTH=1", compiler=compiler), agent)
    for width in (4, 8, 16):
        flags = ["-O2", f"-DPLANNER_WIDTH={width}", "-Wno-psabi"]
        library = compiled(tmp_path, *flags, compiler=compiler)
        assert library.planner_width() == width
        assert np.array_equal(plain, decisions(library, agent))
    np.testing.assert_allclose(plain, decisions(deciding.library(), agent), atol=1e-4)


def test_every_build_draws_the_same_noise(tmp_path):
    libraries = [deciding.library(), compiled(tmp_path, "-O1", "-DPLANNER_WIDTH=1")]
    agent = random_agent(planner=replace(PLANNER, samples=200, elites=6))
    drawn = []
    for library in libraries:
        planner = Planner(library, weights_of(agent), agent.config.planner, 0.99, seed=2**40 + 3)
        planner.key.stream, planner.key.decision = 5, 9
        drawn.append(planner.noise())
    assert all(np.array_equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    normal = np.concatenate([drawn[0][n].ravel() for n in ("samples", "sample_ends", "policy")])
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.03
    assert abs(np.mean(normal**4) - 3) < 0.4
    assert abs(np.corrcoef(normal[1:], normal[:-1])[0, 1]) < 0.05
    planner.key.decision += 1
    assert not np.array_equal(planner.noise()["samples"], drawn[0]["samples"])
    assert planner.noise()["choice"] == philox_choice(planner.key, PLANNER.iterations + 1)


def philox_choice(key, part):
    """Philox 4x32-10 written down once more, in integers of Python."""
    c, k = [0, part << 16, key.decision, key.stream], [key.seed % 2**32, key.seed >> 32]
    for _ in range(10):
        one, other = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(other >> 32) ^ c[1] ^ k[0], other % 2**32, (one >> 32) ^ c[3] ^ k[1], one % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return (c[0] >> 8) * 2.0**-24


def test_its_own_noise_given_from_outside_gives_the_same_decision():
    agent = random_agent()
    planner = Planner(deciding.library(), weights_of(agent), PLANNER, 0.99, seed=1)
    planner.observation[:] = 0.3
    noise = planner.noise()
    planner.plan(explore=True)
    action, means = planner.action.copy(), planner.means.copy()
    planner.means[:] = 0
    planner.plan(explore=True, noise=noise)
    assert np.array_equal(action, planner.action) and np.array_equal(means, planner.means)


def test_its_functions_are_exact_to_1e_7(tmp_path):
    source = tmp_path / "functions.c"
    names = ("elu", "hyperbolic_tangent", "root", "logarithm")
    source.write_text(
        f'#include "{build.SOURCES[1]}"\n'
        + "".join(
            f"void check_{n}(float *x, int count) {{ for (int i = 0; i < count; i += WIDTH) "
            f"store(x + i, {n}(load(x + i))); }}\n"
            for n in names
        )
    )
    library = compiled(tmp_path, "-O2", "-DPLANNER_WIDTH=1", source=source)
    signed, positive = np.linspace(-20, 20, 400_001), np.geomspace(1e-7, 1, 400_001)
    for name, x, exact, relative in (
        ("elu", signed, lambda x: np.where(x > 0, x, np.expm1(x)), False),
        ("hyperbolic_tangent", signed, np.tanh, False),
        ("root", positive, np.sqrt, True),
        ("logarithm", positive, np.log, False),
    ):
        x = x.astype(np.float32)
        found, true = x.copy(), exact(x.astype(float))
        getattr(library, f"check_{name}")(ctypes.c_void_p(found.ctypes.data), len(found))
        error = np.abs(found - true) / (np.abs(true) if relative else np.maximum(1, np.abs(true)))
        assert error.max() < 1.5e-7, name


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("flags", [[], ["-march=native"], ["-DPLANNER_WIDTH=1"]], ids=str)
def test_it_compiles_without_warnings(compiler, flags, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    command = [compiler, *STRICT, "-O2", *flags, "-c", str(build.SOURCES[1])]
    subprocess.run([*command, "-o", str(tmp_path / "planner.o")], check=True)


def test_it_needs_no_library_but_memcpy(tmp_path):
    target = tmp_path / "planner.o"
    command = ["gcc", *build.STRICT, "-Os", "-fno-stack-protector", "-c", str(build.SOURCES[1])]
    subprocess.run([*command, "-o", str(target)], check=True)
    said = subprocess.run(["nm", "-u", str(target)], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in said.stdout.splitlines()}
    assert names <= {"memcpy", "_GLOBAL_OFFSET_TABLE_"}


def test_planners_in_threads_do_not_disturb_each_other():
    agents = [random_agent(seed=seed) for seed in range(4)]
    alone = [decisions(deciding.library(), agent, 20) for agent in agents]
    found = [None] * len(agents)

    def decide(place):
        found[place] = decisions(deciding.library(), agents[place], 20)

    threads = [threading.Thread(target=decide, args=(place,)) for place in range(len(agents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(np.array_equal, alone, found))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_an_observation_that_is_not_finite_is_not_planned_on(wrong):
    planner = Planner(deciding.library(), weights_of(random_agent()), PLANNER, 0.99)
    planner.observation[3], planner.means[:], planner.action[:] = wrong, 0.5, 0.25
    for call in (planner.plan, planner.policy):
        with pytest.raises(ValueError, match="not finite"):
            call()
    assert (planner.means == 0.5).all() and (planner.action == 0.25).all()


def test_sizes_that_do_not_fit_are_refused():
    planner = Planner(deciding.library(), weights_of(random_agent()), PLANNER, 0.99)
    with pytest.raises(ValueError, match="do not fit"):
        planner.plan(horizon=4)


# --- Who decides -----------------------------------------------------------------------------


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    build.library.cache_clear()
    yield
    build.library.cache_clear()


def test_the_compiled_planner_is_cached_and_a_wrong_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    with pytest.raises(build.Unavailable, match="differs by much"):
        build.library(lambda library: "differs by much")
    folder = tmp_path / "tdmpc_prune"
    assert not list(folder.iterdir())
    build.library(lambda library: None)
    (made,) = folder.iterdir()
    build.library(lambda library: pytest.fail("it is there already"))
    assert [made] == list(folder.iterdir())
    build.library.cache_clear()


def test_a_damaged_planner_in_the_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    build.library(lambda library: None)
    (made,) = (tmp_path / "tdmpc_prune").iterdir()
    made.unlink()  # it is loaded: what lies there is not to be written over
    made.write_bytes(b"half")
    build.library.cache_clear()
    build.library(lambda library: None)
    assert made.stat().st_size > 1_000 and [made] == list(made.parent.iterdir())
    build.library.cache_clear()


def test_a_cache_that_cannot_be_written_to_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def temporary(*, dir=None, make=tempfile.TemporaryDirectory, **more):
        if dir:  # permissions do not stop root
            raise PermissionError(13, "Permission denied")
        return make(**more)

    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", temporary)
    build.library.cache_clear()
    assert build.library(lambda library: None).planner_width() >= 1
    assert not list((tmp_path / "tdmpc_prune").iterdir())
    build.library.cache_clear()


def test_without_a_compiler_pytorch_decides_and_says_why(no_compiler, tmp_path):
    choice = deciding.choose("auto", WIDTHS, torch.device("cpu"))
    assert choice.path == "torch" and choice.text() == (
        "decisions by PyTorch, because there is no C compiler (CC=no-such-compiler)"
    )
    with pytest.raises(UserError, match="decisions=native cannot be, because there is no C comp"):
        deciding.choose("native", WIDTHS, torch.device("cpu"))
    done = run("train.py", *SMALL, "env_steps=50", "run_dir=r", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("decisions by PyTorch, because") == 1
    assert json.loads((tmp_path / "r/run.json").read_text())["settings"]["decisions"] == "torch"
    done = run("train.py", *SMALL, "run_dir=s", "decisions=native", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_cuda_and_short_vectors_leave_it_to_pytorch(monkeypatch):
    assert "cuda" in deciding.choose("auto", WIDTHS, torch.device("cuda")).because
    wide = replace(WIDTHS, dynamics=(128, 128))

    class Short:
        planner_width = staticmethod(lambda: 4)

    monkeypatch.setattr(deciding, "library", Short)
    assert "too short" in deciding.choose("auto", wide, torch.device("cpu")).because
    assert deciding.choose("auto", WIDTHS, torch.device("cpu")).path == "native"
    assert deciding.choose("native", wide, torch.device("cpu")).path == "native"


def test_a_run_goes_on_with_who_decided_before(small_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(small_run[0], folder)
    file = folder / "run.json"
    about = json.loads(file.read_text())
    assert about["settings"]["decisions"] == "native"  # what auto came to
    with pytest.raises(UserError, match="decisions cannot change when a run is resumed"):
        launch.resume(TrainConfig(resume=str(folder), decisions="torch"), ["resume", "decisions"])
    monkeypatch.setattr(launch, "unavailable", lambda: "there is no C compiler")
    with pytest.raises(UserError, match="was begun with decisions=native, and cannot go on"):
        launch.resume(TrainConfig(resume=str(folder)), ["resume"])
    del about["settings"]["decisions"]  # as older runs are
    file.write_text(json.dumps(about))
    assert launch.resume(TrainConfig(resume=str(folder)), ["resume"]).config.decisions == "torch"


def test_a_native_run_is_repeated_exactly_and_a_torch_run_has_its_own_numbers(small_run, tmp_path):
    def evaluations(folder):
        lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
        return [line["returns"] for line in lines if line["kind"] == "evaluation"]

    launch.start(small_config(tmp_path / "again"), []).run()
    assert evaluations(tmp_path / "again") == evaluations(small_run[0])
    launch.start(small_config(tmp_path / "torch", decisions="torch"), []).run()
    assert evaluations(tmp_path / "torch") != evaluations(small_run[0])


def test_controllers_and_evaluations_decide_alike_on_either_path():
    agent = random_agent(replace(WIDTHS, action=1))
    native, torch_ = (Controller(agent, 3, decisions=path) for path in ("native", "torch"))
    assert (native.choice.path, torch_.choice.path) == ("native", "torch")
    observation = np.full(5, 0.2, np.float32)
    first = [native.act(observation) for _ in range(3)]
    assert not np.array_equal(first[0], first[1])
    again = Controller(agent, 3, decisions="native")
    assert np.array_equal(first, [again.act(observation) for _ in range(3)])
    one = evaluate(agent, 1, 0, decisions="native")
    two = evaluate(agent, 2, 0, decisions="native")
    assert two.returns[0] == one.returns[0]  # an episode's noise is its own
