"""Compare ways to choose how much to prune from each group. `--help` lists every setting."""

from tdmpc_prune.analysis.config import CompareCoefficientsConfig
from tdmpc_prune.command_line import run_command


def main(config: CompareCoefficientsConfig, given: list[str]) -> None:
    """Uniform and global magnitude, global bayesian, grid and gradient, at equal sparsity.

    Examples:
      python scripts/compare_coefficients.py runs/autoencoder-digits/none/seed1 <another>
    """
    from tdmpc_prune.analysis import coefficients as coefficients
    from tdmpc_prune.saving.files import check_folder, write_file

    check_folder(config.out, "out")
    rows, score = coefficients.compare(config)
    table = coefficients.comparison_table(rows, config.sparsities, score)
    print(table)
    write_file(f"{config.out}.md", table + "\n", "out")
    write_file(f"{config.out}.csv", coefficients.comparison_csv(rows), "out")
    print(f"\nwritten to {config.out}.md and .csv")


if __name__ == "__main__":
    run_command(CompareCoefficientsConfig, main)
