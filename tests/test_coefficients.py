"""Soft coefficients: masks against cuts, the constraint, and searches with known answers."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tdmpc_prune.analysis.subject import load_subject
from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Computation, tag
from tdmpc_prune.pruning.coefficients import Ranking, by_gradient, by_grid
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.pruning.groups import find_groups
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.soft_masks import masked
from tdmpc_prune.pruning.surgery import commit
from tdmpc_prune.saving.agents import load_agent
from tdmpc_prune.saving.autoencoders import load_autoencoder
from tdmpc_prune.saving.run_folder import RunFolder
from tests.commands import run
from tests.pruning_zoo import Agent, computation, losses, make_data
from tests.test_surgery import choose, close, group_names


@pytest.mark.parametrize(
    "part",  # of 60 examples, a minute each, which several processes share
    [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2))],
)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31 - 1))
def test_hard_masks_are_the_cut_for_every_kind_of_group(part, seed):
    """Specific and coupling groups; LayerNorm with and without weights, GroupNorm, SimNorm."""
    agent = Agent(seed)
    for _ in range(2):
        agent.step(make_data(agent.world))
    data = make_data(agent.world)
    ties = computation(agent.world, agent.target)
    structure = find_groups(ties)
    keep, plan = choose(seed, agent.world, structure)
    names = group_names(agent.world, structure)
    masks = {
        name: torch.ones(width, dtype=torch.float64) for name, width in structure.widths.items()
    }
    for width, kept in keep.items():
        if names[width] in masks:
            masks[names[width]] = kept.double()
    latent = agent.world.widths["latent"].channel_mask(keep["latent"])
    found = masked(
        lambda networks: torch.stack(losses(networks["model"], networks["target"], data, latent)),
        {"model": agent.world, "target": agent.target},
        structure,
        masks,
    )
    cut = copy.deepcopy(agent)
    ties = computation(cut.world, cut.target)
    commit(plan, find_groups(ties), ties)
    close(found, torch.stack(losses(cut.world, cut.target, data)))


class Branches(nn.Module):
    """y = useful(x) + useless(x), where only the first is trained and the second is small."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.useful = tag(nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 4)), "useful")
        self.useless = tag(nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 4)), "useless")
        nn.init.normal_(self.useless[2].weight, std=1e-3)
        nn.init.zeros_(self.useless[2].bias)

    def forward(self, x):
        return self.useful(x) + self.useless(x)


