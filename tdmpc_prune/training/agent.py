"""Training an agent on a task: act, store, update. A `Trainee`.

Only the simulator's state cannot be saved: each episode starts from a seed of its own, and an
episode in progress is taken up again by executing its actions anew. An episode that cannot go on,
because its simulator fails or does not repeat itself, is broken off like one that ran out of time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.calibration import Pool, agent_calibration, draw_pool
from tdmpc_prune.agent.computation import agent_computation
from tdmpc_prune.agent.deciding import Deciding, choose, deciding
from tdmpc_prune.agent.exploration import RANDOM_STD, Novelty, pink_noise
from tdmpc_prune.agent.learner import Learner, updates_at_once
from tdmpc_prune.agent.planner import first_means, plan
from tdmpc_prune.agent.replay import Batch, Episode, SequenceReplay
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.envs import StepError, make_env
from tdmpc_prune.envs.tasks import default_action_repeat
from tdmpc_prune.errors import UserError
from tdmpc_prune.evaluation import (
    EVALUATION_SEED,
    Evaluation,
    check_sizes,
    evaluate,
    interface_of,
)
from tdmpc_prune.machine import choose_device
from tdmpc_prune.prunable import Calibration, Computation, component_parameters
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.saving.agents import load_agent, load_agents, load_target, write_agent
from tdmpc_prune.saving.run_folder import RunFolder
from tdmpc_prune.settings import typed
from tdmpc_prune.training import report
from tdmpc_prune.training.config import TrainConfig
from tdmpc_prune.training.log import Averages, RunLog
from tdmpc_prune.training.mending import mend
from tdmpc_prune.words import counted, mean_and_std

_CALIBRATION_STARTS = 1_500  # states that sequences start from: 60 000 rows at horizon 5
_ONLINE = "online."  # of the names of weights that learn, beside their average
_NOISE_BLOCK = 500  # decisions, for which noise is drawn at once
_MET = 0.05  # of the decisions must have been rewarded, until rewards count as met
_ENDS_AT_ONCE = 3  # episodes that must do so before a task is refused
BROKEN_IN_A_ROW = 3  # episodes, after which a run does not go on


@dataclass
class Progress:
    """How far an agent's training is."""

    env_steps: int = 0  # simulator steps of finished episodes
    began: int = 0  # of those, made by the run that this one started from
    decisions: int = 0
    episodes: int = 0
    met: bool = False  # whether rewards have been met often enough to learn from
    blind: int = 0  # decisions made before
    updates_due: float = 0.0  # earned by decisions, not yet made
    episodes_to_gather: int = 0  # played for the replay buffer alone, not counted as env steps
    broken_episodes: int = 0
    broken_in_a_row: int = 0


@dataclass
class EpisodeInProgress:
    """What has been executed since the last reset."""

    observations: list[np.ndarray]
    planned: bool  # False in the random episodes at the start
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    env_steps: int = 0


