"""Export a saved agent to ONNX or C. `python scripts/export.py --help` lists every setting."""

from pathlib import Path

from tdmpc_prune.command_line import run_command
from tdmpc_prune.deploy.config import ExportConfig


def main(config: ExportConfig, given: list[str]) -> None:
    """Write an agent's planner, or its policy alone, as a program that needs no PyTorch.

    Examples:
      python scripts/export.py checkpoints/cartpole-swingup-fitted
      python scripts/export.py checkpoints/cartpole-swingup-fitted format=c weights=float16
    """
    from tdmpc_prune.deploy.export import CHECKED, export
    from tdmpc_prune.deploy.export_c import export_c
    from tdmpc_prune.saving.agents import load_agent
    from tdmpc_prune.settings import typed

    agent = load_agent(config.checkpoint)
    name = f"{agent.task.replace(':', '-').replace('/', '-')}-{config.part}"
    if config.format == "c":
        folder = Path(config.out or f"{name}-c")
        done = export_c(agent, config.part, folder, config.weights, config.flash_kb)
        check, what, program = done.check, f"{folder}", "C"
        last = f"build its examples with   make -C {folder}\n"
    else:
        done = export(agent, config.part, Path(config.out or f"{name}.onnx"))
        check, what, program = done.check, f"{done.graph} and {done.sidecar.name}", "ONNX Runtime"
        last = ""
    print(
        f"{what}: at most {check.difference:.1e} from PyTorch on {CHECKED} random observations, "
        f"{check.jumps} left out in which rounding decides\n"
        f"median of one thread, side by side: {check.own_ms:.2f} ms in {program}, "
        f"{check.torch_ms:.2f} ms in PyTorch"
    )
    if config.format == "c":
        print(done.text())
    print(f"{last}run it with   {typed('run_exported.py', what.split(' and ')[0])}")


if __name__ == "__main__":
    run_command(ExportConfig, main)
