"""Time an agent. `python scripts/benchmark.py --help` lists every setting."""

import json
from dataclasses import replace
from pathlib import Path

from tdmpc_prune.command_line import run_command
from tdmpc_prune.deploy.config import BenchmarkConfig


def main(config: BenchmarkConfig, given: list[str]) -> None:
    """Measure milliseconds per decision and per update, or a pruned agent beside its parent.

    Examples:
      python scripts/benchmark.py model=paper
      python scripts/benchmark.py checkpoints/cartpole-swingup-fitted picture=speed.png
    """
    from tdmpc_prune.deploy.benchmark import benchmark, gain
    from tdmpc_prune.deploy.candidates import add_to_page
    from tdmpc_prune.errors import UserError
    from tdmpc_prune.machine import choose_device
    from tdmpc_prune.saving.agents import load_agent, load_parent
    from tdmpc_prune.saving.files import check_folder, write_file
    from tdmpc_prune.words import counted

    device = choose_device(config.device)
    for setting in ("json", "picture", "page"):
        if path := getattr(config, setting):
            check_folder(path, setting)
    if config.checkpoint:
        agent = load_agent(config.checkpoint, device, config.task if "task" in given else None)
        parent = load_parent(agent, device=device)
        if parent is None:
            raise UserError(f"'{config.checkpoint}' names no dense parent that is there")
        result = gain(agent, parent, config.episodes, config.seed, config.repeats)
        print(f"{agent.task}, {device}, {counted(config.threads, 'thread')}\n\n{result.text()}")
    else:
        result = benchmark(config.model, config.task, config.environments, config.repeats, device)
        print(result.table())
    if config.checkpoint and (config.page or config.picture) and not result.candidates:
        print("\nnothing is drawn or added to a page: ways to decide are compared on the CPU")
        config = replace(config, picture=None, page=None)
    if config.picture:
        write_file(config.picture, result.candidates.picture(), "picture")
        print(f"\ndrawn in {config.picture}")
    if config.page:
        page = Path(config.page)
        line = result.candidates.line(Path(config.checkpoint).name)
        write_file(page, add_to_page(page, line), "page")
        print(f"\na line was added to {page}")
    if config.json:
        write_file(config.json, json.dumps(result.as_json(), indent=1) + "\n", "json")
        print(f"\nwritten to {config.json}")


if __name__ == "__main__":
    run_command(BenchmarkConfig, main)
