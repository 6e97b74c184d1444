"""Checkpoints of the public TD-MPC code (nicklashansen/tdmpc), as agents of this package.

That code saves `{"model": …, "model_target": …}`, two state dicts, and nothing about the task, the
planner or how long it learnt.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.numpy import save as serialised
from torch import Tensor

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.config import NetworkConfig
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.deploy.config import ImportConfig
from tdmpc_prune.envs import make_env
from tdmpc_prune.envs.tasks import default_action_repeat
from tdmpc_prune.errors import UserError
from tdmpc_prune.evaluation import check_sizes, interface_of
from tdmpc_prune.saving.agents import TARGET, save_agent

# The public code's names of the components → ours. Within them the layers have the same places.
_COMPONENTS = {"_encoder": "encoder", "_dynamics": "dynamics", "_reward": "reward", "_pi": "policy"}
_COMPONENTS |= {"_Q1": "q_ensemble.0", "_Q2": "q_ensemble.1"}


def read_public(path: str | Path) -> tuple[WorldModel, WorldModel]:
    """The online and the target networks of a file. Nothing in it is run.

    Raises:
        UserError: it is not there, is none of the public code's, or is for pictures; and which.
    """
    state = _unpickled(Path(path))
    found = state if isinstance(state, Mapping) else {}
    model = found.get("model", found)
    if not _is_weights(model):
        raise UserError(
            f"'{path}' is no TD-MPC checkpoint: expected are the keys 'model' and 'model_target', "
            f"it holds {_named(found) if found else type(state).__name__}"
        )
    if any(name.startswith(("_encoder.state.", "_encoder.rgb.", "_Qs.")) for name in model):
        raise UserError(f"'{path}' is a TD-MPC2 checkpoint, which is not supported yet")
    target = found.get("model_target")
    if not _is_weights(target):
        raise UserError(f"'{path}' is no TD-MPC checkpoint: it has no 'model_target' with weights")
    return _world_model(path, model), _world_model(path, target)


def _unpickled(path: Path) -> Any:
    """What `torch.save` put there, if it is made of tensors and plain values alone."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"file={path} {what}; give the .pt file that the public code saved")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on how it was pickled
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|global:?) ([\w.]+)", str(error))
        wants = f" ({asked[1]})" if asked else ""
        raise UserError(
            f"'{path}' was not read: it holds more than tensors, and reading it could run "
            f"code{wants}"
        ) from error
    except Exception as error:  # of zip, pickle and struct, whatever the bytes make of it
        raise UserError(f"'{path}' is no TD-MPC checkpoint: torch.save has not made it") from error


def _is_weights(value: Any) -> bool:
    return bool(
        isinstance(value, Mapping)
        and value
        and all(isinstance(n, str) and isinstance(w, Tensor) for n, w in value.items())
    )


def _named(found: Mapping[Any, Any]) -> str:
    names = [f"'{name}'" for name in list(found)[:3]]
    return ", ".join(names) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _world_model(path: str | Path, weights: Mapping[str, Tensor]) -> WorldModel:
    """Networks with these weights, whose names are the public code's."""
    ours: dict[str, Tensor] = {}
    for name, weight in weights.items():
        component, _, rest = name.partition(".")
        if component == "_encoder" and weight.dim() == 4:
            raise UserError(f"'{path}' learnt from pictures; this package knows states alone")
        if component not in _COMPONENTS:
            raise UserError(f"'{path}' is no TD-MPC checkpoint: it has weights '{name}'")
        if not weight.is_floating_point() or not weight.isfinite().all():
            raise UserError(f"'{path}': the weights '{name}' are not finite numbers")
        ours[f"{_COMPONENTS[component]}.{rest}"] = weight.float().contiguous()
    try:
        widths = Widths.of_weights(ours)
        with torch.device("meta"):
            model = WorldModel(widths)
        model.load_state_dict(ours, assign=True)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"'{path}' is no TD-MPC checkpoint: {reason}") from error
    return model.requires_grad_(True)


def _network(path: str, widths: Widths) -> NetworkConfig:
    """The settings of a dense agent with these widths."""
    hidden = widths.dynamics[0]
    network = NetworkConfig(widths.encoder[0], widths.latent, hidden, len(widths.q_ensemble))
    if widths != Widths.dense(network, widths.observation, widths.action):
        raise UserError(f"'{path}' has several hidden widths: {widths}; the public code has one")
    return network


def import_public(config: ImportConfig, command: str) -> tuple[Agent, Path]:
    """Write the agent of a public checkpoint.

    Args:
        config: says which file, and what is not in it.
        command: for its provenance.

    Returns:
        The agent, and its folder.

    Raises:
        UserError: see `read_public`; the weights are not for the task; the folder exists.
        TaskError: see `envs.make_env`.
    """
    folder = Path(config.out or Path("runs") / config.subject / "imported")
    if folder.exists():
        raise UserError(f"'{folder}' exists already; choose another folder with out=")
    model, target = read_public(config.file)
    if target.widths != model.widths:
        raise UserError(f"'{config.file}': its target networks have other widths")
    settings = replace(config.model, network=_network(config.file, model.widths))
    env = make_env(config.task, config.action_repeat)
    check_sizes(model, env, config.task)
    repeat = config.action_repeat or default_action_repeat(config.task)
    # Its exploration has ended, unless somebody knows better.
    most = max(settings.planner.schedule_decisions, settings.learning.seed_decisions)
    decisions = most if config.env_steps is None else config.env_steps // repeat
    content = serialised({name: w.numpy() for name, w in target.state_dict().items()})
    agent = Agent(
        model=model,
        config=settings,
        task=config.task,
        action_repeat=repeat,
        provenance={
            "seed": config.seed,
            "env_steps": decisions * repeat,
            "decisions": decisions,
            "updates": decisions,
            "imported": {
                "from": Path(config.file).name,
                "sha256": hashlib.sha256(Path(config.file).read_bytes()).hexdigest(),
                "counts": "assumed" if config.env_steps is None else "given",
                "target": {f"{TARGET}.safetensors": hashlib.sha256(content).hexdigest()},
            },
            "commands": [command],
        },
        interface=interface_of(env, repeat),
    )
    env.close()
    save_agent(folder, agent, {f"{TARGET}.safetensors": content})
    return replace(agent, folder=folder), folder
