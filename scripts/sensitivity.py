"""Measure what each group of a network is worth. `--help` lists every setting."""

import json

from tdmpc_prune.analysis.config import SensitivityConfig
from tdmpc_prune.command_line import run_command


def main(config: SensitivityConfig, given: list[str]) -> None:
    """Remove units of each group, measure the score without recovery, and judge the metrics.

    Examples:
      python scripts/sensitivity.py runs/cartpole-swingup/none/seed1
    """
    from tdmpc_prune.analysis import sensitivity
    from tdmpc_prune.saving.files import check_folder, write_file
    from tdmpc_prune.saving.run_folder import beside

    out = config.out or beside(config.checkpoint, "sensitivity")
    check_folder(out, "out")
    found = sensitivity.measure(config)
    table = sensitivity.text(found, config)
    print(table)
    write_file(f"{out}.md", table + "\n", "out")
    values = json.dumps(sensitivity.as_json(found, config), indent=1)
    write_file(f"{out}.json", values + "\n", "out")
    write_file(f"{out}.png", sensitivity.picture(found, config), "out")
    print(f"\nwritten to {out}.png, .md and .json")


if __name__ == "__main__":
    run_command(SensitivityConfig, main)
