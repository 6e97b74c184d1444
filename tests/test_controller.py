"""Observations that come from outside: converted where their meaning is plain, else refused."""

import numpy as np
import pytest
import torch

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.config import AgentConfig, PlannerConfig
from tdmpc_prune.agent.controller import Controller, ObservationError
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.errors import UserError

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
