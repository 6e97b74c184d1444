"""What networks offer to be pruned: components, a computation, and a learner with hooks.

A component is what compression is counted and budgeted by: `encoder`, `dynamics`, `reward`,
`q_ensemble.0`, `policy`. Every module that owns parameters carries the tag of exactly one, as its
attribute `component`. Nothing here knows what the components do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

# Called as `hook(loss, parameters)` between the backward pass of a loss and its optimiser's step:
# the loss's name, and the parameters that it trains, by name, with `.grad` filled.
GradientHook = Callable[[str, Sequence[tuple[str, nn.Parameter]]], None]


def tag(module: nn.Module, component: str) -> nn.Module:
    """Mark `module`, and every module inside it, as part of `component`; returns `module`."""
    for part in module.modules():
        part.component = component
    return module


def component_parameters(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of each component below `module`, in order of first appearance.

    Raises:
        ValueError: a module owns parameters and carries no tag.
    """
    components: dict[str, list[nn.Parameter]] = {}
    for name, part in module.named_modules():
        own = list(part.parameters(recurse=False))
        if not own:
            continue
        if not hasattr(part, "component"):
            raise ValueError(f"module '{name}' has parameters but belongs to no component")
        components.setdefault(part.component, []).extend(own)
    return components


@dataclass(frozen=True)
class Computation:
    """What is traced.

    Attributes:
        networks: named modules whose parts carry component tags. The first is the one that is
            counted; the others follow it (a target network).
        run: gets copies of them on the meta device, does with them everything that the program
            does, and returns what leaves it: outputs, but no latents.
        cost: does what is to be counted, such as one decision; None counts nothing.
    """

    networks: dict[str, nn.Module]
    run: Callable[[dict[str, nn.Module]], Any]
    cost: Callable[[dict[str, nn.Module]], Any] | None = None


class Learner(Protocol):
    """What learns, and may be pruned meanwhile.

    Attributes:
        model: the network that is counted.
        optimisers: by the name of the loss that each follows.
        gradient_hooks: called at every update, once for each loss.
        updates: done so far.
    """

    model: nn.Module
    optimisers: dict[str, Optimizer]
    gradient_hooks: list[GradientHook]
    updates: int

    def state(self) -> dict[str, Tensor]:
        """All that it needs to go on, but the model's weights."""


# Layer → the output channels of the whole network's that are left, ascending.
Channels = Mapping[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """A part of the computation whose layers are fitted one after another.

    Attributes:
        layers: names of modules of the counted network, in the order of computation. Those of one
            tuple do not read each other, and are fitted from the same run.
        run: what is computed, with the whole network (its layers' outputs are the targets) and
            with the cut one (its layers' inputs are what the fit has). It gets the network, a
            batch, and the channels that the network has left, by which a stage hands the cut
            network what the whole one computed (teacher forcing). What it returns is not used.
        targets: layer → function of the whole network's outputs `[rows, outputs]` that returns the
            targets, of the same shape, and the weight of each row `[rows]`.
        as_far_as: `run` with a tuple of `layers` before its arguments, which computes what these
            need and nothing after them; None runs all.
    """

    layers: tuple[tuple[str, ...], ...]
    run: Callable[[nn.Module, Any, Channels], Any]
    targets: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = field(default_factory=dict)
    as_far_as: Callable[[tuple[str, ...], nn.Module, Any, Channels], Any] | None = None

    def run_to(self, wave: tuple[str, ...], network: nn.Module, batch: Any, channels: Channels):
        """Compute what the layers of one tuple need."""
        if self.as_far_as is None:
            self.run(network, batch, channels)
        else:
            self.as_far_as(wave, network, batch, channels)


@dataclass(frozen=True)
class Calibration:
    """On which data, and in which order, a cut network's layers are fitted to the whole one's.

    Attributes:
        batches: whole network → batches, the same each time they are iterated over, at least two:
            every fifth is held out and judges the fits. What the batches hold is known to the
            stages alone.
        stages: in the order of computation; a layer is fitted in one of them.
        sensitivity: (whole network, batch) → a scalar whose gradient says what of the outputs
            matters: a sum, with random signs, of whatever the network is used for, so that the
            squared gradients add up. None: all outputs of all layers matter alike.
    """

    batches: Callable[[nn.Module], Iterable[Any]]
    stages: tuple[Stage, ...]
    sensitivity: Callable[[nn.Module, Any], Tensor] | None = None

    @property
    def layers(self) -> list[str]:
        """All that are fitted, in order."""
        return [name for stage in self.stages for wave in stage.layers for name in wave]

    def only(self, wanted: Callable[[str], bool]) -> Calibration:
        """The same for the layers that are `wanted`, by their names."""
        stages = []
        for stage in self.stages:
            waves = (tuple(filter(wanted, wave)) for wave in stage.layers)
            layers = tuple(wave for wave in waves if wave)
            if layers:
                stages.append(replace(stage, layers=layers))
        return replace(self, stages=tuple(stages))
