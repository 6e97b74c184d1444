"""Show an agent's prunable groups. `python scripts/groups.py --help` lists every setting."""

import json
from pathlib import Path

from tdmpc_prune.command_line import run_command
from tdmpc_prune.compression import agent_groups
from tdmpc_prune.config import GroupsConfig
from tdmpc_prune.errors import RunError


def main(config: GroupsConfig, given: list[str]) -> None:
    """Find the groups of an agent by tracing what it computes, and what a unit of each costs."""
    structure = agent_groups(config)
    print(structure.table())
    if config.json:
        try:
            Path(config.json).write_text(json.dumps(structure.as_json(), indent=1) + "\n")
        except OSError as error:
            raise RunError(f"json={config.json} cannot be written: {error.strerror}") from error
        print(f"\nwritten to {config.json}")


if __name__ == "__main__":
    run_command("groups", main)
