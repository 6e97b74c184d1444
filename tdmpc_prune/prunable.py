"""What networks offer to be pruned: components, a computation, and a learner with hooks.

A component is what compression is counted and budgeted by: `encoder`, `dynamics`, `reward`,
`q_ensemble.0`, `policy`. Every module that owns parameters carries the tag of exactly one, as its
attribute `component`. Nothing here knows what the components do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
