"""Judge how stable agents are under compression. `--help` lists every setting."""

import json

from tdmpc_prune.analysis.config import StabilityConfig
from tdmpc_prune.command_line import run_command


def main(config: StabilityConfig, given: list[str]) -> None:
    """Certify, on sampled states, how far the agents of a pruning run may be compressed.

    Examples:
      python scripts/stability.py runs/cartpole-swingup/bayesian/seed1
      python scripts/stability.py runs/cartpole-swingup/bayesian/seed1 disturb.action_delay=1
    """
    from tdmpc_prune.analysis import stability, stability_report
    from tdmpc_prune.saving.files import check_folder, write_file
    from tdmpc_prune.saving.run_folder import beside
    from tdmpc_prune.words import narrowed

    one = isinstance(config.checkpoint, str)
    out = config.out or (beside(config.checkpoint, "stability") if one else "stability")
    check_folder(out, "out")
    stability.check_episodes(config)
    print(f"{stability_report.demand(config)}\n", flush=True)
    found = stability.judge(config)
    print(narrowed(stability_report.text(found, config)))
    certificate = json.dumps(stability_report.certificate(found, config), indent=1)
    write_file(f"{out}.json", certificate + "\n", "out")
    write_file(f"{out}-gap.csv", stability_report.trajectories(found), "out")
    write_file(f"{out}-gap.png", stability_report.trajectories_picture(found), "out")
    write_file(f"{out}-boundary.png", stability_report.boundary_picture(found, config), "out")
    print(f"\nwritten to {out}.json, -gap.csv, -gap.png and -boundary.png")


if __name__ == "__main__":
    run_command(StabilityConfig, main)
