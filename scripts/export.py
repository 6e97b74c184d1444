"""Export a saved agent to ONNX. `python scripts/export.py --help` lists every setting."""

from pathlib import Path

from tdmpc_prune.command_line import run_command
from tdmpc_prune.deploy.config import ExportConfig


def main(config: ExportConfig, given: list[str]) -> None:
    """Write an agent's planner, or its policy alone, as an ONNX graph that needs no PyTorch.

    Examples:
      python scripts/export.py checkpoints/cartpole-swingup-fitted
    """
    from tdmpc_prune.deploy.export import CHECKED, export
    from tdmpc_prune.saving.agents import load_agent
    from tdmpc_prune.settings import typed

    agent = load_agent(config.checkpoint)
    name = f"{agent.task.replace(':', '-').replace('/', '-')}-{config.part}.onnx"
    done = export(agent, config.part, Path(config.out or name))
    print(
        f"{done.graph} and {done.sidecar.name}: at most {done.difference:.1e} from PyTorch on "
        f"{CHECKED} random observations, {done.jumps} left out in which rounding decides\n"
        f"median of one thread, side by side: {done.onnx_ms:.2f} ms in ONNX Runtime, "
        f"{done.torch_ms:.2f} ms in PyTorch\n"
        f"run it with   {typed('run_exported.py', str(done.graph))}"
    )


if __name__ == "__main__":
    run_command(ExportConfig, main)