@pytest.fixture
def branches():
    model = Branches()
    zeros = torch.zeros(2, 4, device="meta")
    ties = Computation(
        {"model": model}, lambda n: n["model"](zeros), lambda n: n["model"](zeros[:1])
    )
    inputs = torch.randn(256, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        goal = model(inputs)

    def objective(networks):
        return F.mse_loss(networks["model"](inputs), goal) + 1e-4

    structure = find_groups(ties)
    density = np.tile(np.arange(24.0), 2)
    config = PruneConfig(method="magnitude", min_width=2)
    ranking = Ranking(structure, density, config, structure.parameters())

    def metric(plan):
        cut = copy.deepcopy(model)
        again = Computation({"model": cut}, ties.run, ties.cost)
        commit(plan, find_groups(again), again)
        with torch.no_grad():
            return -float(objective({"model": cut}))

    return model, structure, ranking, objective, metric


@pytest.mark.parametrize("sparsity", [0.2, 0.4])
def test_both_searches_take_from_the_branch_that_does_nothing(branches, sparsity):
    model, _, ranking, objective, metric = branches
    descended = by_gradient(ranking, {"model": model}, objective, sparsity, 100)
    searched, evaluations = by_grid(ranking, metric, sparsity, 0.02, budget=60)
    assert 5 < evaluations <= 60
    uniform = ranking.plan(dict.fromkeys(searched, sparsity), sparsity, 0.02, "uniform")
    for found in (descended, searched):
        plan = ranking.plan(found, sparsity, 0.02, "x")
        assert sparsity <= plan.achieved <= sparsity + 0.02
        assert found["useless.0"] > 2 * found["useful.0"]
        assert metric(plan) > metric(uniform) and metric(plan) > -0.01
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_small_budget_is_shared_between_the_coarse_grid_and_the_finer_ones(branches):
    _, _, ranking, _, metric = branches
    asked = []
    by_grid(ranking, lambda plan: asked.append(plan) or metric(plan), 0.3, 0.02, budget=8)
    assert len(asked) == 8
    coarse = []
    by_grid(ranking, lambda plan: coarse.append(plan.widths_after) or 0.0, 0.3, 0.02, 1_000)
    first = [plan.widths_after for plan in asked[:4]]
    assert first == coarse[:4]  # the nine coarse points would have taken all of it
    assert any(plan.widths_after not in coarse[:9] for plan in asked[4:])


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sparsity=st.floats(0.05, 0.85),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_the_cut_meets_the_sparsity_whatever_the_coefficients(branches, sparsity, shares):
    model, structure, ranking, _, _ = branches
    wanted = dict(zip(structure.widths, shares, strict=True))
    plan = ranking.plan(wanted, sparsity, 0.05, "x")
    cut = copy.deepcopy(model)
    zeros = torch.zeros(2, 4, device="meta")
    ties = Computation({"model": cut}, lambda n: n["model"](zeros))
    commit(plan, find_groups(ties), ties)
    left = sum(parameter.numel() for parameter in cut.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert sparsity <= 1 - left / whole <= sparsity + 0.05
    assert 1 - left / whole == pytest.approx(plan.achieved)


def test_what_cannot_be_met_is_said(branches):
    _, structure, ranking, _, _ = branches
    zero = dict.fromkeys(structure.widths, 0.0)
    with pytest.raises(UserError, match="cannot be reached: with every width at its floor"):
        ranking.plan(zero, 0.99, 0.02, "x")
    with pytest.raises(UserError, match="cannot be met within 1e-06"):
        ranking.plan(zero, 0.31, 1e-6, "x")


def test_the_soft_sparsity_is_that_of_the_cut_as_tau_falls(branches):
    _, structure, ranking, _, _ = branches
    wanted = {name: torch.tensor(0.5) for name in structure.widths}
    masks = ranking.masks(wanted, 1e-4)
    found = ranking.sparsity({name: mask.sum() for name, mask in masks.items()})
    halves = {name: width // 2 for name, width in structure.widths.items()}
    assert float(found) == pytest.approx(ranking.sparsity(halves), abs=1e-6)


# --- As typed --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["autoencoder", "agent"])
def test_the_loss_of_a_subject_feels_every_group(trained, kind):
    """It is least for the whole network, grows as units go, and its gradient reaches the masks.

    Once the agent's compared the masked network with itself, and its terms were detached.
    """
    prune = PruneConfig(method="magnitude", compare=False, gather_updates=1)
    subject = load_subject(str(trained / kind), prune, episodes=1, seed=1)
    widths = subject.structure.widths

    def loss(masks):
        return masked(subject.loss, subject.networks, subject.structure, masks)

    whole = loss({name: torch.ones(width) for name, width in widths.items()})
    if kind == "agent":
        assert whole.item() == pytest.approx(1e-3, abs=1e-4)
    masks = {name: torch.full((width,), 0.3, requires_grad=True) for name, width in widths.items()}
    half = loss(masks)
    assert half.item() > 1.5 * whole.item()
    gradients = torch.autograd.grad(half, list(masks.values()))
    reached = {n for n, g in zip(masks, gradients, strict=True) if g.abs().max() > 1e-6}
    # The smallest Q decides, and that may be the same member everywhere.
    members = {n for n in widths if n.startswith("q_ensemble")}
    assert reached >= set(widths) - members and (kind == "autoencoder" or reached & members)


@pytest.mark.parametrize("kind", ["autoencoder", "agent"])
def test_a_search_is_not_judged_by_what_it_chose_from(trained, kind):
    """It has images, or initial states and planner noise, of its own."""
    prune = PruneConfig(method="magnitude", min_width=2, compare=False, gather_updates=1)
    subject = load_subject(str(trained / kind), prune, episodes=2, seed=1)
    dense = subject.structure.parameters()
    ranking = Ranking(subject.structure, subject.densities["magnitude"], prune, dense)
    plan = ranking.plan(dict.fromkeys(subject.structure.widths, 0.3), 0.3, 0.1, "x")
    scores = [subject.measurement(plan, searching=s)().mean for s in (False, False, True)]
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize(
    ("method", "kind"),  # up to ten seconds each
    [
        ("gradient", "agent"),
        ("grid", "autoencoder"),
        ("uniform", "autoencoder"),
        pytest.param("gradient", "autoencoder", marks=pytest.mark.slow),
        pytest.param("grid", "agent", marks=pytest.mark.slow),
        pytest.param("uniform", "agent", marks=pytest.mark.slow),
    ],
)
def test_coefficients_are_found_saved_and_carried_out(trained, tmp_path, kind, method):
    arguments = [f"checkpoint={trained / kind}", f"method={method}", "sparsity=0.5"]
    arguments += ["tolerance=0.05", "fine_tuning=20", "episodes=1"]
    arguments += ["prune.gather_updates=3", "out=plan.json"]
    arguments += {"grid": ["budget=8"], "gradient": ["steps=30"]}.get(method, [])
    done = run("optimize_coefficients.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "a progress bar where nobody watches"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.result.json"]
    result = json.loads((tmp_path / "plan.result.json").read_text())
    assert 0.5 <= result["sparsity"] <= 0.55
    assert {"before", "cut", "fine_tuned", "seconds"} <= set(result)
    assert result["evaluations"] == {"gradient": 30, "grid": 8, "uniform": 0}[method]
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.achieved == result["sparsity"]
    settings = ["prune.plan=plan.json", "run_dir=cut"]
    settings += ["env_steps=0", "device=cpu"] if kind == "agent" else ["updates=0"]
    done = run("prune.py", f"checkpoint={trained / kind}", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cut = tmp_path / "cut"
    model = load_agent(cut).model if kind == "agent" else load_autoencoder(cut).model
    size = sum(p.numel() for p in model.parameters())
    assert 1 - size / plan.dense_parameters == pytest.approx(plan.achieved)
    (step,) = RunFolder(cut).read_history("pruning step")
    if kind == "autoencoder":  # the agent's was measured over another number of episodes
        assert step["after"]["mean"] == pytest.approx(result["cut"]["mean"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=nowhere"], "'nowhere' does not exist"),
        (["checkpoint=.", "method=genetic"], "must be one of gradient, grid, global, uniform"),
        (["checkpoint=.", "sparsity=1.2"], "sparsity=1.2 must lie in (0, 1)"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, arguments, message):
    done = run("optimize_coefficients.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=[]"], "checkpoint=[] names none"),
        (["checkpoints=[.]", "sparsities=[0.5,1.5]"], "sparsity=1.5 must lie in (0, 1)"),
        (["checkpoints=[.]", "threads=0"], "threads=0 must be at least 1"),
        (["checkpoints=[.]", "episodes=0"], "episodes=0 must be at least 1"),
        (["checkpoints=[.]", "out=nowhere/x"], "out=nowhere/x cannot be written"),
        (["checkpoints=[.]", "prune.budgets={policy: 0.5}"], "prune.budgets is not known"),
    ],
)
def test_a_wrong_comparison_is_refused_in_one_line(tmp_path, arguments, message):
    done = run("compare_coefficients.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr
