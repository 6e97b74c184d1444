"""Import a checkpoint of the public TD-MPC code. `--help` lists every setting."""

import sys

from tdmpc_prune.command_line import run_command
from tdmpc_prune.deploy.config import ImportConfig


def main(config: ImportConfig, given: list[str]) -> None:
    """Make an agent of a checkpoint of nicklashansen/tdmpc; then it is one like any other.

    Examples:
      python scripts/import.py model.pt task=walker-walk
      python scripts/import.py file=model.pt task=cartpole-swingup out=runs/theirs
    """
    from tdmpc_prune.agent.config import PRESETS
    from tdmpc_prune.deploy.importing import import_public
    from tdmpc_prune.saving.run_folder import command_line
    from tdmpc_prune.settings import by_dotted_name, to_plain, typed
    from tdmpc_prune.words import counted

    agent, folder = import_public(config, command_line(sys.argv))
    paper = by_dotted_name(to_plain(PRESETS["paper"].value), "model.")
    own = by_dotted_name(to_plain(agent.config), "model.")
    own = {name: value for name, value in own.items() if value != paper[name]}
    counts = agent.provenance["env_steps"]
    longer = {"task": agent.task, "start_from": folder, "model": "paper", **own}
    print(
        f"{agent.task}: {counted(agent.size()['parameters'], 'parameter')} in {folder}\n"
        f"evaluate it with   {typed('evaluate.py', str(folder))}\n"
        f"prune it with      {typed('prune.py', str(folder))}\n"
        f"train it on with   {typed('train.py', **longer, env_steps=2 * counts)}"
    )


if __name__ == "__main__":
    run_command(ImportConfig, main)
