"""Offline steps for a cut agent whose refit did not bring its return back (ours).

First encoder and dynamics alone, on the latents, after which the heads are fitted again in closed
form: short, and the steadiest. If that is not enough, everything at once, along the cut agent's own
plans too, in rounds. Every other one is also on the scores that planners compare: that helps some
cuts much and harms others. Each starts from the best so far; the run measures the return and says
whether to go on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from tdmpc_prune.agent.calibration import Pool, agent_calibration, is_head, latent_channels
from tdmpc_prune.agent.computation import agent_computation
from tdmpc_prune.agent.config import AgentConfig
from tdmpc_prune.agent.distillation import Teacher, distil, latent_steps
from tdmpc_prune.agent.world_model import WorldModel
from tdmpc_prune.pruning.groups import find_groups
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.refit import kept_channels, refit, whole_or_restored

LATENT_STEPS = 300
_ROUND = 2_000  # steps: each of its multiples, counted from the cut, ends a round


def mend(
    model: WorldModel,
    target: WorldModel,
    whole: WorldModel,
    plan: Plan,
    pool: Callable[[int], Pool],
    config: AgentConfig,
    path: str,
    steps: tuple[int, int],
    seed: int,
) -> int:
    """Train a cut agent offline to follow what it was.

    Args:
        model: after the cut and its refit; changed in place.
        target: becomes its copy.
        whole: before the cut, in the basis of the plan's units.
        plan: of the cut.
        pool: what both are followed along, of each number another one.
        config: of the agent.
        path: who plans, see `deciding`.
        steps: tried before, and to be tried in all.
        seed: which starts are in a step.

    Returns:
        Steps done now.

    Raises:
        NonFiniteLoss, UserError: see `distil` and `refit`; nothing has changed.
    """
    done, most = steps
    structure = find_groups(agent_computation(whole, copy.deepcopy(whole), config))
    channels = latent_channels(kept_channels(plan, structure, whole), whole)
    teacher = Teacher(whole, pool, channels, config, path)
    rounds = done // _ROUND
    now = min(most, (rounds + 1) * _ROUND if done else LATENT_STEPS) - done
    with whole_or_restored({"model": model}):
        if done:
            distil(model, teacher, now, seed=seed, done=done, scored=rounds % 2 == 1)
        else:
            data = pool(0)
            latent_steps(model, teacher.along(data), now, seed=seed)
            heads = agent_calibration(whole, data, config).only(is_head)
            refit(plan, structure, whole, {"model": model}, heads)
    target.load_state_dict(model.state_dict())
    return now
