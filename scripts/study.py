"""Run a whole study of pruning methods, and report it. `--help` lists every setting."""

from tdmpc_prune.analysis import study
from tdmpc_prune.analysis.config import StudyCommand
from tdmpc_prune.command_line import run_sweeps


def job(command: StudyCommand, given: list[str]) -> None:
    """Compare ways to prune: every arm on every task at every sparsity with every seed.

    Examples:
      python scripts/study.py study=quick
      python scripts/study.py study=full hydra/launcher=joblib hydra.launcher.n_jobs=2
      python scripts/study.py report=studies/full/results.csv
    """
    study.run_job(command.study, study.all_jobs(command.study)[command.job])


if __name__ == "__main__":
    run_sweeps("study", job, study.sweeps, study.conclude)
