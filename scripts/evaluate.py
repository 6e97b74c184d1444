"""Evaluate or watch a saved agent. `python scripts/evaluate.py --help` lists every setting."""

import sys
from pathlib import Path

from tdmpc_prune.command_line import run_command
from tdmpc_prune.deploy.config import EvaluateConfig


def main(config: EvaluateConfig, given: list[str]) -> None:
    """Play whole episodes with a saved agent, and say how it does beside its dense parent.

    Examples:
      python scripts/evaluate.py checkpoints/cartpole-swingup-pruned
      python scripts/evaluate.py checkpoints/cartpole-swingup-pruned viewer=true
      python scripts/evaluate.py runs/cartpole-swingup/none/seed1 video=out.mp4 episodes=1
    """
    from tdmpc_prune.agent.deciding import choose
    from tdmpc_prune.deploy import card as agent_report
    from tdmpc_prune.deploy import playing
    from tdmpc_prune.errors import UserError
    from tdmpc_prune.machine import choose_device
    from tdmpc_prune.saving.agents import load_agent, load_parent
    from tdmpc_prune.saving.run_folder import command_line
    from tdmpc_prune.words import narrowed

    device = choose_device(config.device)
    agent = load_agent(config.checkpoint, device, config.task)
    choice = choose(config.decisions, agent.model.widths, device)
    if choice.because:
        print(choice.text())
    decisions = choice.path
    if config.viewer:
        for sentence in playing.view(agent, config.seed, decisions):
            print(sentence, flush=True)
        return
    parent = load_parent(agent, config.parent, device)
    if config.play_parent and parent is None:
        raise UserError(
            f"play_parent=true, but '{config.checkpoint}' names no dense agent that is there; "
            f"give parent=<its checkpoint>"
        )
    if config.save:
        agent_report.check_free(Path(config.save))
    if config.video:
        evaluation = playing.record(
            agent, config.episodes, config.seed, Path(config.video), decisions
        )
    else:
        evaluation = playing.measure(agent, config.episodes, config.seed, decisions)
    played = None
    if config.play_parent:
        played = playing.measure(parent, config.episodes, config.seed, decisions)
    found = agent_report.columns(agent, evaluation, parent, played, decisions)
    print(narrowed(agent_report.text(found, evaluation, config.seed)))
    if config.video:
        print(f"filmed in {config.video}")
    if config.save:
        command = command_line(sys.argv)
        agent_report.ship(Path(config.save), found, config.seed, config.threads, command)
        print(f"saved in {config.save}, with {agent_report.CARD}")


if __name__ == "__main__":
    run_command(EvaluateConfig, main)
