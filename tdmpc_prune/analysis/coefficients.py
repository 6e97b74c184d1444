"""Find how much to take from each group of a trained network, and see what the cut costs.

The search is `pruning.coefficients`; what it needs of the network is its `subject.Subject`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
from tqdm import tqdm

from tdmpc_prune.analysis.config import CoefficientsConfig, CompareCoefficientsConfig
from tdmpc_prune.analysis.subject import Score, Subject, load_subject
from tdmpc_prune.pruning.allocation import make_plan
from tdmpc_prune.pruning.coefficients import Ranking, by_gradient, by_grid
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.settings import by_dotted_name
from tdmpc_prune.words import csv_text, plus_minus, table


@dataclass(frozen=True)
class Found:
    """What one method found."""

    method: str
    coefficients: dict[str, float]  # group → fraction of its units that goes, of the plan
    sparsity: float  # of the cut network
    before: Score  # of the network as it is
    cut: Score  # right after the cut
    fine_tuned: Score
    evaluations: int  # of a batch's loss (gradient) or of the score (grid) during the search
    seconds: float  # of the search


def optimize(config: CoefficientsConfig) -> tuple[Found, Plan, str]:
    """What one method finds for one checkpoint, the plan, and what the score is called.

    Raises:
        UserError: see `search` and `load_subject`.
    """
    prune = replace(config.prune, compare=False)
    subject = load_subject(config.checkpoint, prune, config.episodes, config.seed, config.threads)
    return *search(config, subject), subject.score


def search(config: CoefficientsConfig, subject: Subject) -> tuple[Found, Plan]:
    """Find coefficients by the method of `config`, cut, and fine-tune a copy.

    Raises:
        UserError: see `find`.
    """
    _ = subject.densities  # the ranking is no part of the search's time
    began = time.perf_counter()
    plan, evaluations = find(config, subject)
    seconds = time.perf_counter() - began
    after = plan.widths_after
    found = Found(
        method=config.method,
        coefficients={name: 1 - after[name] / width for name, width in plan.widths.items()},
        sparsity=plan.achieved,
        before=subject.before,
        cut=subject.measurement(plan)(),
        fine_tuned=subject.fine_tuned(plan, config.fine_tuning),
        evaluations=evaluations,
        seconds=seconds,
    )
    return found, plan


def find(config: CoefficientsConfig, subject: Subject) -> tuple[Plan, int]:
    """The plan of the coefficients that are found, and the evaluations that it took.

    Raises:
        UserError: the sparsity cannot be reached, or not within the tolerance.
    """
    dense, densities = subject.structure.parameters(), subject.densities[config.prune.method]
    evaluations = 0
    ranking = Ranking(subject.structure, densities, config.prune, dense, config.largest)
    if config.method in ("grid", "gradient"):
        with tqdm(desc=config.method, leave=False, disable=None) as bar:

            def progress(done: int, of: int) -> None:
                bar.total = of
                bar.update(done - bar.n)

            if config.method == "gradient":
                evaluations = config.steps
                wanted = by_gradient(
                    ranking,
                    subject.networks,
                    subject.loss,
                    config.sparsity,
                    config.steps,
                    progress,
                )
            else:
                wanted, evaluations = by_grid(
                    ranking,
                    lambda plan: subject.measurement(plan, searching=True)().mean,
                    config.sparsity,
                    config.tolerance,
                    config.budget,
                    progress,
                )
    else:
        settings = replace(config.prune, allocation=config.method, round_to=1)
        base = make_plan(subject.structure, densities, settings, config.sparsity, dense)
        wanted = {name: len(base.removed.get(name, ())) / n for name, n in base.widths.items()}
    plan = ranking.plan(wanted, config.sparsity, config.tolerance, config.method)
    return plan, evaluations


def text(found: Found, score: str) -> str:
    """What was found, as Markdown."""
    rows = [(name, f"{value:.3f}") for name, value in found.coefficients.items()]
    return (
        f"{table(rows, ['group', 'coefficient'])}\n\n"
        f"{found.method}: sparsity {found.sparsity:.4f}; {score}: {_shown(found.before)} before, "
        f"{_shown(found.cut)} after the cut, {_shown(found.fine_tuned)} after fine-tuning "
        f"(± half of the 95 % interval over its images or episodes); {found.evaluations} "
        f"evaluations in {found.seconds:.1f} s"
    )


def _shown(score: Score) -> str:
    return plus_minus(score.mean, score.interval, 2)


# --- The comparison ---------------------------------------------------------------------------

ARMS = {  # name → method, metric that ranks
    "uniform magnitude": ("uniform", "magnitude"),
    "global magnitude": ("global", "magnitude"),
    "global bayesian": ("global", "bayesian"),
    "grid": ("grid", "bayesian"),
    "gradient": ("gradient", "bayesian"),
}


@dataclass(frozen=True)
class Row:
    """One arm on one checkpoint at one sparsity."""

    checkpoint: str
    arm: str
    asked: float  # sparsity
    found: Found


def compare(config: CompareCoefficientsConfig) -> tuple[list[Row], str]:
    """Every arm on every checkpoint at every sparsity; and the name of the score.

    Raises:
        UserError: see `search` and `load_subject`.
    """
    rows, score = [], ""
    total = len(config.checkpoint) * len(ARMS) * len(config.sparsities)
    with tqdm(total=total, desc="comparing", unit="cut", disable=None) as bar:
        for checkpoint in config.checkpoint:
            prune = replace(config.prune, compare=True)
            subject = load_subject(checkpoint, prune, config.episodes, config.seed, config.threads)
            score = subject.score
            for arm, (method, metric) in ARMS.items():
                one = CoefficientsConfig(
                    checkpoint=checkpoint,
                    method=method,
                    tolerance=config.tolerance,
                    largest=config.largest,
                    budget=config.budget,
                    steps=config.steps,
                    fine_tuning=config.fine_tuning,
                    prune=replace(config.prune, method=metric),
                )
                for sparsity in config.sparsities:
                    found, _ = search(replace(one, sparsity=sparsity), subject)
                    rows.append(Row(checkpoint, arm, sparsity, found))
                    bar.update()
    return rows, score


def comparison_table(rows: list[Row], sparsities: list[float], score: str) -> str:
    """Score right after the cut → after fine-tuning, means over the checkpoints, as Markdown."""
    before = np.mean([row.found.before.mean for row in rows])
    lines = []
    for arm in ARMS:
        cells = []
        for sparsity in sparsities:
            own = [r.found for r in rows if (r.arm, r.asked) == (arm, sparsity)]
            pairs = [[f.cut for f in own], [f.fine_tuned for f in own]]
            cells.append(" → ".join(_shown(_mean(scores)) for scores in pairs))
        own = [r.found for r in rows if r.arm == arm]
        cells.append(f"{np.mean([f.evaluations for f in own]):.0f}")
        cells.append(f"{np.mean([f.seconds for f in own]):.1f}")
        lines.append([arm, *cells])
    names = ["", *(f"sparsity {sparsity:g}" for sparsity in sparsities), "evaluations", "seconds"]
    count = len({row.checkpoint for row in rows})
    return (
        f"{score} right after the cut → after fine-tuning, mean of {count} checkpoint(s), whose "
        f"own is {before:.2f}; ± half of the 95 % interval over images or episodes, not over "
        f"checkpoints; no arm takes more than `largest` of a group\n\n{table(lines, names)}"
    )


def _mean(scores: list[Score]) -> Score:
    """Of checkpoints; the interval is that of images or episodes, not of training seeds."""
    means, intervals = zip(*((score.mean, score.interval) for score in scores), strict=True)
    return Score(float(np.mean(means)), float(np.linalg.norm(intervals) / len(scores)))


def comparison_csv(rows: list[Row]) -> str:
    """One line for each cut."""
    lines = []
    for row in rows:
        found = asdict(row.found)
        coefficients = json.dumps(found.pop("coefficients"))
        about = {"checkpoint": row.checkpoint, "arm": row.arm, "asked": row.asked}
        lines.append(by_dotted_name(about | found) | {"coefficients": coefficients})
    return csv_text((line.values() for line in lines), lines[0])
