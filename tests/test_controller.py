"""Observations that come from outside: converted where their meaning is plain, else refused."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tdmpc_prune import load, load_agent, save_agent
from tdmpc_prune.agent.agent import Agent, Interface
from tdmpc_prune.agent.config import AgentConfig, PlannerConfig
from tdmpc_prune.agent.controller import Controller, ObservationError
from tdmpc_prune.agent.planner import draw_noise, first_means, plan
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.errors import UserError
from tests.commands import ROOT

CONFIG = AgentConfig(planner=PlannerConfig(horizon=2, iterations=1, samples=16, elites=4))
LAYOUT = [{"name": "position", "size": 3}, {"name": "velocity", "size": 2}]
GOOD = [0.5, -1.0, 0.25, 2.0, 0.0]


def make_controller(layout=LAYOUT):
    widths = Widths(5, 2, 4, (8,), (8, 8), (8, 8), (8, 8), ((8, 8),))
    model = WorldModel(widths, torch.Generator().manual_seed(0))
    return Controller(Agent(model, CONFIG, "x", 1), layout=layout)


@pytest.mark.parametrize(
    "same",
    [
        GOOD,
        tuple(GOOD),
        np.array(GOOD),
        np.array(GOOD, np.float16),
        np.array(GOOD, np.float32)[::-1][::-1],
        torch.tensor(GOOD),
    ],
    ids=["list", "tuple", "float64", "float16", "strided", "tensor"],
)
def test_what_has_one_meaning_is_converted(same):
    expected = make_controller().act(np.array(GOOD, np.float32))
    action = make_controller().act(same)
    assert action.dtype == np.float32 and np.array_equal(action, expected)
    assert np.array_equal(
        make_controller().act([1, 0, 2, 0, 1]), make_controller().act([1.0, 0, 2, 0, 1])
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.full(5, np.nan), r"position\[0\] \(element 0\) is nan"),
        ([0, 0, 0, 0, -np.inf], r"velocity\[1\] \(element 4\) is -inf"),
        (np.array([0, 0, 0, 1e300, 0]), r"velocity\[0\] \(element 3\) is 1e\+300, not finite"),
        ([0.0] * 4, r"5 numbers expected \(position 3, velocity 2\); got shape \[4\]"),
        (np.zeros((1, 5), np.float32), r"got shape \[1, 5\]"),
        (0.5, r"got shape \[\]"),
        (None, r"got shape \[\]"),
        ([1, [2, 3], 4, 5, 6], "5 numbers expected .*inhomogeneous"),
        (["1", "2", "3", "4", "5"], "got <U1"),
        ([1j] * 5, "got complex128"),
    ],
)
def test_the_rest_is_refused_and_changes_nothing(wrong, message):
    controller, untouched = make_controller(), make_controller()
    for each in (controller, untouched):
        each.act(GOOD)
    with pytest.raises(ObservationError, match=message) as error:
        controller.act(wrong)
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)
    for _ in range(2):
        assert np.array_equal(controller.act(GOOD), untouched.act(GOOD))


def test_without_a_layout_elements_are_counted():
    with pytest.raises(ObservationError, match="observation: element 2 is nan, not finite"):
        make_controller(()).act([0, 0, np.nan, 0, 0])
    with pytest.raises(ObservationError, match=r"5 numbers expected; got shape \[6\]"):
        make_controller(()).act(np.zeros(6))


def test_a_batch_is_refused_by_name():
    with pytest.raises(ObservationError, match=r"got shape \[4, 5\], a batch; give one"):
        make_controller().act(np.zeros((4, 5)))


# --- What was saved with the agent ------------------------------------------------------------

INTERFACE = Interface((("position", 3), ("velocity", 2)), (-2.0, 0.0), (2.0, 10.0), 0.02)


def test_parts_limits_and_period_go_with_the_agent(tmp_path):
    agent = replace(make_controller().agent, interface=INTERFACE)
    save_agent(tmp_path / "agent", agent)
    assert load_agent(tmp_path / "agent").interface == INTERFACE
    plain = load(tmp_path / "agent")
    own_units = load(tmp_path / "agent", actuator_units=True)
    for _ in range(3):
        action = plain(GOOD)
        expected = [2 * action[0], 5 + 5 * action[1]]
        assert np.allclose(own_units(GOOD), expected, atol=1e-6)
        assert own_units(GOOD).dtype == np.float32
        plain(GOOD)
    with pytest.raises(ObservationError, match=r"5 numbers expected \(position 3, velocity 2\)"):
        plain([0.0] * 4)
    assert plain.statistics.control_period_ms == 20


def test_an_agent_saved_before_says_what_it_lacks():
    before = ROOT / "tests/data/before/agent"
    controller = load(before)
    assert np.abs(controller([0.0])).max() <= 1
    with pytest.raises(ObservationError, match="what they are was not saved with this agent"):
        controller([0.0] * 4)
    assert controller.statistics.late is None
    with pytest.raises(UserError, match=r"limits of the actuators are not in '.*evaluate\.py"):
        load(before, actuator_units=True)


def test_a_shipped_agent_in_ones_own_loop():
    path = ROOT / "checkpoints/cartpole-swingup-fitted"
    controller = load(path)
    controller.reset()
    assert controller([0.0, -1.0, 0.0, 0.0, 0.0]).shape == (1,)
    with pytest.raises(ObservationError, match=r"\(position 3, velocity 2\); got shape \[6\]"):
        controller(np.zeros(6))
    assert controller.size["parameters"] == 44_492
    assert controller.card.startswith("# cartpole-swingup-fitted")
    dense = load(path, dense=True)
    assert dense.agent.is_dense and dense.size["sparsity"] == 0
    assert make_controller().card is None


def test_who_has_no_dense_parent_is_told(tmp_path):
    pruned = load_agent(ROOT / "checkpoints/cartpole-swingup-fitted")
    save_agent(tmp_path / "alone", replace(pruned, parent=None))
    with pytest.raises(UserError, match="names no dense agent"):
        load(tmp_path / "alone", dense=True)


def test_times_are_counted_against_the_control_period():
    agent = make_controller().agent
    controller = Controller(agent, control_period=1e-9)
    assert np.isnan(controller.statistics.median_ms) and controller.statistics.decisions == 0
    for _ in range(5):
        controller(GOOD)
    with pytest.raises(ObservationError):
        controller([np.nan] * 5)
    controller.reset()
    found = controller.statistics
    assert (found.decisions, found.late) == (5, 5)
    assert 0 < found.median_ms <= found.p95_ms <= found.worst_ms
    assert str(found).startswith("5 decisions: median") and "5 late (1e-06 ms)" in str(found)
    relaxed = Controller(agent, control_period=60.0)
    relaxed(GOOD)
    assert relaxed.statistics.late == 0


def test_loading_an_agent_loads_no_simulator_and_draws_nothing(tmp_path):
    program = f"""
import sys
from tdmpc_prune import load
load({str(ROOT / "checkpoints/cartpole-swingup-fitted")!r})([0.0] * 5)
heavy = {{"hydra", "mujoco", "dm_control", "gymnasium", "matplotlib", "scipy", "tensorboard"}}
print(sorted(heavy & set(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True
    )
    assert done.stdout == b"[]\n", done.stderr


@pytest.mark.slow  # times, for which the machine must be quiet
def test_the_controller_costs_little_beside_its_planner():
    controller = load(ROOT / "checkpoints/cartpole-swingup-fitted")
    agent = controller.agent
    planner, discount = agent.config.planner, agent.config.learning.discount
    generator = torch.Generator().manual_seed(0)
    inputs, means = torch.zeros(1, 5), first_means(planner, 1, 1)
    times = {"planner": [], "controller": []}
    for _ in range(300):
        began = time.thread_time()
        plan(agent.model, inputs, means, draw_noise(planner, 1, 1, generator), planner, discount)
        between = time.thread_time()
        controller([0.0] * 5)
        times["planner"].append(between - began)
        times["controller"].append(time.thread_time() - between)
    assert np.median(times["controller"]) < 1.05 * np.median(times["planner"])
