""

from __future__ import annotations

import copy

from tdmpc_prune.agent.computation import agent_computation
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.analysis.config import GroupsConfig
from tdmpc_prune.envs import make_env
from tdmpc_prune.pruning.groups import Structure, find_groups
from tdmpc_prune.saving.agents import load_agent


def agent_groups(config: GroupsConfig) -> Structure:
    """The groups of a saved agent, or of a dense one for a task."""
    if config.checkpoint:
        saved = load_agent(config.checkpoint)
        model, agent = saved.model, saved.config
    else:
        env, agent = make_env(config.task), config.model
        widths = Widths.dense(
            agent.network, env.observation_space.shape[0], env.action_space.shape[0]
        )
        env.close()
        model = WorldModel(widths)
    return find_groups(agent_computation(model, copy.deepcopy(model), agent))
