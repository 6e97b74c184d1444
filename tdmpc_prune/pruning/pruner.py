"""The course of a pruning: what is due when, each cut and what became of it (ours).

Knows a learner of any tagged networks and a measured *score* that should stay high (an agent's
return, an autoencoder's PSNR). Time is counted in the unit of the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Calibration, Computation, Learner
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.pruning.gains import Gains, rank_by_data
from tdmpc_prune.pruning.groups import find_groups
from tdmpc_prune.pruning.importance import Tracker
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.proposals import Proposal, Ranked, all_alike
from tdmpc_prune.pruning.ranks import correlation, ranks
from tdmpc_prune.pruning.refit import Refit, commit_refitted, whole_or_restored
from tdmpc_prune.pruning.schedule import Schedule, make_schedule
from tdmpc_prune.pruning.stage import RunFacts, Stage
from tdmpc_prune.pruning.surgery import commit, kept_units
from tdmpc_prune.thresholds import back_at
from tdmpc_prune.thresholds import least as least_of

_LEAST_GAIN = 0.01  # sparsity that a smaller cut in place of an undone one has to add
_LEVELLED_OFF = 0.05  # a score that rises by less, as a fraction, over its last four evaluations


class Pruner:
    """The pruning side of a run: decides what is due, and does it to the learner.

    Each step is measured, cut, measured, mended offline in rounds while that is needed (none is
    kept that did not help), trained for a while, and measured again; if its score has not come back
    it is undone, and a smaller cut is tried while there is time. `due` says what comes next, and
    every call of another method is one small step after which the run may be saved: `state` is all
    that the rest depends on.
    """

    def __init__(
        self, config: PruneConfig, facts: RunFacts, learner: Learner, computation: Computation
    ):
        """Plan the pruning of a run.

        Args:
            config: how to prune.
            facts: of the run.
            learner: to be pruned.
            computation: all that is done with its networks.

        Raises:
            UserError: the schedule does not fit the run, or there is no such plan.
        """
        self.config = config
        self.facts = facts
        self._given = Plan.load(Path(config.plan)) if config.plan else None
        first = facts.first
        if self._given:
            self.schedule = Schedule(first, first, 1, self._given.sparsity, config.shape)
        else:
            self.schedule = make_schedule(config, first, facts.last, facts.unit)
        self.stage = Stage(phase="gathering" if facts.gather else "waiting")
        self._before_cut: dict[str, Tensor] = {}
        self._before_mending: dict[str, Tensor] = {}
        self._made: Plan | None = None  # of the cut in progress
        self._tracker: Tracker | None = None
        self.attach(learner, computation)

    def check(self, first_update: int) -> None:
        """Refuse, before anything is done, what could not be carried out later.

        Args:
            first_update: time up to which nothing is learnt.

        Raises:
            UserError: floors make the final sparsity unreachable, the plan does not fit, or a cut
                is due before there is any gradient to rank by.
        """
        due, unit = self.schedule.time_of(1), self.facts.unit
        if self.stage.phase == "waiting" and due <= first_update:
            raise UserError(
                f"the first cut is due at {due:.0f} {unit.replace('_', ' ')}, but nothing is "
                f"learnt before {first_update}: raise prune.start or {unit}"
            )
        if self._given:
            self._given.check(self.structure)
        else:
            alike = all_alike(self.structure, self.config)
            self._limited(alike).propose(self.config.sparsity, strict=True)

    def attach(self, learner: Learner, computation: Computation) -> None:
        """Find the groups of a learner's networks, and track its gradients."""
        self._learner = learner
        self._computation = computation
        self.structure = find_groups(self._computation)
        if self._tracker is None:
            self._tracker = Tracker(self.structure, learner.model, self.config, self.facts.seed)
        learner.gradient_hooks.append(self._tracker)

    # --- What the networks are now ------------------------------------------------------------

    @property
    def sparsity(self) -> float:
        """Fraction of the dense networks' parameters that is gone."""
        return 1 - sum(self.structure.parameters().values()) / sum(self.facts.dense.values())

    def size(self) -> dict[str, float]:
        """The networks' size, for logs."""
        return {
            "sparsity": self.sparsity,
            "parameters": sum(self.structure.parameters().values()),
            "macs": sum(self.structure.macs().values()),
        }

    def importance(self, now: int) -> dict[str, dict[str, dict[str, float]]]:
        """Mean importance per parameter of the units of each group and of each component.

        Returns:
            "groups" and "components" → metric → name → mean; coupling units count as a component
            of their own. Empty before any update.
        """
        units = self._tracker.groups
        homes: dict[str, list[slice]] = {}
        for group in self.structure.groups:
            homes.setdefault(group.home, []).append(units[group.name])
        found: dict[str, dict[str, dict[str, float]]] = {}
        for metric, values in self.all_densities(self.schedule.progress(now)).items():
            found.setdefault("groups", {})[metric] = {
                name: float(values[own].mean()) for name, own in units.items()
            }
            found.setdefault("components", {})[metric] = {
                home: float(np.concatenate([values[own] for own in parts]).mean())
                for home, parts in homes.items()
            }
        return found

    def rank_correlations(self, now: int) -> dict[str, float]:
        """Spearman's correlation of every two metrics over all units, by "one ~ other"."""
        densities = self.all_densities(self.schedule.progress(now))
        ranked = {metric: ranks(values) for metric, values in densities.items()}
        return {
            f"{one} ~ {other}": correlation(ranked[one], ranked[other])
            for one, other in combinations(ranked, 2)
        }

    def provenance(self, now: int) -> dict[str, Any]:
        """What a pruned checkpoint says of its parent and of how it was made."""
        stage = self.stage
        dense = stage.reference if stage.dense_score is None else stage.dense_score
        return {
            "method": self.config.method,
            "refit": self.config.refit,
            "offline_steps": stage.offline_steps,
            "cuts": stage.kept,
            "dense_score": dense,
            "dense_parameters": sum(self.facts.dense.values()),
        } | self.outcome(now)

    def outcome(self, now: int) -> dict[str, Any]:
        """What was asked for, what was reached by now, and why less (None: it is not less)."""
        return {
            "asked_sparsity": self.schedule.sparsity,
            "undone": len(self.stage.undone),
            "reference": self.stage.reference,
            "shortfall": self.shortfall(now),
        } | self.size()

    def shortfall(self, now: int) -> str | None:
        """Why the sparsity is below what was asked for; None if it is not."""
        stage, schedule, unit = self.stage, self.schedule, self.facts.unit.replace("_", " ")
        if self._reached:
            return None
        if stage.phase != "waiting" or stage.step < schedule.steps:
            return f"the run was at cut {stage.step} of {schedule.steps} at {now} {unit}"
        if stage.failed is None:
            return "prune.min_width, round_to, budgets and protect leave no more to cut"
        if not stage.undone:  # of a release that kept no record of it
            why = f"a cut to {stage.failed:.3f} was undone"
        else:
            last = stage.undone[-1]
            why = (
                f"cut {last['step']:.0f} (to {last['sparsity']:.3f}) was undone because its "
                f"{self.facts.score} {last['score']:.4g} stayed below {last['least']:.4g}"
            )
        if stage.exhausted or not self._worth_it:
            return f"{why}; a smaller cut would add less than {_LEAST_GAIN} to the sparsity"
        if not schedule.spacing:
            return f"{why}; it was the only one"
        return (
            f"{why}; {self.facts.last - now} {unit} were left, and a smaller cut needs "
            f"{schedule.spacing:.0f} to recover"
        )

    # --- What is due --------------------------------------------------------------------------

    def due(self, now: int) -> str | None:
        """What the run has to do now: gather, measure, cut, mend, undo, or nothing (None)."""
        stage = self.stage
        if stage.phase == "gathering":
            return "gather"
        if stage.phase == "waiting":
            scheduled = stage.step < self.schedule.steps
            if scheduled:
                come = now >= self.schedule.time_of(stage.step + 1)
            else:
                come = self._can_try_again(now)
            known = self.config.by_data or self._tracker.has_evidence
            return "measure" if come and known else None
        if stage.phase == "measured":
            return "cut"
        if stage.phase in ("cut", "mended"):
            return "measure"
        if stage.phase == "mending":
            return "mend"
        if stage.phase == "failed":
            return "undo"
        recovered = stage.record["recovery"] is not None
        over = now >= stage.record["until"]
        return "measure" if over or (stage.came_back and not recovered) else None

    def _can_try_again(self, now: int) -> bool:
        """Whether there is a use and the time for a smaller cut in place of one undone."""
        stage, spacing = self.stage, self.schedule.spacing
        useful = stage.failed is not None and not stage.exhausted and self._worth_it
        return useful and not self._reached and 0 < spacing <= self.facts.last - now

    @property
    def _most_offline(self) -> int:
        """Offline steps after a cut; without a refit they would start from nothing good."""
        return self.config.distil if self.config.refit else 0

    @property
    def _reached(self) -> bool:
        return self.sparsity >= self.schedule.sparsity - 1e-9

    @property
    def _worth_it(self) -> bool:
        """Whether halfway to the cut that was undone is far enough from here."""
        return (self.stage.failed - self.sparsity) / 2 >= _LEAST_GAIN

    @property
    def to_gather(self) -> int:
        """Batches whose gradients are needed before the start; one shows that there is data."""
        return 1 if self.config.by_data else self.config.gather_updates

    def gathered(self) -> None:
        """The gradients of one more batch were seen."""
        self.stage.gathered += 1
        if self.stage.gathered >= self.to_gather:
            self.stage.phase = "waiting"

    def hint(self, score: float) -> None:
        """Take a score of the training itself as a hint that it may be back."""
        if self.stage.phase == "recovering":
            back = back_at(self.stage.record["before"]["mean"])
            self.stage.came_back = self.stage.came_back or score >= back

    def scored(self, now: int, score: float) -> None:
        """Take in a score of the present networks; what is pruned is judged by the best one."""
        stage = self.stage
        stage.reference = score if stage.reference is None else max(stage.reference, score)
        if not stage.changes:
            if stage.dense_scores and stage.dense_scores[-1][0] == now:
                stage.dense_scores.pop()
            stage.dense_scores.append([now, score])

    @property
    def levelled_off(self) -> bool | None:
        """Whether the dense networks' score had stopped rising; None if nothing tells."""
        scores = [score for _, score in self.stage.dense_scores]
        if len(scores) < 2:
            return None
        earlier, newest = scores[-4:][0], scores[-1]
        rising = newest - earlier > _LEVELLED_OFF * abs(earlier)
        return not (rising and newest >= max(scores))

    def measured(self, now: int, values: dict[str, float]) -> tuple[str, dict[str, Any]]:
        """Take in a measurement of the score.

        Args:
            now: the time.
            values: mean, std, and what else is to be on file.

        Returns:
            What it was ("before", "after", "mended", "not mended", "recovering", "recovered", "not
            recovered"), and the step's record so far.
        """
        stage, record = self.stage, self.stage.record
        self.scored(now, values["mean"])
        if stage.phase == "waiting":
            if stage.dense_score is None:
                stage.dense_score = values["mean"]
            stage.record = {"step": stage.step + 1, "before": values}
            stage.phase = "measured"
            return "before", stage.record
        back = values["mean"] >= back_at(record["before"]["mean"])
        if stage.phase == "cut":
            record |= {"after": values, "recovery": 0 if back else None}
            record |= {"offline_steps": 0, "useful_steps": 0}
            stage.phase = "recovering" if back or not self._most_offline else "mending"
            return "after", record
        if stage.phase == "mended":
            return self._judge_mending(values, back), record
        stage.came_back = False
        if back and record["recovery"] is None:
            record["recovery"] = now - record["cut_at"]
        if now < record["until"]:
            return "recovering", record
        harmless, least = self._least_after(record)
        later = min(now + self.schedule.spacing, self.facts.last)
        if harmless and values["mean"] < least and later > now and "waited" not in record:
            record |= {"waited": True, "until": later}
            return "recovering", record
        trained = record["until"] > record["cut_at"]  # else there was no recovery to judge
        record |= {"recovered": values, "least": least}
        record["kept"] = values["mean"] >= least or not trained
        stage.kept += record["kept"]
        stage.phase = "waiting" if record["kept"] else "failed"
        if record["kept"]:
            self._before_cut, self._made = {}, None
        return ("recovered" if record["kept"] else "not recovered"), record

    def _least_after(self, record: dict[str, Any]) -> tuple[bool, float]:
        """Whether a cut had cost less than may be lost, and the score from which it is kept (ours).

        Training moves a score by itself. A cut that was harmless at once is to blame for what came
        later only where that is more than twice as much, after a second stretch of training, too.
        """
        drop, reference = self.config.max_return_drop, self.stage.reference
        at_once = record.get("mended", record["after"])["mean"]
        harmless = at_once >= least_of(reference, drop)
        return harmless, least_of(reference, 2 * drop if harmless else drop)

    def _judge_mending(self, values: dict[str, float], back: bool) -> str:
        """Keep what offline steps have made better; say whether they have."""
        stage, record = self.stage, self.stage.record
        better = values["mean"] > record.get("mended", record["after"])["mean"]
        if better:
            record["mended"] = values
            record["recovery"] = 0 if back else None
            stage.offline_steps += record["last_steps"]
            record["useful_steps"] += record["last_steps"]
        else:
            for name, network in self._computation.networks.items():
                network.load_state_dict(_part(self._before_mending, name))
            stage.changes += 1
        self._before_mending = {}
        over = back or record["offline_steps"] >= self._most_offline
        stage.phase = "recovering" if over else "mending"
        return "mended" if better else "not mended"

    # --- Cutting and undoing ------------------------------------------------------------------

    def propose(self, now: int, calibration: Calibration | None = None) -> Proposal:
        """The cut of the next step, as far as the limits allow; failures are halved towards.

        It removes nothing if all that can go is as much as had to be undone.

        Args:
            now: the time.
            calibration: data; needed where units are ranked by it.

        Raises:
            UserError: see `rank_by_data`.
        """
        if self._given:
            gains = self._gains(calibration)
            return Proposal(self._given, gains.weights if gains else {})
        ranked = self._ranked(self.schedule.progress(now), calibration)
        failed, target = self.stage.failed, self.schedule.sparsity_after(self.stage.step + 1)
        if failed is not None:
            target = min(target, (self.sparsity + failed) / 2)
        found = ranked.propose(target)
        while failed is not None and found.plan.achieved >= failed - 1e-9 and found.plan.removed:
            target = (self.sparsity + target) / 2  # whole chunks go
            if target - self.sparsity < _LEAST_GAIN:
                return Proposal(replace(found.plan, removed={}))
            found = ranked.propose(target)
        return found

    def propose_whole(self, calibration: Calibration | None = None) -> Proposal:
        """One cut to the final sparsity, by the evidence so far.

        Raises:
            UserError: the limits do not allow it; see `rank_by_data`.
        """
        return self._ranked(1.0, calibration).propose(self.config.sparsity, strict=True)

    def _ranked(self, progress: float, calibration: Calibration | None) -> Ranked:
        """The units by the evidence so far, weighed as at `progress` of the schedule."""
        gains = self._gains(calibration)
        return self._limited(self.densities(progress) if gains is None else gains)

    def _limited(self, known: np.ndarray | Gains) -> Ranked:
        network, dense = self._learner.model, self.facts.dense
        return Ranked(known, self.structure, network, self.config, dense)

    def _gains(self, calibration: Calibration | None) -> Gains | None:
        """The units ranked by data, if that is how they are ranked or what a given plan is of."""
        if not (self._given.rotated if self._given else self.config.by_data):
            return None
        return rank_by_data(
            self.structure,
            self._computation,
            calibration,
            self._given.method if self._given else self.config.method,
            rotated=bool(self._given) or self.config.rotate,
        )

    def all_densities(self, progress: float) -> dict[str, np.ndarray]:
        """The same as `densities` for each tracked metric; empty before any update."""
        if not self._tracker.has_evidence:
            return {}
        network = self._learner.model
        return {m: self._tracker.densities(m, network, progress) for m in self.config.tracked}

    def densities(self, progress: float) -> np.ndarray:
        """`[U]` importance per parameter of each unit, weighed as at `progress`."""
        return self._tracker.densities(self.config.method, self._learner.model, progress)

    def cut(
        self, proposal: Proposal, now: int, calibration: Calibration | None = None
    ) -> Refit | None:
        """Carry out a cut on networks, targets, optimisers and tracker: all, or nothing.

        Args:
            proposal: of these very networks.
            now: the time.
            calibration: the data by which the layers that are left are fitted; None: they are not.

        Returns:
            What the refit did.

        Raises:
            UserError, SurgeryError: see `commit` and `commit_refitted`.
        """
        learner, stage, plan, refit = self._learner, self.stage, proposal.plan, None
        before = self._snapshot()
        networks, optimisers = self._computation.networks, list(learner.optimisers.values())
        with whole_or_restored(networks):
            for name, weights in proposal.weights.items():
                networks[name].load_state_dict(weights)
            if calibration is None:
                self.structure = commit(plan, self.structure, self._computation, optimisers)
            else:
                self.structure, refit = commit_refitted(
                    plan, self.structure, self._computation, calibration, optimisers
                )
        self._tracker.keep(kept_units(plan), self.structure, learner.model)
        if proposal.weights:  # evidence and moments are of another basis
            self._tracker.forget()
            for optimiser in optimisers:
                optimiser.state.clear()
        if proposal.weights:
            turned = proposal.weights[self.structure.counted]
            before |= {f"turned/{name}": tensor.clone() for name, tensor in turned.items()}
        self._before_cut, self._made = before, plan
        stage.step += 1
        stage.changes += 1
        stage.came_back = False
        stage.record |= {
            "cut_at": now,
            "until": self.schedule.end_of(stage.step, now, self.facts.last),
            "target": plan.sparsity,
            "widths": plan.widths_after,
        } | self.size()
        stage.phase = "cut"
        return refit

    def whole(self) -> tuple[dict[str, Tensor], Plan]:
        """The model's weights before the cut in progress, in its basis, and its plan."""
        return _part(self._before_cut, "turned") or _part(self._before_cut, "model"), self._made

    def networks(self) -> dict[str, Tensor]:
        """Copies of the weights of all networks, by "network/tensor"."""
        return {
            f"{network}/{name}": tensor.clone()
            for network, own in self._computation.networks.items()
            for name, tensor in own.state_dict().items()
        }

    def mended(self, before: dict[str, Tensor], steps: int) -> None:
        """The networks, which were as in `before`, were trained offline for so many steps."""
        stage = self.stage
        self._before_mending = before
        stage.record["last_steps"] = steps
        stage.record["offline_steps"] += steps
        stage.changes += 1
        stage.phase = "mended"

    def leave_unmended(self) -> None:
        """Offline steps failed: the networks are as they were before these, and none are left."""
        self.stage.phase = "recovering"

    def skip(self) -> None:
        """The next step has nothing to cut: an earlier one went far enough, or failed."""
        self.stage.step += 1
        self.stage.exhausted = self.stage.step >= self.schedule.steps
        self.stage.phase = "waiting"

    def undo(self, learner: Learner, computation: Computation) -> None:
        """Take up `learner`, which was made from `before_cut`, in place of the present one."""
        tracked = _part(self._before_cut, "tracker")
        self.attach(learner, computation)
        self._tracker.load_state(tracked, self.structure, learner.model)
        record = self.stage.record
        self.stage.failed = record["sparsity"]
        self.stage.undone.append(
            {
                "step": record["step"],
                "sparsity": record["sparsity"],
                "score": record["recovered"]["mean"],
                "least": record["least"],
            }
        )
        self.stage.offline_steps -= record.get("useful_steps", 0)  # absent from older runs
        self.stage.changes += 1
        self.stage.phase = "waiting"
        self._before_cut, self._made = {}, None

    def before_cut(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The model's weights and its learner's state as they were before the cut in progress."""
        return _part(self._before_cut, "model"), _part(self._before_cut, "learner")

    def _snapshot(self) -> dict[str, Tensor]:
        """Copies of networks, optimisers and tracker."""
        learner = self._learner
        parts = {
            "model": learner.model.state_dict(),
            "learner": learner.state(),
            "tracker": self._tracker.state(),
        }
        return {
            f"{part}/{name}": tensor.clone()
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    # --- Saving -------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that the rest of the pruning depends on: JSON types, and tensors."""
        tensors = {f"now/{name}": tensor for name, tensor in self._tracker.state().items()}
        values = {"stage": vars(self.stage), "schedule": vars(self.schedule)}
        values["given"] = asdict(self._given) if self._given else None
        values["made"] = asdict(self._made) if self._made else None
        mending = {f"mending/{name}": tensor for name, tensor in self._before_mending.items()}
        return values, tensors | mending | self._before_cut

    def load_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` returned; the learner of that time is attached.

        Raises:
            UserError: the run would now end before its schedule.
        """
        self.stage = Stage(**values["stage"])
        self.schedule = Schedule(**values["schedule"])
        self._given = Plan.of(values["given"]) if values["given"] else None
        self._made = Plan.of(values["made"]) if values.get("made") else None
        if self.schedule.end > self.facts.last:
            raise UserError(
                f"{self.facts.unit}={self.facts.last} would end the run before its pruning "
                f"schedule, which goes on to {self.schedule.end:.0f}"
            )
        if "until" in self.stage.record:
            self.stage.record["until"] = min(self.stage.record["until"], self.facts.last)
        self._tracker.load_state(_part(tensors, "now"), self.structure, self._learner.model)
        self._before_mending = _part(tensors, "mending")
        self._before_cut = {
            name: tensor
            for name, tensor in tensors.items()
            if not name.startswith(("now/", "mending/"))
        }


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """One part of the tensors that are named "part/name"."""
    prefix = f"{part}/"
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
