"""Export an agent to ONNX: the whole stateless planner step, or the policy alone, as one graph.

Beside the graph lies a JSON file that says all that a program without PyTorch needs: inputs and
outputs with shapes and meaning, what noise to draw, action repeat and control period.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import trange

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.planner import Decision, PlannerNoise, draw_noise, first_means, margins, plan
from tdmpc_prune.envs import make_env, observation_layout, simulator_step_seconds
from tdmpc_prune.errors import RunError, UserError

TOLERANCE = 1e-4  # largest difference to PyTorch that an export may have
CHECKED = 1_000  # random observations that it is checked on
MOST_JUMPS = 0.05  # of those, at most, may hang on rounding
_ROUNDING = 10  # how many times PyTorch's own rounding error a correct graph may be away from it
_OPSET = 17
_NOISE = ("samples", "sample_ends", "policy", "policy_ends", "choice")  # no exploration


class PlannerStep(nn.Module):
    """The planner as a module of tensors alone, for one environment, without its E dimension."""

    def __init__(self, agent: Agent):
        super().__init__()
        self.model = agent.model
        self._planner, self._discount = agent.config.planner, agent.config.learning.discount
        self._noise = _noise(agent)

    def forward(self, observation: Tensor, means: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor]:
        decision = self.decide(observation, means, *noise)
        return decision.actions.squeeze(0), decision.means.squeeze(1)

    def decide(self, observation: Tensor, means: Tensor, *noise: Tensor) -> Decision:
        """The decision for one environment; the noise is what is not empty of `_NOISE`."""
        given = iter(noise)
        parts = {
            name: next(given) if part.numel() else part.to(means)
            for name, part in self._noise.items()
        }
        return plan(
            self.model,
            observation.unsqueeze(0),
            means.unsqueeze(1),
            PlannerNoise(**parts, exploration=means.new_zeros(1, means.shape[-1])),
            self._planner,
            self._discount,
        )

    def hangs_on_rounding(self, inputs: list[Tensor], difference: float) -> bool:
        """Whether a correct graph may differ so much from PyTorch for these inputs.

        How large the rounding errors of float32 are here, a plan in float64 tells. The decision
        jumps where two elites, or an elite and another trajectory, are as good as each other, or
        where the draw lies between two elites, each to within these errors.
        """
        found = self.decide(*inputs)
        exact = copy.deepcopy(self).double().decide(*(part.double() for part in inputs))
        gaps, end = margins(found, inputs[-1])
        ties = [
            gap <= _ROUNDING * _largest(ours, theirs)
            for gap, ours, theirs in zip(gaps, found.values, exact.values, strict=True)
        ]
        ties.append(end <= _ROUNDING * _largest(found.scores.cumsum(1), exact.scores.cumsum(1)))
        own = max(_largest(found.actions, exact.actions), _largest(found.means, exact.means))
        return any(ties) or difference <= _ROUNDING * own


class PolicyStep(nn.Module):
    """The policy's action for an observation, without planning and without noise."""

    def __init__(self, agent: Agent):
        super().__init__()
        self.model = agent.model

    def forward(self, observation: Tensor) -> tuple[Tensor]:
        return (self.model.act(self.model.encode(observation)),)

    def hangs_on_rounding(self, inputs: list[Tensor], difference: float) -> bool:
        """Never: the action follows the observation without a jump."""
        return False


Step = PlannerStep | PolicyStep


@dataclass(frozen=True)
class Port:
    """One input or output of the graph."""

    name: str
    shape: tuple[int, ...]  # float32
    meaning: str
    draw: str | None = None  # of noise: "normal" or "uniform", anew at every decision


@dataclass(frozen=True)
class Check:
    """What an export and PyTorch make of the same random observations."""

    difference: float  # largest, over all outputs and checked observations but the jumps
    jumps: int  # observations where an elite hangs on rounding, in PyTorch as well
    own_ms: float  # median per decision, one thread, side by side
    torch_ms: float

    def accept(self, part: str) -> None:
        """Raises RunError: what was exported is not what PyTorch computes."""
        if self.difference > TOLERANCE:
            raise RunError(
                f"the exported {part} differs from PyTorch by {self.difference:.1e}, and not by "
                f"rounding; nothing was saved"
            )
        if self.jumps > MOST_JUMPS * CHECKED:
            raise RunError(
                f"the exported {part} differs from PyTorch at {self.jumps} of {CHECKED} "
                f"observations at which rounding may decide, which is too often; nothing was saved"
            )

    def as_json(self) -> dict[str, Any]:
        return {
            "largest_difference_to_pytorch": self.difference,
            "observations_checked": CHECKED,
            "of_these_decided_by_rounding": self.jumps,
        }


