"""Show an agent's prunable groups. `python scripts/groups.py --help` lists every setting."""

import json

from tdmpc_prune.analysis.config import GroupsConfig
from tdmpc_prune.command_line import run_command


def main(config: GroupsConfig, given: list[str]) -> None:
    """Find the groups of an agent by tracing what it computes, and what a unit of each costs.

    Examples:
      python scripts/groups.py task=cartpole-swingup model=paper
      python scripts/groups.py checkpoints/cartpole-swingup-pruned
    """
    from tdmpc_prune.analysis.groups import agent_groups
    from tdmpc_prune.saving.files import write_file
    from tdmpc_prune.words import narrowed

    structure = agent_groups(config)
    print(narrowed(structure.table()))
    if config.json:
        write_file(config.json, json.dumps(structure.as_json(), indent=1) + "\n", "json")
        print(f"\nwritten to {config.json}")


if __name__ == "__main__":
    run_command(GroupsConfig, main)
