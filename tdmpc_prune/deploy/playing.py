"""Playing with a saved agent: at once, in MuJoCo's viewer in real time, or into a film."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
from tqdm import tqdm

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.controller import Controller
from tdmpc_prune.envs import Film, Viewer, frame_seconds, make_env, observation_layout
from tdmpc_prune.envs.viewer import KEYS
from tdmpc_prune.errors import UserError
from tdmpc_prune.evaluation import Evaluation, check_sizes, evaluate

_FILMING = "{desc}: {n_fmt} env steps [{elapsed}{postfix}]"


@dataclass(frozen=True)
class Frame:
    """What was so after one simulator step of an episode."""

    env_steps: int  # of this episode so far
    episode_return: float  # so far
    decision_ms: float  # wall time of the latest decision
    ended: bool


def episode(
    controller: Controller, env: gymnasium.Env, action_repeat: int, seed: int
) -> Iterator[Frame]:
    """Play one episode, simulator step by simulator step.

    Args:
        controller: the agent.
        env: the agent's task, made with an action repeat of 1.
        action_repeat: simulator steps per decision.
        seed: of the initial state.
    """
    observation, _ = env.reset(seed=seed)
    controller.reset()
    total, steps, ended = 0.0, 0, False
    while not ended:
        began = time.perf_counter()
        action = controller.act(observation)
        milliseconds = 1000 * (time.perf_counter() - began)
        for _ in range(action_repeat):
            observation, reward, terminated, truncated, _ = env.step(action)
            total, steps, ended = total + reward, steps + 1, terminated or truncated
            yield Frame(steps, total, milliseconds, ended)
            if ended:
                break


def view(agent: Agent, seed: int, decisions: str = "auto") -> Iterator[str]:
    """Play episodes in the viewer until its window is closed: its keys, and a sentence for each.

    Raises:
        DisplayError: see `envs.Viewer`.
    """
    env = make_env(agent.task, action_repeat=1)
    check_sizes(agent.model, env, agent.task)
    step_seconds = _step_seconds(env, agent.task)
    period = 1000 * step_seconds * agent.action_repeat
    controller = Controller(agent, seed, observation_layout(env), decisions=decisions)
    with Viewer(env) as viewer:
        yield KEYS
        while viewer.is_open:
            viewer.reset_wanted = False
            took: list[float] = []  # ms
            for frame in episode(controller, env, agent.action_repeat, seed):
                if (frame.env_steps - 1) % agent.action_repeat == 0:
                    took.append(frame.decision_ms)
                viewer.show(step_seconds, _texts(frame, step_seconds, period))
                if viewer.reset_wanted or not viewer.is_open:
                    break
            late = sum(ms > period for ms in took)
            yield (
                f"episode from seed {seed}: return {frame.episode_return:.1f} after "
                f"{frame.env_steps * step_seconds:.1f} s{'' if frame.ended else ' (broken off)'}, "
                f"{np.median(took):.1f} ms per decision, {late} of {len(took)} later "
                f"than the control period of {period:g} ms"
            )
            seed += 1
    env.close()
    yield f"{viewer.frames} frames were shown"


def measure(agent: Agent, episodes: int, seed: int, decisions: str = "auto") -> Evaluation:
    """Play episodes without pictures, all at once."""
    with tqdm(desc="playing", unit=" decisions", leave=False, disable=None) as bar:
        return evaluate(agent, episodes, seed, on_decision=bar.update, decisions=decisions)


def record(
    agent: Agent, episodes: int, seed: int, path: Path, decisions: str = "auto"
) -> Evaluation:
    """Play episodes one after another into a film.

    Raises:
        DisplayError: see `envs.Film`.
    """
    began = time.perf_counter()
    env = make_env(agent.task, action_repeat=1, render_mode="rgb_array")
    check_sizes(agent.model, env, agent.task)
    step_seconds = _step_seconds(env, agent.task)
    controller = Controller(agent, seed, observation_layout(env), decisions=decisions)
    returns, decided = [], 0
    deciding = drawing = 0.0  # s
    env.reset(seed=seed)
    with (
        Film(path, env, step_seconds) as film,
        tqdm(bar_format=_FILMING, leave=False, dynamic_ncols=True, disable=None) as bar,
    ):
        for i in range(episodes):
            bar.set_description_str(f"filming episode {i + 1} of {episodes}")
            for frame in episode(controller, env, agent.action_repeat, seed + i):
                if (frame.env_steps - 1) % agent.action_repeat == 0:
                    decided += 1
                    deciding += frame.decision_ms / 1000
                shot = time.perf_counter()
                film.shoot()
                drawing += time.perf_counter() - shot
                bar.set_postfix_str(f"deciding {deciding:.0f} s, drawing {drawing:.0f} s", False)
                bar.update()
            returns.append(frame.episode_return)
    env.close()
    return Evaluation(returns, decided, time.perf_counter() - began)


def _step_seconds(env: gymnasium.Env, task: str) -> float:
    seconds = frame_seconds(env)
    if seconds is None:
        raise UserError(
            f"task '{task}' does not say how long a simulator step is, so it cannot be shown at "
            f"its true speed; give its class 'dt = 0.05' (in seconds), or a metadata with "
            f"'render_fps' (in steps per second)"
        )
    return seconds


def _texts(frame: Frame, step_seconds: float, period: float) -> dict[str, str]:
    return {
        "return": f"{frame.episode_return:.1f} after {frame.env_steps * step_seconds:.1f} s",
        "decision": f"{frame.decision_ms:.1f} of {period:g} ms",
    }