@dataclass(frozen=True)
class Export:
    """What was exported, and how it compares with PyTorch."""

    graph: Path
    sidecar: Path
    check: Check

    @property
    def difference(self) -> float:
        return self.check.difference

    @property
    def jumps(self) -> int:
        return self.check.jumps


def export(agent: Agent, part: str, path: Path) -> Export:
    """Write `path` and its sidecar, after checking the graph against PyTorch.

    Args:
        agent: on the CPU.
        part: "planner" or "policy".
        path: of the graph, ending in .onnx; the sidecar is `sidecar_of(path)`.

    Raises:
        UserError: ONNX or its runtime is not installed, or the path's suffix is another.
        RunError: the graph differs from PyTorch, or cannot be written; nothing is left behind.
    """
    ort = _require_onnx()
    if path.suffix != ".onnx":
        raise UserError(f"out={path} must end in .onnx")
    module = (PlannerStep if part == "planner" else PolicyStep)(agent).eval()
    inputs, outputs = ports_of(agent, part)
    generator = torch.Generator().manual_seed(0)
    sidecar = sidecar_of(path)
    with _parts(path, sidecar) as (graph, description_file):
        _write_graph(module, inputs, outputs, generator, graph)
        check = compare(module, _session(ort, graph), inputs, generator)
        check.accept(part)
        description = description_of(agent, part, inputs, outputs, "ONNX") | {
            **check.as_json(),
            "sha256": hashlib.sha256(graph.read_bytes()).hexdigest(),
        }
        description_file.write_text(json.dumps(description, indent=1) + "\n")
    return Export(path, sidecar, check)


def graph_session(agent: Agent, part: str, path: Path) -> Any:
    """ONNX Runtime with an agent's graph, unchecked, written to `path`.

    Raises:
        UserError: ONNX or its runtime is not installed.
    """
    ort = _require_onnx()
    module = (PlannerStep if part == "planner" else PolicyStep)(agent).eval()
    inputs, outputs = ports_of(agent, part)
    _write_graph(module, inputs, outputs, torch.Generator().manual_seed(0), path)
    return _session(ort, path)


def _write_graph(
    module: Step, inputs: list[Port], outputs: list[Port], generator: torch.Generator, path: Path
) -> None:
    example = draw_inputs(inputs, generator)
    with warnings.catch_warnings():
        # The tracer warns of sizes that are taken as constants, which is meant: all are fixed.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(example),
            str(path),
            input_names=[port.name for port in inputs],
            output_names=[port.name for port in outputs],
            opset_version=_OPSET,
            dynamo=False,
        )


def sidecar_of(graph: Path) -> Path:
    """The description that belongs to a graph: `x.onnx.json`."""
    return graph.with_name(f"{graph.name}.json")


def _require_onnx():
    try:
        import onnx  # noqa: F401  (the exporter needs it)
        import onnxruntime
    except ImportError as error:
        raise UserError(
            "format=onnx needs onnx and onnxruntime, which are optional: "
            "pip install 'tdmpc-prune[onnx]' (in a checkout: pip install -e '.[onnx]')"
        ) from error
    return onnxruntime


