"""The shipped checkpoints: whole, small, with cards that say what is on file, and good."""

from pathlib import Path

import numpy as np
import pytest

from tdmpc_prune.deploy import playing
from tdmpc_prune.deploy.card import CARD
from tdmpc_prune.saving.agents import load_agent, load_parent

FOLDER = Path(__file__).parents[1] / "checkpoints"
SHIPPED = sorted(path.parent.name for path in FOLDER.glob("*/agent.json"))


def test_there_are_two_tasks_and_they_are_small():
    assert len({load_agent(FOLDER / name).task for name in SHIPPED}) >= 2
    size = sum(path.stat().st_size for path in FOLDER.glob("**/*") if path.is_file())
    assert size < 20e6


@pytest.mark.parametrize("name", SHIPPED)
def test_a_card_says_what_is_on_file(name):
    agent = load_agent(FOLDER / name)
    card = (FOLDER / name / CARD).read_text()
    measured = agent.provenance["evaluation"]
    assert measured["episodes"] == len(measured["returns"]) == 20
    mean, std = np.mean(measured["returns"]), np.std(measured["returns"])
    assert f"| {mean:.1f} ± {std:.1f} " in card
    assert f"{sum(p.numel() for p in agent.model.parameters()):,}" in card
    assert all(command in card for command in agent.provenance["commands"])
    assert "/" not in agent.provenance["commands"][0].split()[0]
    parent = load_parent(agent)
    if not agent.is_dense:
        assert parent.is_dense and parent.task == agent.task
        assert parent.folder.parent.resolve() == FOLDER


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.endswith("-fitted")])
def test_a_fitted_agent_still_controls_its_task(name):
    agent = load_agent(FOLDER / name)
    evaluation = playing.measure(agent, episodes=2, seed=100)
    assert evaluation.mean > 0.9 * np.mean(agent.provenance["evaluation"]["returns"])
