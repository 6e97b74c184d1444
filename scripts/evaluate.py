"""Evaluate a saved agent. `python scripts/evaluate.py --help` lists every setting."""

from tdmpc_prune.checkpoint import load_agent
from tdmpc_prune.command_line import run_command
from tdmpc_prune.config import EvaluateConfig
from tdmpc_prune.evaluation import evaluate
from tdmpc_prune.runtime import choose_device, set_threads


def main(config: EvaluateConfig, given: list[str]) -> None:
    """Play whole episodes with a saved agent and print their returns."""
    set_threads(config.threads)
    agent = load_agent(config.checkpoint, choose_device(config.device))
    evaluation = evaluate(
        agent.model, agent.config, agent.task, agent.action_repeat, config.episodes, config.seed
    )
    parameters = sum(p.numel() for p in agent.model.parameters())
    print(
        f"{agent.task}: return {evaluation.mean:.1f} ± {evaluation.std:.1f} over "
        f"{config.episodes} episodes\n"
        f"per episode: {', '.join(f'{value:.1f}' for value in evaluation.returns)}\n"
        f"{parameters} parameters, trained for {agent.provenance['env_steps']} env steps; "
        f"{evaluation.decisions} decisions in {evaluation.seconds:.1f} s, "
        f"{config.episodes} at a time"
    )


if __name__ == "__main__":
    run_command("evaluate", main)