@contextmanager
def _parts(*targets: Path):
    """Paths to write to; they get the targets' names together, or are deleted."""
    parts = [target.with_name(f".{target.name}.part") for target in targets]
    try:
        for part, target in zip(parts, targets, strict=True):
            if target.is_dir():
                raise RunError(f"'{target}' cannot be written: it is a folder")
            part.touch()
        yield parts
        for part, target in zip(parts, targets, strict=True):
            os.replace(part, target)
    except OSError as error:
        raise RunError(f"'{targets[0]}' cannot be written: {error.strerror}") from error
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def ports_of(agent: Agent, part: str) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of the graph, in its order."""
    widths, planner = agent.model.widths, agent.config.planner
    observation = Port("observation", (widths.observation,), "the task's observation, unscaled")
    action = Port("action", (widths.action,), "execute this; in [-1, 1] of the actuator's range")
    if part == "policy":
        return [observation], [action]
    means = first_means(planner, 1, widths.action).squeeze(1)
    inputs = [
        observation,
        Port("means", tuple(means.shape), "next_means of the last decision; zeros after a reset"),
        *(
            Port(
                f"noise_{name}",
                tuple(part.shape),
                "anew at every decision; zeros plan without it",
                "uniform" if name == "choice" else "normal",
            )
            for name, part in _noise(agent).items()
            if part.numel()  # without policy trajectories, they have no noise
        ),
    ]
    return inputs, [action, Port("next_means", tuple(means.shape), "hand back as means")]


def _noise(agent: Agent) -> dict[str, Tensor]:
    """One draw of the noise that the graph takes, by name, in its order."""
    drawn = vars(draw_noise(agent.config.planner, 1, agent.model.widths.action, torch.Generator()))
    return {name: drawn[name] for name in _NOISE}


def draw_inputs(inputs: list[Port], generator: torch.Generator) -> list[Tensor]:
    """Random inputs of the graph."""
    return [
        torch.rand(port.shape, generator=generator)
        if port.draw == "uniform"
        else torch.randn(port.shape, generator=generator)
        for port in inputs
    ]


def _session(ort, graph: Path):
    """A session with one thread that keeps its warnings to itself."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def compare(module: Step, session: Any, inputs: list[Port], generator: torch.Generator) -> Check:
    """Both on random observations with fixed noise.

    The planner takes the best sequences of many. Where the last of them is as good as the next to
    within rounding, two correct programs choose differently. Such observations say nothing about
    the graph; they are counted. `session.run(None, inputs by name)` gives the outputs.
    """
    largest, jumps, times = 0.0, 0, {"own": [], "torch": []}
    names = [port.name for port in inputs]
    fixed = draw_inputs(inputs[1:], generator)

    def timed(who: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        times[who].append(1000 * (time.perf_counter() - began))
        return result

    with torch.no_grad():
        for _ in trange(CHECKED, desc="checking", unit="observation", leave=False, disable=None):
            values = [*draw_inputs(inputs[:1], generator), *fixed]
            fed = dict(zip(names, (value.numpy() for value in values), strict=True))
            ours = timed("torch", lambda values=values: module(*values))
            theirs = timed("own", lambda fed=fed: session.run(None, fed))
            difference = max(map(_largest, ours, map(torch.from_numpy, theirs)))
            if difference > TOLERANCE and module.hangs_on_rounding(values, difference):
                jumps += 1
            else:
                largest = max(largest, difference)
    return Check(largest, jumps, float(np.median(times["own"])), float(np.median(times["torch"])))


def _largest(ones: Tensor, others: Tensor) -> float:
    """The largest difference; infinite where it is not a number."""
    return float((ones - others).abs().nan_to_num(math.inf).max())


def description_of(
    agent: Agent, part: str, inputs: list[Port], outputs: list[Port], kind: str
) -> dict[str, Any]:
    """What a program needs to know; `kind` is what runs the export."""
    env = make_env(agent.task)
    seconds = simulator_step_seconds(env)
    layout = observation_layout(env)
    box = env.unwrapped.action_space
    limits = [[float(low), float(high)] for low, high in zip(box.low, box.high, strict=True)]
    env.close()

    def listed(ports: list[Port]) -> list[dict[str, Any]]:
        return [
            {"name": p.name, "shape": p.shape, "dtype": "float32", "meaning": p.meaning}
            | ({"draw": p.draw} if p.draw else {})
            for p in ports
        ]

    return {
        "format": f"tdmpc_prune {kind} export",
        "part": part,
        "task": agent.task,
        "inputs": listed(inputs),
        "outputs": listed(outputs),
        "observation": layout,
        "observation_units": "as the simulator's: MuJoCo's are SI (m, rad, s, kg) unless scaled",
        "action_units": "-1 and 1 are the ends of each actuator's control range",
        "action_limits": limits,
        "action_repeat": agent.action_repeat,
        "control_period_seconds": seconds * agent.action_repeat if seconds else None,
        "provenance": agent.provenance,
    }
