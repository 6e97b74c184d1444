"""Export an agent to C: a folder with the planner's source, the weights as a header, and examples.

What it holds compiles as it is, needs no library, and runs where there is no operating system.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.deciding import library, unavailable
from tdmpc_prune.deploy import microcontroller
from tdmpc_prune.deploy.card import check_free
from tdmpc_prune.deploy.export import (
    Check,
    PlannerStep,
    PolicyStep,
    compare,
    description_of,
    ports_of,
)
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.native import build
from tdmpc_prune.native.planner import TYPES, Planner

DESCRIPTION = "agent.json"
EXAMPLES = ("agent.h", "main.c", "loop.c", "library.c", "Makefile")
_POLICY = ("encoder.", "policy.")
_COMPONENTS = {"encoder": 2, "dynamics": 3, "reward": 3, "policy": 3}  # layers
_C_TYPES = {"float32": "float", "float16": "uint16_t", "int8": "int8_t"}
_A_LINE = 8  # numbers

Array = np.ndarray


@dataclass(frozen=True)
class CExport:
    """What was exported, and how it compares with PyTorch with the same weights."""

    folder: Path
    check: Check
    weights_kb: float  # all constants of the agent, in units of 1000 bytes
    code_kb: float
    code_measured: bool  # else estimated, without a cross-compiler
    proof: microcontroller.Proof | None  # in QEMU
    unproven: str | None  # why there is none

    def text(self) -> str:
        """What it takes."""
        how = "" if self.code_measured else " (estimated)"
        size = f"weights {self.weights_kb:.1f} KB, code {self.code_kb:.1f} KB{how} on a Cortex-M4F"
        if self.proof is None:
            return f"{size}; no proof in QEMU: {self.unproven}"
        return f"{size}\n{self.proof.text()}"


def export_c(
    agent: Agent, part: str, folder: Path, weights: str = "float32", flash_kb: float | None = None
) -> CExport:
    """Write the folder, after checking its planner against PyTorch.

    Args:
        agent: on the CPU.
        part: "planner" or "policy".
        folder: to write; it must not exist.
        weights: how matrices are stored: "float32", "float16", or "int8" with a scale per row.
        flash_kb: flash memory that it must fit into, in units of 1000 bytes.

    Raises:
        UserError: the folder exists, there is no C compiler to check with, weights do not fit
            into the type, or it does not fit into the flash memory, and by how much.
        RunError: it differs from PyTorch, or cannot be written; nothing is left behind.
    """
    check_free(folder)
    if because := unavailable():
        raise UserError(f"format=c checks what it writes with a C compiler, but {because}")
    constants = stored(agent, weights)
    if part == "policy":
        constants = {n: a for n, a in constants.items() if n.startswith(_POLICY)}
    weights_kb = sum(array.nbytes for array in constants.values()) / 1000
    code_kb, proof, unproven = microcontroller.ESTIMATED_CODE_KB, None, None
    try:
        code_kb = microcontroller.code_kb()
    except microcontroller.Unproven as error:
        unproven = str(error)
    measured = unproven is None
    if flash_kb is not None and weights_kb + code_kb > flash_kb:
        smaller = {"float32": "; weights=float16 halves them", "float16": "; int8 halves them"}
        raise UserError(
            f"flash_kb={flash_kb:g} is too small by {weights_kb + code_kb - flash_kb:.1f} KB: the "
            f"weights take {weights_kb:.1f} KB and the code {code_kb:.1f} KB"
            f"{smaller.get(weights, '')}"
        )
    check = _checked(agent, part, weights)
    check.accept(part)
    inputs, outputs = ports_of(agent, part)
    inputs = [port for port in inputs if not port.draw]  # it draws its own
    description = description_of(agent, part, inputs, outputs, "C") | {
        **check.as_json(),
        "weights": weights,
        "weights_bytes": sum(array.nbytes for array in constants.values()),
        "noise": "drawn from planner_key: seed, stream, and the number of the decision",
    }
    made = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        for source in build.SOURCES:
            shutil.copy(source, made)
        for name in EXAMPLES:
            shutil.copy(build.SOURCES[0].with_name("example") / name, made)
        (made / "weights.h").write_text(header(agent, part, constants))
        if measured:
            try:
                proof = microcontroller.prove(made, agent)
                description["microcontroller"] = proof.as_json()
            except microcontroller.Unproven as error:
                unproven = str(error)
        (made / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        os.replace(made, folder)
    except OSError as error:
        raise RunError(f"'{folder}' cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(made)
    return CExport(folder, check, weights_kb, code_kb, measured, proof, unproven)


# --- Weights ---------------------------------------------------------------------------------


def stored(agent: Agent, weights: str) -> dict[str, Array]:
    """A state dict as it is stored: matrices of another type, int8 with "<layer>.scale" `[rows]`.

    Raises:
        UserError: a weight is too large for float16.
    """
    found: dict[str, Array] = {}
    for name, tensor in agent.model.state_dict().items():
        array = np.ascontiguousarray(tensor.detach().numpy(), np.float32)
        if array.ndim < 2 or weights == "float32":
            found[name] = array
        elif weights == "float16":
            if np.abs(array).max() >= 65_520:
                raise UserError(f"weights=float16 cannot hold {name}; take weights=float32")
            found[name] = array.astype(np.float16)
        else:
            scale = np.maximum(np.abs(array).max(1) / 127, np.finfo(np.float32).tiny)
            found[name] = np.rint(array / scale[:, None]).astype(np.int8)
            found[name.removesuffix("weight") + "scale"] = scale.astype(np.float32)
    return found


def as_stored(agent: Agent, weights: str) -> Agent:
    """The agent with its weights as they are after they were stored."""
    kept = stored(agent, weights)
    state = {}
    for name in agent.model.state_dict():
        array = kept[name].astype(np.float32)
        scale = kept.get(name.removesuffix("weight") + "scale")
        if kept[name].dtype == np.int8:
            array *= scale[:, None]
        state[name] = torch.from_numpy(array)
    model = copy.deepcopy(agent.model)
    model.load_state_dict(state)
    return replace(agent, model=model)


class _Session:
    """The compiled planner with stored weights, called as ONNX Runtime is."""

    def __init__(self, agent: Agent, part: str, weights: str):
        planner = agent.config.planner
        kept, discount = stored(agent, weights), agent.config.learning.discount
        self._part, self._planner = part, Planner(library(), kept, planner, discount)

    def run(self, _: None, inputs: Mapping[str, Array]) -> list[Array]:
        planner = self._planner
        planner.observation[:] = inputs["observation"]
        if self._part == "policy":
            planner.policy()
            return [planner.action.copy()]
        planner.means[:] = inputs["means"]
        given = {n.removeprefix("noise_"): a for n, a in inputs.items() if n.startswith("noise_")}
        none = np.zeros(0, np.float32)
        given = {"policy": none, "policy_ends": none, "exploration": none} | given
        planner.plan(noise=given)
        return [planner.action.copy(), planner.means.copy()]


def _checked(agent: Agent, part: str, weights: str) -> Check:
    """Against PyTorch with the same weights, which the rest of the check is for."""
    inputs, _ = ports_of(agent, part)
    module = (PlannerStep if part == "planner" else PolicyStep)(as_stored(agent, weights)).eval()
    generator = torch.Generator().manual_seed(0)
    return compare(module, _Session(agent, part, weights), inputs, generator)


# --- The header ------------------------------------------------------------------------------


def header(agent: Agent, part: str, constants: Mapping[str, Array]) -> str:
    """`weights.h`: sizes, weights, and the two structures that the planner takes."""
    widths, planner = agent.model.widths, agent.config.planner
    hidden = {
        *(widths.observation, widths.latent + widths.action, *widths.encoder, *widths.policy),
    }
    if part == "planner":
        hidden |= {*widths.dynamics, *widths.reward}
        hidden |= {width for member in widths.q_ensemble for width in member}
    small = int(constants["policy.0.weight"].dtype != np.float32)
    sizes = [planner.horizon, planner.samples, planner.policy_samples, planner.elites]
    sizes = sizes if part == "planner" else [1, 1, 0, 1]
    lines = [
        f"/* An agent for {_comment(agent.task)}: its {part}, with all that it has learnt.",
        " * Include it in one source file: it defines agent_model and agent_config. */",
        "#ifndef WEIGHTS_H",
        "#define WEIGHTS_H",
        "",
        '#include "planner.h"',
        "",
        f"#define AGENT_PLANS {int(part == 'planner')} /* 0: the policy alone */",
        f"#define AGENT_OBSERVATION {widths.observation}",
        f"#define AGENT_ACTION {widths.action}",
        f"#define AGENT_MEANS {planner.horizon if part == 'planner' else 1}",
        "/* Bytes of workspace. */",
        f"#define AGENT_WORKSPACE PLANNER_WORKSPACE({max(hidden)}, {widths.latent}, "
        f"{widths.action}, {', '.join(map(str, sizes))}, {small})",
        "",
    ]
    for name, array in constants.items():
        lines += _array(name, array)
    lines += _structures(agent, part, constants)
    return "\n".join([*lines, "", "#endif", ""])


def _array(name: str, array: Array) -> list[str]:
    values = array.ravel()
    if array.dtype == np.float16:
        words = [f"0x{bits:04x}" for bits in values.view(np.uint16)]
    elif array.dtype == np.int8:
        words = [str(value) for value in values]
    else:
        words = [_number(value) for value in values]
    rows = [", ".join(words[i : i + _A_LINE]) + "," for i in range(0, len(words), _A_LINE)]
    shape = " x ".join(map(str, array.shape))
    kind = _C_TYPES[str(array.dtype)]
    return [f"static const {kind} {_c(name)}[{len(words)}] = {{ /* {shape} */", *rows, "};", ""]


def _number(value: float) -> str:
    """A float32 in nine digits, which give it back exactly."""
    text = f"{float(value):.9g}"
    return f"{text}f" if re.search(r"[.e]", text) else f"{text}.0f"


def _c(name: str) -> str:
    return "agent_" + name.replace(".", "_")


def _comment(text: str) -> str:
    return text.replace("*/", "* /")


def _structures(agent: Agent, part: str, constants: Mapping[str, Array]) -> list[str]:
    widths, planner = agent.model.widths, agent.config.planner

    def layer(name: str) -> str:
        matrix = constants[f"{name}.weight"]
        scale = f"{name}.scale"
        scale = _c(scale) if scale in constants else "NULL"
        sizes = f"{matrix.shape[0]}, {matrix.shape[1]}, {TYPES.index(matrix.dtype)}"
        return f"{{{_c(name)}_weight, {scale}, {_c(name)}_bias, {sizes}}}"

    networks = []
    for component, count in _COMPONENTS.items():
        if f"{component}.0.weight" in constants:
            own = ", ".join(layer(f"{component}.{2 * i}") for i in range(count))
        else:
            own = "{NULL, NULL, NULL, 0, 0, 0}"
        networks.append(f"    .{component} = {{{own}}},")
    lines = []
    members = len(widths.q_ensemble) if part == "planner" else 0
    if members:
        lines += [f"static const planner_q agent_q_ensemble[{members}] = {{"]
        for member in range(members):
            name = f"q_ensemble.{member}"
            norm = f"{_c(name)}_1_weight, {_c(name)}_1_bias"
            layers = layer(f"{name}.0"), norm, layer(f"{name}.3"), layer(f"{name}.5")
            lines.append(f"    {{{', '.join(layers)}}},")
        lines += ["};", ""]
    names = ("temperature", "momentum", "min_std", "max_std", "policy_noise", "policy_noise_clip")
    floats = {name: getattr(planner, name) for name in names}
    floats["discount"] = agent.config.learning.discount
    sizes: dict[str, Any] = {"horizon": planner.horizon, "means": planner.horizon}
    sizes |= {n: getattr(planner, n) for n in ("iterations", "samples", "policy_samples", "elites")}
    lines += [
        "const planner_model agent_model = {",
        f"    .observation = {widths.observation},",
        f"    .action = {widths.action},",
        f"    .latent = {widths.latent},",
        *networks,
        f"    .q_ensemble = {'agent_q_ensemble' if members else 'NULL'},",
        f"    .members = {members},",
        "};",
        "",
        "const planner_config agent_config = {",
        *(f"    .{name} = {value}," for name, value in sizes.items()),
        *(f"    .{name} = {_number(np.float32(value))}," for name, value in floats.items()),
        "};",
    ]
    return lines
