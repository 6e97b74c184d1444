"""Find how much to prune from each group. `--help` lists every setting."""

import json
from dataclasses import asdict
from pathlib import Path

from tdmpc_prune.analysis.config import CoefficientsConfig
from tdmpc_prune.command_line import run_command


def main(config: CoefficientsConfig, given: list[str]) -> None:
    """Find, by grid search or gradient descent, how much to take from each group; cut a copy.

    Examples:
      python scripts/optimize_coefficients.py runs/autoencoder-digits/none/seed1 sparsity=0.8
      python scripts/optimize_coefficients.py runs/cartpole-swingup/none/seed1 method=grid
    """
    from tdmpc_prune.analysis.coefficients import optimize, text
    from tdmpc_prune.saving.files import check_folder, write_file
    from tdmpc_prune.saving.run_folder import beside

    name = f"{config.method}-{config.sparsity:g}.json"
    out = Path(config.out) if config.out else beside(config.checkpoint, name)
    check_folder(out, "out")
    found, plan, score = optimize(config)
    print(text(found, score))
    write_file(out, plan.as_json(), "out")
    results = out.with_suffix(".result.json")
    write_file(results, json.dumps(asdict(found), indent=1) + "\n", "out")
    print(f"\nthe plan is in {out}, these results in {results}")


if __name__ == "__main__":
    run_command(CoefficientsConfig, main)
