"""The arms of a study: what is done to a dense agent, and what one would do instead."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tdmpc_prune.pruning.config import L2, METRICS, ONE_CUT, PruneConfig

DENSE = "dense"
SMALL = "small from scratch"
STUDENT = "small with the teacher"
REINITIALISED = "re-initialised"

LATENT_STEPS = 300  # all that comes before the distillation, see `training.mending`
LATENT, DISTILLED = "compensated with latent steps", "compensated distilled"


@dataclass(frozen=True)
class Cut:
    """One cut of the dense agent, by the same way as `prune.py` goes."""

    method: str  # what ranks the units
    refit: bool
    offline_steps: int = 0  # at most, see `PruneConfig.distil`
    searched: bool = False  # how much each group loses is found by gradient descent

    def prune(self, sparsity: float, allocation: str, min_width: int) -> PruneConfig:
        """Its settings: those of `prune.py` up to what the arms have in common."""
        return replace(
            ONE_CUT,
            method=self.method,
            refit=self.refit,
            distil=self.offline_steps,
            sparsity=sparsity,
            allocation=allocation,
            min_width=min_width,
            round_to=1,
            compare=False,
            # Only offline steps are judged by the return before a cut and after it.
            eval_episodes=ONE_CUT.eval_episodes if self.offline_steps else 1,
        )


def _of_metrics() -> dict[str, Cut]:
    return {
        f"{metric} refitted" if refit else metric: Cut(metric, refit)
        for metric in (*METRICS[:-1], L2, METRICS[-1])
        for refit in (False, True)
    }


CUTS = _of_metrics() | {
    "coefficients": Cut("bayesian", refit=False, searched=True),
    "coefficients refitted": Cut("bayesian", refit=True, searched=True),
    "reconstruction plain": Cut("reconstruction", refit=False),
    "reconstruction": Cut("reconstruction", refit=True),
    "compensated plain": Cut("compensated", refit=False),
    "compensated": Cut("compensated", refit=True),
    LATENT: Cut("compensated", refit=True, offline_steps=LATENT_STEPS),
    DISTILLED: Cut("compensated", refit=True, offline_steps=ONE_CUT.distil),
}

ARMS = (DENSE, SMALL, STUDENT, REINITIALISED, *CUTS)

RECIPES = (DISTILLED, LATENT, "compensated")  # the recipe, the fullest form of it first
