"""Show how importance moved during a pruning run. `--help` lists every setting."""

from pathlib import Path

from tdmpc_prune.analysis.config import ImportanceConfig
from tdmpc_prune.command_line import run_command


def main(config: ImportanceConfig, given: list[str]) -> None:
    """Draw importance by group and time of a pruning run, and say which groups rose and fell.

    Examples:
      python scripts/importance.py runs/cartpole-swingup/bayesian/seed1
    """
    from tdmpc_prune.saving.files import check_folder, png, write_file
    from tdmpc_prune.saving.run_folder import beside, run_folder
    from tdmpc_prune.training import importance_history

    run = run_folder(config.checkpoint) or Path(config.checkpoint)
    history = importance_history.read(run)
    out = config.out or beside(run, "importance")
    check_folder(out, "out")
    words = importance_history.summary(history)
    print(words)
    write_file(f"{out}.md", words.replace("\n", "\n\n") + "\n", "out")
    write_file(f"{out}.csv", importance_history.as_csv(history), "out")
    write_file(f"{out}.png", png(importance_history.draw(history)), "out")
    print(f"\nwritten to {out}.png, .md and .csv")


if __name__ == "__main__":
    run_command(ImportanceConfig, main)
