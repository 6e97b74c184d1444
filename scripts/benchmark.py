"""Time an agent. `python scripts/benchmark.py --help` lists every setting."""

import json
from pathlib import Path

from tdmpc_prune.benchmark import benchmark
from tdmpc_prune.command_line import run_command
from tdmpc_prune.config import BenchmarkConfig
from tdmpc_prune.errors import RunError
from tdmpc_prune.runtime import choose_device, set_threads


def main(config: BenchmarkConfig, given: list[str]) -> None:
    """Measure milliseconds per decision and per update, beside what the arithmetic alone needs."""
    set_threads(config.threads)
    device = choose_device(config.device)
    result = benchmark(config.model, config.task, config.environments, config.repeats, device)
    print(result.table())
    if config.json:
        try:
            Path(config.json).write_text(json.dumps(result.as_json(), indent=1) + "\n")
        except OSError as error:
            raise RunError(f"json={config.json} cannot be written: {error.strerror}") from error
        print(f"\nwritten to {config.json}")


if __name__ == "__main__":
    run_command("benchmark", main)
