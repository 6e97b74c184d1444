"""Run a whole study of pruning methods, and report it. `--help` lists every setting."""

from collections.abc import Iterator

from tdmpc_prune.analysis.config import StudyCommand
from tdmpc_prune.command_line import run_sweeps


def main(command: StudyCommand, given: list[str]) -> None:
    """Compare ways to prune: every arm on every task at every sparsity with every seed.

    Examples:
      python scripts/study.py study=quick
      python scripts/study.py study=full hydra/launcher=joblib hydra.launcher.n_jobs=2
      python scripts/study.py report=studies/full/results.csv
    """
    from tdmpc_prune.analysis import study

    said = study.run_job(command.study, study.all_jobs(command.study)[command.job])
    if said:
        print(said, flush=True)


def sweeps(command: StudyCommand) -> Iterator[str]:
    from tdmpc_prune.analysis import study

    for override, far in study.sweeps(command):
        if far:
            print(far)
        yield override


def conclude(command: StudyCommand) -> None:
    from tdmpc_prune.analysis import study

    for text in study.conclude(command):
        print(text)


if __name__ == "__main__":
    run_sweeps(StudyCommand, main, sweeps, conclude)