class AgentTraining:
    """An agent that learns a task."""

    unit, score = "env_steps", "return"
    script, learning_rate = "train.py", "model.learning.learning_rate"

    def __init__(self, config: TrainConfig):
        """A new agent. Raises TaskError: see `envs.make_env`."""
        self.config = config
        self.device = choose_device(config.device)
        agent, learning = config.model, config.model.learning
        self.env = make_env(config.task, config.action_repeat)
        self.action_repeat = config.action_repeat or default_action_repeat(config.task)
        self.observation_width = self.env.observation_space.shape[0]
        self.action_width = self.env.action_space.shape[0]

        # Weights are drawn on the CPU, so that they are the same on every device.
        initial = torch.Generator().manual_seed(config.seed)
        model = WorldModel(self._dense_widths(), initial).to(self.device)
        self.choice = choose(config.decisions, self._dense_widths(), self.device, learning=True)
        self.learner = Learner(model, agent.planner, learning, self.choice.path)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.rng = np.random.default_rng(config.seed)
        self.replay = SequenceReplay.of(learning, self.observation_width, self.action_width)
        self._plan = plan
        if self.device.type == "cuda":  # captured as CUDA graphs
            self._plan = torch.compile(plan, mode="reduce-overhead")
        self._deciding: Deciding | None = None  # with the networks of the episode in progress

        self.progress = Progress()
        self.episode: EpisodeInProgress | None = None
        self._lost: str | None = None  # why the episode in progress cannot be taken up
        self.means = self._first_means()
        self._noise: np.ndarray | None = None  # [T, A] pink, of these decisions
        self._novelty: Novelty | None = None  # as far as the last episode
        self.averages = Averages()
        around_cuts = min(config.prune.eval_episodes, config.eval_episodes)
        self.samples = (config.eval_episodes, around_cuts)

    @property
    def model(self) -> WorldModel:
        return self.learner.model

    @property
    def what(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return f"{self.config.task}: {counted(parameters, 'parameter')} on {self.device.type}"

    @property
    def remark(self) -> str | None:
        return self.choice.text() if self.choice.because else None

    @property
    def now(self) -> int:
        return self.progress.env_steps

    @property
    def end(self) -> int:
        return self.config.env_steps

    @property
    def first_update(self) -> int:
        """Env steps before which only random actions are taken."""
        return self.config.model.learning.seed_decisions * self.action_repeat

    @property
    def unfinished(self) -> bool:
        return self.episode is not None

    @property
    def owes_updates(self) -> bool:
        seeded = self.progress.decisions >= self.config.model.learning.seed_decisions
        return seeded and self.progress.updates_due >= 1

    # --- Acting and learning ----------------------------------------------------------------

    def advance(self, log: RunLog) -> float | None:
        """A decision, or an update if there are some to be made; an episode's return at its end."""
        if self.episode is None and self.owes_updates:
            self._update(log)
            return None
        return self._decide(log)

    def rehearse(self) -> None:
        """A reset and a step, before anything is written.

        Raises:
            StepError: the task cannot be played, or is over at once.
        """
        for attempt in range(_ENDS_AT_ONCE):
            self.env.reset(seed=self._episode_seed(self.progress.episodes + attempt))
            *_, terminated, _, _ = self.env.step(np.zeros(self.action_width, np.float32))
            if not terminated:
                return
        raise StepError(
            f"task '{self.config.task}' terminates in the first decision of every episode, which "
            f"leaves nothing to learn; look at what its step returns as 'terminated'"
        )

    def _decide(self, log: RunLog) -> float | None:
        """One decision, and what follows if the episode ends with it.

        Raises:
            StepError: several episodes in a row could not go on.
        """
        if self._lost:
            return self._end_episode(False, log, self._lost)
        try:
            return self._act(log)
        except StepError as error:
            progress = self.progress
            self._end_episode(False, log, str(error))
            progress.broken_in_a_row += 1
            if progress.broken_in_a_row < BROKEN_IN_A_ROW:
                return None
            progress.broken_in_a_row = 0  # going on is a new attempt
            raise StepError(
                f"{BROKEN_IN_A_ROW} episodes in a row could not go on, the last because {error}"
            ) from error

    def _act(self, log: RunLog) -> float | None:
        began = time.perf_counter()
        progress, learning = self.progress, self.config.model.learning
        if self.episode is None:
            observation, _ = self.env.reset(seed=self._episode_seed(progress.episodes))
            planned = progress.decisions >= learning.seed_decisions
            self.episode = EpisodeInProgress([observation], planned)
            self.means = self._first_means()
        episode = self.episode
        if episode.planned:
            action = self._planned_action(episode.observations[-1])
        elif learning.exploration == "pink":
            action = np.clip(RANDOM_STD * self._noise_now(), -1, 1)
        else:
            action = self.rng.uniform(-1, 1, self.action_width).astype(np.float32)
        observation, reward, terminated, truncated, info = self.env.step(action)
        episode.observations.append(observation)
        episode.actions.append(action)
        episode.rewards.append(reward)
        episode.env_steps = info["env_steps"]
        progress.decisions += 1
        if episode.planned:
            self.averages.add({"speed/milliseconds per decision": _milliseconds(began)})
        log.progress(progress.env_steps + episode.env_steps)
        if not (terminated or truncated):
            return None
        progress.broken_in_a_row = 0
        return self._end_episode(terminated, log)

    def _planned_action(self, observation: np.ndarray) -> np.ndarray:
        config, decisions = self.config.model, self.progress.decisions
        seen, pink = decisions - self.progress.blind, config.learning.exploration == "pink"
        self._deciding = self._deciding or deciding(
            self.choice.path, self.model, config, self.config.seed, self.generator, self._plan
        )
        decision = self._deciding.decide(
            torch.from_numpy(observation).to(self.device).unsqueeze(0),
            self.means,
            decision=decisions,
            horizon=config.planner.horizon_at(seen),
            min_std=config.planner.min_std_at(seen),
            explore=not pink,
        )
        self.means = decision.means.clone()
        self.averages.add(
            {
                "planner/std": decision.std.mean().item(),
                "planner/elite value": decision.value.mean().item(),
            }
        )
        action = decision.actions[0].cpu().numpy()
        if pink:
            std = decision.std[0].cpu().numpy()
            action = np.clip(action + std * self._noise_now(), -1, 1)
        return action

    def _noise_now(self) -> np.ndarray:
        """Pink noise `[A]` for the next decision of the episode."""
        done = len(self.episode.actions)
        if self._noise is None or done % _NOISE_BLOCK == 0:
            episode, block = self.progress.episodes, done // _NOISE_BLOCK
            rng = np.random.default_rng([self.config.seed, episode, block])
            self._noise = pink_noise(_NOISE_BLOCK, self.action_width, rng)
        return self._noise[done % _NOISE_BLOCK]

    def _end_episode(
        self, terminated: bool, log: RunLog, broken: str | None = None
    ) -> float | None:
        """Take the episode into the replay buffer and into the books.

        Args:
            terminated: the task ended it, not a time limit.
            log: of the run.
            broken: why it was broken off before its next step, or even its first.
        """
        progress, episode = self.progress, self.episode or EpisodeInProgress([], planned=False)
        self.episode = self._lost = self._deciding = self._noise = self._novelty = None
        progress.episodes += 1
        if episode.actions:
            self.replay.add(
                Episode(
                    np.stack(episode.observations),
                    np.stack(episode.actions),
                    np.array(episode.rewards, np.float32),
                    terminated,
                )
            )
            if not progress.met:
                progress.met = self.replay.rewarded() >= _MET
                progress.blind = progress.blind if progress.met else progress.decisions
        if progress.episodes_to_gather:
            if broken:
                self._note_broken(log, broken, decisions=len(episode.actions))
            if episode.actions:
                progress.episodes_to_gather -= 1
            self.averages.take()
            return None
        progress.env_steps += episode.env_steps
        updates = len(episode.actions) * self.config.model.learning.updates_per_decision
        progress.updates_due += updates
        episode_return = float(sum(episode.rewards))
        about = {
            "decisions": progress.decisions,
            "updates": self.learner.updates,
            "episode_return": episode_return,
            "length": episode.env_steps,
        }
        if broken:
            self._note_broken(log, broken, **about)
            return None
        log.record("episode", progress.env_steps, **about, terminated=terminated)
        scalars = {"training/return": episode_return, "training/decisions": progress.decisions}
        if episode.planned:
            planner = self.config.model.planner
            seen = progress.decisions - progress.blind
            scalars["planner/horizon"] = planner.horizon_at(seen)
            scalars["planner/smallest std"] = planner.min_std_at(seen)
        log.scalars(progress.env_steps, scalars | self.averages.take())
        log.progress(progress.env_steps, **{"return": f"{episode_return:.0f}"})
        return episode_return

    def _note_broken(self, log: RunLog, reason: str, **about: Any) -> None:
        """Count and tell an episode that was broken off."""
        progress = self.progress
        progress.broken_episodes += 1
        log.record("broken episode", progress.env_steps, reason=reason, **about)
        log.scalars(progress.env_steps, {"training/broken episodes": progress.broken_episodes})
        log.say(f"episode broken off at {progress.env_steps} env steps: {reason}")

    def _update(self, log: RunLog) -> None:
        """One update from the replay buffer."""
        began = time.perf_counter()
        learning = self.config.model.learning
        fresh = not self.learner.updates and self.learner.scale is None
        if learning.scale_observations and fresh:
            self.learner.take_scale(torch.from_numpy(self.replay.observations()))
        batch, starts = self.replay.sample(learning.batch, self.rng, self.device)
        if learning.curiosity and not self.progress.met:
            batch = replace(
                batch, rewards=batch.rewards + learning.curiosity * self._unknown(batch)
            )
        # Once per decision: at every update the tracker would take a quarter of the time.
        watched = self.learner.updates % updates_at_once(learning) == 0
        first = self.progress.began
        rate = learning.rate_at((self.now - first) / max(1, self.end - first))
        metrics, priorities = self.learner.update(batch, self.generator, watched=watched, rate=rate)
        self.replay.set_priorities(starts, priorities)
        self.progress.updates_due -= 1
        milliseconds = _milliseconds(began)
        self.averages.add(
            {
                f"{'gradients' if 'norm' in name else 'losses'}/{name}": value
                for name, value in metrics.items()
            }
            | {"speed/milliseconds per update": milliseconds}
        )
        log.progress(
            loss=f"{metrics['model loss']:.3g}",
            updates=f"{self.learner.updates} ({milliseconds:.0f} ms)",
        )

    def _unknown(self, batch: Batch) -> Tensor:
        """How little was known before this update of where a batch leads, `[H, B]` in (0, 1]."""
        self._novelty = self._novelty or Novelty(self.replay.observations(), self.config.seed)
        reached = batch.next_observations.cpu().numpy()
        return torch.from_numpy(self._novelty(reached)).to(self.device)

    def gather(self, log: RunLog) -> bool:
        if self.progress.episodes_to_gather:
            self._decide(log)
            return False
        batch, _ = self.replay.sample(self.config.model.learning.batch, self.rng, self.device)
        self.learner.update(batch, self.generator, learn=False)
        return True

    # --- What it is now ---------------------------------------------------------------------

    def measure(
        self, samples: int, least: int | None, interrupted: Callable[[], bool], log: RunLog
    ) -> Evaluation | None:
        broken: list[StepError] = []
        least = least or self.config.eval_least
        if self.choice.path == "native" and not self.learner.updates:
            samples = min(samples, least)  # nothing has been learnt that is worth more
        evaluation = evaluate(
            self.agent(),
            samples,
            EVALUATION_SEED,
            interrupted=interrupted,
            broken=broken.append,
            decisions=self.choice.path,
            least=least,
        )
        if evaluation is not None:
            for error in broken:  # their returns are those up to there
                self._note_broken(log, str(error), evaluation=True)
        return evaluation

    def said(self, measured: Evaluation) -> str:
        returns = measured.returns
        return f"return {mean_and_std(returns)} over {counted(len(returns), 'episode')}"

    def evaluated(self, measured: Evaluation, log: RunLog) -> dict[str, Any]:
        return {
            "decisions": self.progress.decisions,
            "updates": self.learner.updates,
            "mean_return": measured.mean,
            "std_return": measured.std,
            "returns": measured.returns,
            "seconds": round(measured.seconds, 3),
        }

    def of_each(self, measured: Evaluation) -> dict[str, Any]:
        return {"returns": measured.returns}

    def size(self) -> dict[str, float]:
        return self.agent().size()

    def dense_parameters(self) -> dict[str, int]:
        return {
            name: sum(parameter.numel() for parameter in own)
            for name, own in component_parameters(WorldModel(self._dense_widths())).items()
        }

    def computation(self) -> Computation:
        return agent_computation(self.learner.model, self.learner.target, self.config.model)

    def settle(self) -> None:
        self.learner.settle()

    def calibration(self) -> Calibration:
        return agent_calibration(self.model, self.pool(self.model), self.config.model)

    def mend(self, whole: Mapping[str, Tensor], plan: Plan, done: int, most: int) -> int:
        teacher = WorldModel(Widths.of_weights(whole)).to(self.device)
        teacher.load_state_dict(whole)
        model, target, pool = self.model, self.learner.target, partial(self.pool, teacher)
        config, path, seed = self.config.model, self.choice.path, self.config.seed
        return mend(model, target, teacher, plan, pool, config, path, (done, most), seed)

    def pool(self, model: WorldModel, draw: int = 0) -> Pool:
        """What a cut agent, or a student of it, is to be good at; each draw is another."""
        horizon, seed = self.config.model.planner.horizon, self.config.seed + draw
        return draw_pool(model, self.replay, horizon, _CALIBRATION_STARTS, seed)

    def conclude(self, folder: RunFolder, log: RunLog) -> list[str]:
        """The run's agents are timed in turn: the dense one, those of every cut, the last one."""
        log.progress(doing="timing")
        agents = load_agents(folder)
        latest = agents.popitem()[1]
        name = "final" if agents or not latest.is_dense else "dense"
        agents |= {name: latest}
        for agent in agents.values():
            agent.model.to(self.device)
        times = report.times(agents, self.choice.path)
        about = {"threads": torch.get_num_threads(), "decisions": self.choice.path}
        log.record("times", self.now, **about, agents=times)
        log.text("decision times", report.times_table(times), self.now)
        lines = [report.times_table(times)]
        if self.progress.broken_episodes:
            broken = self.progress.broken_episodes
            lines.append(f"episodes broken off   {broken}, and why is in history.jsonl")
        return [*lines, f"evaluate it with   {typed('evaluate.py', checkpoint=folder)}"]

    def close(self) -> None:
        self.env.close()

    def agent(self, provenance: dict[str, Any] | None = None, parent: Path | None = None) -> Agent:
        """The agent as it is now, its weights averaged over the last updates."""
        average = self.learner.average
        return Agent(
            model=self.model if average is None else average,
            config=self.config.model,
            task=self.config.task,
            action_repeat=self.action_repeat,
            provenance=provenance or {},
            parent=parent,
            interface=interface_of(self.env, self.action_repeat),
        )

    # --- Saving and going on ---------------------------------------------------------------

    def write_networks(
        self,
        folder: Path,
        measured: Evaluation | None,
        provenance: dict[str, Any],
        parent: Path | None,
    ) -> None:
        progress = self.progress
        own = {
            "seed": self.config.seed,
            "env_steps": progress.env_steps,
            "decisions": progress.decisions,
            "updates": self.learner.updates,
            "returns": measured.returns if measured else None,
        }
        agent = self.agent(own | provenance, parent)
        write_agent(folder, replace(agent, parent=None) if agent.is_dense else agent)

    def draw(self, widths: Widths, seed: int) -> WorldModel:
        """Networks that have learnt nothing, for observations of the run's scale if it has one."""
        model = WorldModel(widths, torch.Generator().manual_seed(seed)).to(self.device)
        if self.learner.scale is not None:
            self.learner.scale.fold(model.encoder[0])
        return model

    def rebuild(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        model = WorldModel(Widths.of_weights(weights))
        model.load_state_dict(weights)
        self.take_learner(model, state, self.learner.updates)

    def take_learner(self, model: WorldModel, state: Mapping[str, Tensor], updates: int) -> None:
        """Go on with this model, and with its learner's saved state if there is one.

        Raises:
            UserError: the model is not for this task's observations and actions.
        """
        agent = self.config.model
        check_sizes(model, self.env, self.config.task)
        model = model.to(self.device)
        self.learner = Learner(
            model, agent.planner, agent.learning, self.choice.path, self.learner.scale
        )
        self._deciding = None
        self.learner.updates = updates
        if state:
            self.learner.load_state(state, updates)

    def state(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        episode = self.episode
        values: dict[str, Any] = {
            "progress": vars(self.progress),
            "averaged": self.learner.averaged,
            "rng": self.rng.bit_generator.state,
            "device": self.device.type,
            "episode": None,
        }
        tensors: dict[str, Any] = self.learner.state() | {
            "means": self.means,
            "generator": self.generator.get_state(),
        }
        if self.learner.average is not None:  # which is what is saved as the agent
            tensors |= {f"{_ONLINE}{n}": w for n, w in self.model.state_dict().items()}
        if episode is not None:
            values["episode"] = {
                "planned": episode.planned,
                "rewards": episode.rewards,
                "env_steps": episode.env_steps,
            }
            tensors["episode.observations"] = np.stack(episode.observations)
            tensors["episode.actions"] = np.reshape(episode.actions, (-1, self.action_width))
        return values, {"training": tensors, "replay": self.replay.state()}

    def load(self, path: Path) -> Agent:
        return load_agent(path)

    def load_state(
        self, saved: Agent, values: dict[str, Any], files: dict[str, dict[str, Tensor]]
    ) -> None:
        if values["device"] != self.device.type:
            raise UserError(
                f"'{saved.folder}' was saved on {values['device']}, this is {self.device.type}; "
                f"resume with device={values['device']}"
            )
        tensors = files["training"]
        self._take_online(saved.model, tensors, values)
        self._load_replay(files)
        known = vars(self.progress)
        self.progress = Progress(**{n: v for n, v in values["progress"].items() if n in known})
        self.rng.bit_generator.state = values["rng"]
        self.generator.set_state(tensors["generator"])
        self.means = tensors["means"].to(self.device)
        if values["episode"]:
            self._take_up_episode(
                tensors["episode.actions"].numpy(),
                tensors["episode.observations"].numpy(),
                **values["episode"],
            )

    def _take_online(
        self, saved: WorldModel, tensors: Mapping[str, Tensor], values: dict[str, Any]
    ) -> None:
        """Go on with the networks that learnt; `saved` is their average, where there is one."""
        online = {
            name.removeprefix(_ONLINE): weights
            for name, weights in tensors.items()
            if name.startswith(_ONLINE)
        }
        model = saved
        if online:
            model = WorldModel(Widths.of_weights(online))
            model.load_state_dict(online)
        self.take_learner(model, tensors, values["updates"])
        if online:
            self.learner.average = saved.to(self.device).requires_grad_(False)
            self.learner.averaged = values["averaged"]

    def take_over(
        self, saved: Agent, values: dict[str, Any] | None, files: dict[str, dict[str, Tensor]]
    ) -> None:
        """Raises UserError: it is an agent for something else, and what differs."""
        config, progress = self.config, self.progress
        for name, theirs, ours in (
            ("task", saved.task, config.task),
            ("action_repeat", saved.action_repeat, self.action_repeat),
            ("model", saved.config, config.model),
        ):
            if theirs != ours:
                raise UserError(
                    f"start_from={saved.folder}: its {name} is {theirs}, the run's is {ours}"
                )
        if values is not None:
            self.take_learner(saved.model, files["training"], values["updates"])
            self._load_replay(files)
            for name in ("env_steps", "decisions", "met", "blind", "episodes", "updates_due"):
                setattr(progress, name, values["progress"][name])
        else:
            targets = {f"target.{name}": w for name, w in load_target(saved).items()}
            self.take_learner(saved.model, targets, saved.provenance["updates"])
            progress.env_steps = saved.provenance["env_steps"]
            progress.decisions = saved.provenance["decisions"]
            progress.episodes_to_gather = config.prune.gather_episodes
        progress.began = progress.env_steps

    def measurement(self, values: dict[str, Any]) -> Evaluation:
        return Evaluation(**values)

    def _load_replay(self, files: dict[str, dict[str, Tensor]]) -> None:
        self.replay.load_state({name: array.numpy() for name, array in files["replay"].items()})

    def _take_up_episode(
        self,
        actions: np.ndarray,
        observations: np.ndarray,
        planned: bool,
        rewards: list[float],
        env_steps: int | None = None,  # absent from older checkpoints
    ) -> None:
        """Bring the simulator to where it was, by executing the episode's actions again.

        If it does not come there, the episode will be broken off where it is.
        """
        if env_steps is None:
            env_steps = len(actions) * self.action_repeat
        self.episode = EpisodeInProgress(
            list(observations), planned, list(actions), rewards, env_steps
        )
        try:
            observation, _ = self.env.reset(seed=self._episode_seed(self.progress.episodes))
            again = [observation]
            for action in actions:
                observation, *_ = self.env.step(action)
                again.append(observation)
        except StepError as error:
            self._lost = f"it cannot be taken up again: {error}"
            return
        if not np.array_equal(np.stack(again), observations):
            self._lost = (
                f"task '{self.config.task}' does not repeat itself under the same seed and "
                f"actions, so the episode in progress cannot be taken up again"
            )

    def _dense_widths(self) -> Widths:
        return Widths.dense(self.config.model.network, self.observation_width, self.action_width)

    def _first_means(self) -> Tensor:
        return first_means(self.config.model.planner, 1, self.action_width, self.device)

    def _episode_seed(self, episode: int) -> int:
        """A seed of its own for each episode of each run."""
        return int(np.random.SeedSequence([self.config.seed, episode]).generate_state(1)[0] >> 1)


def _milliseconds(began: float) -> float:
    return 1000 * (time.perf_counter() - began)
