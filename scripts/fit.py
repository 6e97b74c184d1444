"""Fit an agent to a control rate. `python scripts/fit.py --help` lists every setting."""

import sys
from dataclasses import replace

from tdmpc_prune.command_line import run_command
from tdmpc_prune.deploy.config import FitConfig


def main(config: FitConfig, given: list[str]) -> None:
    """Find the networks and the planner budget that reach a control rate at the least loss.

    Examples:
      python scripts/fit.py runs/cartpole-swingup/bayesian/seed1 rate_hz=200
    """
    from tdmpc_prune.agent.deciding import choose
    from tdmpc_prune.deploy import fit, fit_report
    from tdmpc_prune.errors import UserError
    from tdmpc_prune.saving.run_folder import command_line
    from tdmpc_prune.training import launch
    from tdmpc_prune.words import narrowed

    folder = fit.free_folder(config)
    dense = fit.dense_agent(config)  # or nothing is begun
    choice = choose(config.decisions, dense.model.widths, dense.device)
    if choice.because:
        print(choice.text())
    if cutting := fit.cutting(config):
        run = launch.start(launch.pruning_run(cutting, []), sys.argv)
        print(launch.finish(run))
        config = replace(config, checkpoint=str(run.folder))
    elif idle := config.idle_uncut(given):
        raise UserError(f"{idle.name} has no effect {idle.reason}; add {idle.needed}")
    found = fit.fit(config, folder, command_line(sys.argv))
    print(narrowed(fit_report.table(found)) if found.played else "no candidate is fast enough")
    if found.fitted is None:
        raise fit_report.failure(found, config)
    print(
        f"\n{fit_report.sentence(found, config)}\nsaved in {folder}, with its card and frontier.png"
    )


if __name__ == "__main__":
    run_command(FitConfig, main)
