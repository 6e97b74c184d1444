"""Training an agent on a task: act, store, update, evaluate, save, and go on after a stop.

The run is a sequence of small steps (one decision, one update, one evaluation), and everything
that the next step depends on is in the checkpoint. A run that was stopped or killed therefore goes
on with the very numbers that it would have had. Only the simulator's state cannot be saved: each
episode starts from a seed of its own, and an episode in progress is taken up again by executing its
actions anew. An episode that cannot go on, because its simulator fails or does not repeat itself,
is broken off like one that ran out of time, and the run goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs import StepError, TaskError, make_env
from envs.tasks import default_action_repeat
from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.learner import Learner, NonFiniteLoss
from tdmpc_prune.agent.planner import draw_noise, first_means, plan
from tdmpc_prune.agent.replay import Episode, SequenceReplay
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.evaluation import EVALUATION_SEED, Evaluation, check_sizes, evaluate
from tdmpc_prune.machine import choose_device, set_threads
from tdmpc_prune.pruning.pruner import Course
from tdmpc_prune.saving.agents import load_agent, load_agents, save_agent, write_agent
from tdmpc_prune.saving.run_folder import (
    check_newest,
    checkpoint_dir,
    load_training,
    owned,
    save_checkpoint,
)
from tdmpc_prune.settings import to_plain, typed
from tdmpc_prune.signals import Stopped, StopRequest
from tdmpc_prune.training import report as pruning_report
from tdmpc_prune.training import run as pruning_steps
from tdmpc_prune.training.agent_course import agent_course
from tdmpc_prune.training.config import TrainConfig
from tdmpc_prune.training.log import Averages, RunLog
from tdmpc_prune.words import counted, mean_and_std

BROKEN_IN_A_ROW = 3  # episodes, after which a run does not go on


@dataclass
class Progress:
    """How far a run is."""

    env_steps: int = 0  # simulator steps of finished episodes
    decisions: int = 0
    episodes: int = 0
    updates_due: float = 0.0  # earned by decisions, not yet made
    next_evaluation: int = 0  # env steps
    next_importance: int = 0  # env steps at which importance is logged
    episodes_to_gather: int = 0  # played for the replay buffer alone, not counted as env steps
    history: int = 0  # lines of the history
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


class Trainer:
    """One run: `run()` takes it to its end or to a signal."""

    def __init__(self, config: TrainConfig, run_dir: Path):
        """Set everything up; nothing is written.

        Args:
            config: settings of the run; not of how it was resumed.
            run_dir: its folder.
        """
        self.config = config
        self.run_dir = run_dir
        set_threads(config.threads)
        self.device = choose_device(config.device)
        agent, learning = config.model, config.model.learning
        self.env = make_env(config.task, config.action_repeat)
        self.action_repeat = config.action_repeat or default_action_repeat(config.task)
        self.observation_width = self.env.observation_space.shape[0]
        self.action_width = self.env.action_space.shape[0]

        # Weights are drawn on the CPU, so that they are the same on every device.
        initial = torch.Generator().manual_seed(config.seed)
        widths = Widths.dense(agent.network, self.observation_width, self.action_width)
        model = WorldModel(widths, initial).to(self.device)
        self.learner = Learner(model, agent.planner, learning)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.rng = np.random.default_rng(config.seed)
        self.replay = SequenceReplay.of(learning, self.observation_width, self.action_width)
        self._plan = plan
        if self.device.type == "cuda":  # captured as CUDA graphs
            self._plan = torch.compile(plan, mode="reduce-overhead")

        self.progress = Progress(next_evaluation=min(config.eval_every, config.env_steps))
        self.episode: EpisodeInProgress | None = None
        self._lost: str | None = None  # why the episode in progress cannot be taken up
        self.means = self._first_means()
        self.commands: list[str] = []  # that led to this agent, its parents' first
        self.last_evaluation: Evaluation | None = None
        self.times: pruning_report.Times = {}  # of the run's agents, at its end
        self._evaluated: list[int] | None = None  # updates and cuts of the agent that it is of
        if config.start_from:
            self._take_over(checkpoint_dir(config.start_from))
        self.course: Course | None = None  # of the pruning
        if config.prune.method != "none":
            self.course = agent_course(config, self.progress.env_steps, self.learner)
        self._stop_request = StopRequest()
        self._averages = Averages()
        self._loaded: Path | None = None  # the checkpoint that it goes on from
        self.log: RunLog | None = None

    @property
    def model(self) -> WorldModel:
        return self.learner.model

    def run(self, name: str = "") -> Evaluation:
        """Train to the end and return the last evaluation.

        Args:
            name: of the run, see `RunLog`.

        Raises:
            UserError: another process is at work in the run's folder, or was since it was loaded.
            Stopped: a signal came; the state is saved.
            RunError: a loss is not finite (the state before it is saved), the task fails again
                and again (likewise), or saving failed.
        """
        with owned(self.run_dir):
            check_newest(self.run_dir, self._loaded)
            return self._run_owned(name)

    def _run_owned(self, name: str) -> Evaluation:
        self.log = RunLog(
            self.run_dir,
            self.progress.env_steps,
            self.config.env_steps,
            self.progress.history,
            name=name,
        )
        self.log.hyperparameters(to_plain(self.config), "return")
        self.log.say(self._first_line())
        try:
            with self._stop_request:
                if self._lost:
                    self._end_episode(False, self._lost)
                while self.step():
                    if self._stop_request:
                        self._stop()
            self._time_agents()
            if self.course:
                pruning_steps.conclude(self)
        except TaskError as error:
            self.progress.broken_in_a_row = 0  # going on is a new attempt
            saved = self.save()
            raise RunError(
                f"stopped at {self.progress.env_steps} env steps because {error}; the state is "
                f"saved in {saved}; when the task is mended, go on with resume={self.run_dir}"
            ) from error
        except OSError as error:
            raise RunError(
                f"writing to '{self.run_dir}' failed: {error.strerror}; the newest checkpoint "
                f"is whole, go on with: {typed('train.py', resume=self.run_dir)}"
            ) from error
        finally:
            self.log.close()
            self.env.close()
        return self.last_evaluation

    def _first_line(self) -> str:
        """What the run is about to do."""
        progress, config = self.progress, self.config
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        since = f" from {progress.env_steps:,}" if progress.env_steps else ""
        cuts = f"; {pruning_report.announcement(self.course, self.now)}" if self.course else ""
        return (
            f"{config.task}: {counted(parameters, 'parameter')} on {self.device.type}"
            f"{since} to {config.env_steps:,} env steps{cuts}"
        )

    def step(self) -> bool:
        """The next small step of the run; False once it has reached its end."""
        progress = self.progress
        seeded = progress.decisions >= self.config.model.learning.seed_decisions
        due = self.course.due(progress.env_steps) if self.course else None
        if self.episode or (due == "gather" and progress.episodes_to_gather):
            self._decide()
        elif due == "gather":
            pruning_steps.gather(self)
        elif seeded and progress.updates_due >= 1:
            self._update()
        elif due == "measure":
            pruning_steps.measure(self)
        elif due == "undo":
            pruning_steps.undo(self)
        elif progress.env_steps >= progress.next_evaluation:
            self._evaluate()  # before a cut that is due at the same time
        elif due == "cut":
            pruning_steps.cut(self)
        elif progress.env_steps >= self.config.env_steps:
            return False
        else:
            self._decide()
        return True

    def rehearse(self) -> None:
        """Try the task before anything is written: a reset and a step.

        Raises:
            StepError: it cannot be played.
        """
        self.env.reset(seed=self._episode_seed(self.progress.episodes))
        self.env.step(np.zeros(self.action_width, np.float32))

    def _decide(self) -> None:
        """One decision, and what follows if the episode ends with it."""
        try:
            self._act()
        except StepError as error:
            progress = self.progress
            self._end_episode(False, str(error))
            progress.broken_in_a_row += 1
            if progress.broken_in_a_row == BROKEN_IN_A_ROW:
                raise StepError(
                    f"{BROKEN_IN_A_ROW} episodes in a row could not go on, the last because {error}"
                ) from error

    def _act(self) -> None:
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
        else:
            action = self.rng.uniform(-1, 1, self.action_width).astype(np.float32)
        observation, reward, terminated, truncated, info = self.env.step(action)
        episode.observations.append(observation)
        episode.actions.append(action)
        episode.rewards.append(reward)
        episode.env_steps = info["env_steps"]
        progress.decisions += 1
        if episode.planned:
            self._averages.add({"speed/milliseconds per decision": _milliseconds(began)})
        self.log.progress(progress.env_steps + episode.env_steps)
        if terminated or truncated:
            progress.broken_in_a_row = 0
            self._end_episode(terminated)

    def _planned_action(self, observation: np.ndarray) -> np.ndarray:
        config, decisions = self.config.model, self.progress.decisions
        noise = draw_noise(
            config.planner,
            1,
            self.action_width,
            self.generator,
            config.planner.horizon_at(decisions),
        )
        decision = self._plan(
            self.model,
            torch.from_numpy(observation).to(self.device).unsqueeze(0),
            self.means,
            noise,
            config.planner,
            config.learning.discount,
            torch.tensor(config.planner.min_std_at(decisions), device=self.device),
            explore=True,
        )
        self.means = decision.means.clone()
        self._averages.add(
            {
                "planner/std": decision.std.mean().item(),
                "planner/elite value": decision.value.mean().item(),
            }
        )
        return decision.actions[0].cpu().numpy()

    def _end_episode(self, terminated: bool, broken: str | None = None) -> None:
        """Take the episode into the replay buffer and into the books.

        Args:
            terminated: the task ended it, not a time limit.
            broken: why it was broken off before its next step, or even its first.
        """
        progress, episode = self.progress, self.episode or EpisodeInProgress([], planned=False)
        self.episode = self._lost = None
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
        if progress.episodes_to_gather:
            if broken:
                self._note_broken(broken, decisions=len(episode.actions))
            if episode.actions:
                progress.episodes_to_gather -= 1
            self._averages.take()
            return
        progress.env_steps += episode.env_steps
        progress.updates_due += (
            len(episode.actions) * self.config.model.learning.updates_per_decision
        )
        episode_return = float(sum(episode.rewards))
        if broken:
            self._note_broken(
                broken,
                decisions=progress.decisions,
                updates=self.learner.updates,
                episode_return=episode_return,
                length=episode.env_steps,
            )
            return
        self.log.record(
            "episode",
            progress.env_steps,
            decisions=progress.decisions,
            updates=self.learner.updates,
            episode_return=episode_return,
            length=episode.env_steps,
            terminated=terminated,
        )
        scalars = {"training/return": episode_return, "training/decisions": progress.decisions}
        if episode.planned:
            decisions = progress.decisions
            planner = self.config.model.planner
            scalars["planner/horizon"] = planner.horizon_at(decisions)
            scalars["planner/smallest std"] = planner.min_std_at(decisions)
        self.log.scalars(progress.env_steps, scalars | self._averages.take())
        self.log.progress(progress.env_steps, **{"return": f"{episode_return:.0f}"})
        if self.course:
            self.course.hint(episode_return)
            if progress.env_steps >= progress.next_importance:  # five times an evaluation
                progress.next_importance = progress.env_steps + self.config.eval_every // 5
                pruning_steps.log_importance(self)

    def _note_broken(self, reason: str, **about: Any) -> None:
        """Count and tell an episode that was broken off."""
        progress = self.progress
        progress.broken_episodes += 1
        self.log.record("broken episode", progress.env_steps, reason=reason, **about)
        self.log.scalars(progress.env_steps, {"training/broken episodes": progress.broken_episodes})
        self.log.say(f"episode broken off at {progress.env_steps} env steps: {reason}")

    def _update(self) -> None:
        """One update from the replay buffer."""
        began = time.perf_counter()
        batch, starts = self.replay.sample(self.config.model.learning.batch, self.rng, self.device)
        try:
            metrics, priorities = self.learner.update(batch, self.generator)
        except NonFiniteLoss as error:
            saved = self.save()
            raise RunError(
                f"stopped after {self.learner.updates} updates because {error}; the state is saved "
                f"in {saved}; try a smaller model.learning.learning_rate"
            ) from error
        self.replay.set_priorities(starts, priorities)
        self.progress.updates_due -= 1
        milliseconds = _milliseconds(began)
        self._averages.add(
            {
                f"{'gradients' if 'norm' in name else 'losses'}/{name}": value
                for name, value in metrics.items()
            }
            | {"speed/milliseconds per update": milliseconds}
        )
        self.log.progress(loss=f"{metrics['model loss']:.3g}")

    def _evaluate(self) -> None:
        """Evaluate and save; nothing if a signal comes meanwhile."""
        evaluation = self.evaluation(self.config.eval_episodes)
        if evaluation is None:
            return
        config, progress = self.config, self.progress
        later = progress.env_steps // config.eval_every * config.eval_every + config.eval_every
        if progress.env_steps < config.env_steps:
            later = min(later, config.env_steps)
        progress.next_evaluation = later
        size = self.agent().size()
        if self.course:
            self.course.scored(progress.env_steps, evaluation.mean)
        self.log.record(
            "evaluation",
            progress.env_steps,
            decisions=progress.decisions,
            updates=self.learner.updates,
            mean_return=evaluation.mean,
            std_return=evaluation.std,
            returns=evaluation.returns,
            seconds=round(evaluation.seconds, 3),
            **size,
        )
        self.log.scalars(
            progress.env_steps,
            {"evaluation/return": evaluation.mean, "evaluation/std of return": evaluation.std},
        )
        self.log.networks(progress.env_steps, size)
        self.log.say(
            f"evaluation at {progress.env_steps:,} env steps: return "
            f"{mean_and_std(evaluation.returns)} over {counted(config.eval_episodes, 'episode')}, "
            f"sparsity {size['sparsity']:.3f}, after {counted(self.learner.updates, 'update')}"
        )
        self.save()

    def _time_agents(self) -> None:
        """Time the run's agents in turn: the dense one, those of every cut, and the final one."""
        self.log.progress(doing="timing")
        agents = load_agents(self.run_dir)
        latest = agents.popitem()[1]
        name = "final" if agents or not latest.is_dense else "dense"
        agents = pruning_report.by_step(agents) | {name: latest}
        for agent in agents.values():
            agent.model.to(self.device)
        self.times = pruning_report.times(agents)
        threads = torch.get_num_threads()
        self.log.record("times", self.now, threads=threads, agents=self.times)
        self.log.text("decision times", pruning_report.times_table(self.times), self.now)

    def evaluation(self, episodes: int) -> Evaluation | None:
        """The present agent's return; it is not played again if nothing changed since.

        None if a signal comes meanwhile.
        """
        agent = self._version()
        if self._evaluated == agent and len(self.last_evaluation.returns) >= episodes:
            return self.last_evaluation.first(episodes)
        self.log.progress(doing="evaluating")
        broken: list[StepError] = []
        evaluation = evaluate(
            self.agent(),
            episodes,
            EVALUATION_SEED,
            interrupted=lambda: bool(self._stop_request),
            broken=broken.append,
        )
        if evaluation is not None:
            for error in broken:  # their returns are those up to there
                self._note_broken(str(error), evaluation=True)
            self.last_evaluation, self._evaluated = evaluation, agent
        return evaluation

    def _version(self) -> list[int]:
        """Equal as long as the agent is the same: its updates, and the changes by pruning."""
        return [self.learner.updates, self.course.stage.changes if self.course else 0]

    # --- For its pruning, see `pruning_steps.Run` --------------------------------------------

    @property
    def now(self) -> int:
        return self.progress.env_steps

    def gather(self) -> None:
        batch, _ = self.replay.sample(self.config.model.learning.batch, self.rng, self.device)
        self.learner.update(batch, self.generator, learn=False)

    def measure(self) -> tuple[dict[str, float], dict[str, Any]] | None:
        config = self.config
        episodes = min(config.prune.eval_episodes, config.eval_episodes)
        due = self.now >= self.progress.next_evaluation  # it can then use the same episodes
        evaluation = self.evaluation(config.eval_episodes if due else episodes)
        if evaluation is None:
            return None
        evaluation = evaluation.first(episodes)
        shown = {"mean": evaluation.mean, "std": evaluation.std}
        return shown, {"returns": evaluation.returns}

    def take_back(
        self, weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor]
    ) -> Learner:
        model = WorldModel(Widths.of_weights(weights))
        model.load_state_dict(weights)
        self.take_learner(model, state, self.learner.updates)
        return self.learner

    def keep(self, folder: Path) -> None:
        if not folder.exists():
            save_agent(folder, self.agent())

    # --- Saving and going on ---------------------------------------------------------------

    def agent(self) -> Agent:
        """The agent as it is now."""
        progress, evaluation = self.progress, self.last_evaluation
        if self._evaluated != self._version():
            evaluation = None  # it is of other weights
        parent = pruning_steps.parent_dir(self.run_dir)
        agent = Agent(
            model=self.model,
            config=self.config.model,
            task=self.config.task,
            action_repeat=self.action_repeat,
            provenance={
                "seed": self.config.seed,
                "env_steps": progress.env_steps,
                "decisions": progress.decisions,
                "updates": self.learner.updates,
                "returns": evaluation.returns if evaluation else None,
                "commands": self.commands,
            }
            | ({"pruning": self.course.provenance(self.now)} if self.course else {}),
        )
        return agent if agent.is_dense or not parent.exists() else replace(agent, parent=parent)

    def save(self) -> Path:
        """Save everything that the rest of the run depends on."""
        progress, episode = self.progress, self.episode
        evaluation = self.last_evaluation
        if self.log:
            progress.history = self.log.history
        training = {
            "progress": vars(progress),
            "updates": self.learner.updates,
            "rng": self.rng.bit_generator.state,
            "averages": vars(self._averages),
            "device": self.device.type,
            "episode": None
            if episode is None
            else {
                "planned": episode.planned,
                "rewards": episode.rewards,
                "env_steps": episode.env_steps,
            },
            "evaluation": vars(evaluation) if evaluation else None,
            "evaluated": self._evaluated,
        }
        tensors: dict[str, Any] = self.learner.state() | {
            "means": self.means,
            "generator": self.generator.get_state(),
        }
        if episode is not None:
            tensors["episode.observations"] = np.stack(episode.observations)
            tensors["episode.actions"] = np.reshape(episode.actions, (-1, self.action_width))
        files = {"training": tensors, "replay": self.replay.state()}
        if self.course:
            training["pruning"], files["pruning"] = self.course.state()
        agent = self.agent()
        return save_checkpoint(
            self.run_dir, self.now, lambda part: write_agent(part, agent), training, files
        )

    def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote.

        Raises:
            UserError: it is damaged, or is no run's state.
        """
        self._loaded = folder
        agent = load_agent(folder)
        training, files = load_training(folder)
        if training["device"] != self.device.type:
            raise UserError(
                f"'{folder}' was saved on {training['device']}, this is {self.device.type}; "
                f"resume with device={training['device']}"
            )
        tensors = files["training"]
        self.commands = agent.provenance.get("commands", [])
        self.take_learner(agent.model, tensors, training["updates"])
        if self.course:
            self.course.attach(self.learner)
            self.course.load_state(training["pruning"], files["pruning"])
        self.replay.load_state({name: array.numpy() for name, array in files["replay"].items()})
        self.progress = Progress(**training["progress"])
        self.rng.bit_generator.state = training["rng"]
        self.generator.set_state(tensors["generator"])
        self._averages = Averages(**training["averages"])
        if training["evaluation"]:
            self.last_evaluation = Evaluation(**training["evaluation"])
            self._evaluated = training.get("evaluated")
        if self.progress.env_steps < self.config.env_steps:
            self.progress.next_evaluation = min(
                self.progress.next_evaluation, self.config.env_steps
            )
        self.means = tensors["means"].to(self.device)
        if training["episode"]:
            self._take_up_episode(
                tensors["episode.actions"].numpy(),
                tensors["episode.observations"].numpy(),
                **training["episode"],
            )

    def _take_over(self, folder: Path) -> None:
        """Start from a checkpoint of another run: its agent, optimisers, buffer and counts.

        Raises:
            UserError: it is an agent for something else.
        """
        agent, config = load_agent(folder), self.config
        for name, theirs, ours in (
            ("task", agent.task, config.task),
            ("action_repeat", agent.action_repeat, self.action_repeat),
            ("model", agent.config, config.model),
        ):
            if theirs != ours:
                raise UserError(f"start_from={folder}: its {name} is {theirs}, the run's is {ours}")
        progress = self.progress
        self.commands = list(agent.provenance.get("commands", []))
        if (folder / "training.json").is_file():
            training, files = load_training(folder)
            self.take_learner(agent.model, files["training"], training["updates"])
            arrays = {name: tensor.numpy() for name, tensor in files["replay"].items()}
            self.replay.load_state(arrays)
            for name in ("env_steps", "decisions", "episodes", "updates_due"):
                setattr(progress, name, training["progress"][name])
            changes = training["pruning"]["stage"]["changes"] if "pruning" in training else 0
            if training.get("evaluated") == [training["updates"], changes]:
                self.last_evaluation = Evaluation(**training["evaluation"])
                self._evaluated = [training["updates"], 0]
        else:
            self.take_learner(agent.model, {}, agent.provenance["updates"])
            progress.env_steps = agent.provenance["env_steps"]
            progress.decisions = agent.provenance["decisions"]
            progress.episodes_to_gather = config.prune.gather_episodes
        following = (progress.env_steps // config.eval_every + 1) * config.eval_every
        progress.next_evaluation = min(following, config.env_steps)

    def take_learner(self, model: WorldModel, state: dict[str, Any], updates: int) -> None:
        """Go on with this model, and with its learner's saved state if there is one.

        Raises:
            UserError: the model is not for this task's observations and actions.
        """
        agent = self.config.model
        check_sizes(model, self.env, self.config.task)
        self.learner = Learner(model.to(self.device), agent.planner, agent.learning)
        self.learner.updates = updates
        self._evaluated = None
        if state:
            self.learner.load_state(state, updates)

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

    def _stop(self) -> None:
        self.save()
        raise Stopped(
            f"stopped by {self._stop_request.name} at {self.progress.env_steps} env steps; "
            f"go on with: {typed('train.py', resume=self.run_dir)}",
            self._stop_request.number,
        )

    def _first_means(self) -> torch.Tensor:
        return first_means(self.config.model.planner, 1, self.action_width, self.device)

    def _episode_seed(self, episode: int) -> int:
        """A seed of its own for each episode of each run."""
        return int(np.random.SeedSequence([self.config.seed, episode]).generate_state(1)[0] >> 1)


def _milliseconds(began: float) -> float:
    return 1000 * (time.perf_counter() - began)
