"""Random networks whose widths are known, and the exact exclusion of units as the reference.

`World` is an agent in miniature: encoder, dynamics, reward head, policy, a stacked ensemble, all on
one latent. Every layer says by name which width it reads and which it writes, so that groups,
exclusion and slices can be checked without the tracer.
"""

import copy
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdmpc_prune.prunable import Computation, tag

ACTIVATIONS = (nn.ELU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Mish, nn.LeakyReLU)


@dataclass(frozen=True)
class Width:
    """A width of `units` units; unit u owns the channels for which `unit_of` is u."""

    name: str
    units: int
    copies: int = 1  # channels per unit
    blocked: bool = False  # a unit's channels lie side by side (SimNorm), not across (GroupNorm)

    @property
    def channels(self) -> int:
        return self.units * self.copies

    def channel_mask(self, keep: Tensor) -> Tensor:
        """Which channels stay if units `keep` (bool) stay."""
        return keep.repeat_interleave(self.copies) if self.blocked else keep.repeat(self.copies)


class SimNorm(nn.Module):
    """Softmax over blocks of `size` channels."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.size).softmax(-1).view(x.shape)


class NormedLinear(nn.Linear):
    """A Linear that owns its LayerNorm and activation (as TD-MPC2's)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(self.norm(super().forward(x)))


class Stacked(nn.Module):
    """An ensemble as stacked tensors: `[B, in]` → `[members, B, 1]`."""

    def __init__(self, members: int, inputs: int, hidden: int):
        super().__init__()
        self.first = nn.Parameter(torch.randn(members, inputs, hidden) / math.sqrt(inputs))
        self.first_bias = nn.Parameter(0.1 * torch.randn(members, 1, hidden))
        self.second = nn.Parameter(torch.randn(members, hidden, 1) / math.sqrt(hidden))
        self.second_bias = nn.Parameter(torch.zeros(members, 1, 1))
        self.keep_hidden: Tensor | None = None  # for the reference only

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(len(self.first), -1, -1)
        hidden = F.elu(torch.baddbmm(self.first_bias, x, self.first))
        if self.keep_hidden is not None:
            hidden = hidden * self.keep_hidden
        return torch.baddbmm(self.second_bias, hidden, self.second)


class World(nn.Module):
    """A random little agent; all that `seed` decides."""

    def __init__(self, seed: int):
        super().__init__()
        chance = random.Random(seed)
        torch.manual_seed(seed)
        self.observation, self.action = chance.randint(2, 5), chance.randint(1, 3)
        self.widths: dict[str, Width] = {}
        self.simnorm = chance.random() < 0.4
        self.residual = chance.random() < 0.3 and not self.simnorm
        block = chance.choice((2, 4)) if self.simnorm else 1
        self.latent = self._width(Width("latent", chance.randint(2, 5), block, blocked=True))
        joint = ("latent", self.action)
        self.encoder = self._mlp(chance, [self.observation], "encoder", self.latent)
        self.dynamics = self._mlp(chance, joint, "dynamics", self.latent)
        if self.simnorm:
            self.encoder.append(SimNorm(block))
            self.dynamics.append(SimNorm(block))
        self.reward = self._mlp(chance, joint, "reward", 1)
        self.policy = self._mlp(chance, ("latent",), "policy", self.action)
        hidden = self._width(Width("ensemble", chance.randint(2, 6)))
        inputs = self.latent.channels + self.action
        self.ensemble = Stacked(chance.randint(1, 3), inputs, hidden.channels)
        self.ensemble.reads = joint
        for name, part in self.named_children():
            tag(part, name)
        self.double()

    def _width(self, width: Width) -> Width:
        self.widths[width.name] = width
        return width

    def _mlp(self, chance, inputs, name: str, out: "Width | int") -> nn.Sequential:
        """Random hidden layers, then a Linear to `out`; `inputs` are widths by name, or sizes."""
        layers: list[nn.Module] = []
        for depth in range(chance.randint(1, 2)):
            size = sum(self.widths[i].channels if isinstance(i, str) else i for i in inputs)
            norm = chance.choice(("none", "layer", "bare layer", "group", "owned"))
            copies = chance.choice((2, 3)) if norm == "group" else 1
            width = self._width(Width(f"{name}{depth}", chance.randint(2, 7), copies))
            linear = (NormedLinear if norm == "owned" else nn.Linear)(size, width.channels)
            linear.reads, linear.writes = inputs, width.name
            layers.append(linear)
            if norm == "layer":
                layers.append(nn.LayerNorm(width.channels))
            elif norm == "bare layer":
                layers.append(nn.LayerNorm(width.channels, elementwise_affine=False))
            elif norm == "group":
                layers.append(nn.GroupNorm(copies, width.channels))
            for layer in layers:
                for part in layer.modules():
                    if isinstance(part, (nn.LayerNorm, nn.GroupNorm)) and not hasattr(part, "on"):
                        part.on = width.name
                        for parameter in part.parameters():
                            nn.init.normal_(parameter, 1.0, 0.3)
            if norm != "owned":
                layers.append(chance.choice(ACTIVATIONS)())
            inputs = (width.name,)
        size = sum(self.widths[i].channels if isinstance(i, str) else i for i in inputs)
        last = nn.Linear(size, out.channels if isinstance(out, Width) else out)
        last.reads = inputs
        last.writes = out.name if isinstance(out, Width) else None
        return nn.Sequential(*layers, last)

    def next_latent(self, z: Tensor, a: Tensor) -> Tensor:
        change = self.dynamics(torch.cat([z, a], -1))
        return z + change if self.residual else change


@dataclass(frozen=True)
class Data:
    observation: Tensor
    actions: Tensor  # [2, B, A]
    following: Tensor  # [2, B, O]
    rewards: Tensor  # [2, B]


def make_data(world: World, size: int = 4, device: str = "cpu") -> Data:
    if device == "meta":
        zeros = {"device": "meta", "dtype": torch.float64}
        return Data(
            torch.zeros(size, world.observation, **zeros),
            torch.zeros(2, size, world.action, **zeros),
            torch.zeros(2, size, world.observation, **zeros),
            torch.zeros(2, size, **zeros),
        )

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    return Data(
        normal(size, world.observation),
        normal(2, size, world.action),
        normal(2, size, world.observation),
        normal(2, size),
    )


def losses(world: World, target: World, data: Data, kept=slice(None)) -> tuple[Tensor, Tensor]:
    """Model loss (consistency, reward, value over two latent steps) and policy loss."""
    with torch.no_grad():
        goals = target.encoder(data.following.flatten(0, 1)).unflatten(0, (2, -1))
    z = world.encoder(data.observation)
    total, latents = 0.0, [z]
    for action, goal, reward in zip(data.actions, goals, data.rewards, strict=True):
        joint = torch.cat([z, action], -1)
        total = total + (world.reward(joint).squeeze(-1) - reward).square().mean()
        total = total + (world.ensemble(joint).squeeze(-1) - reward).square().mean()
        z = world.next_latent(z, action)
        total = total + (z - goal)[..., kept].square().mean()
        latents.append(z)
    reached = torch.stack(latents).detach()  # the policy reads detached latents
    flat = reached.reshape(-1, reached.shape[-1])
    action = torch.tanh(world.policy(flat))
    value = world.ensemble(torch.cat([flat, action], -1)).min(0).values
    return total, -value.mean()


def move(target: World, world: World) -> None:
    with torch.no_grad():
        for slow, fast in zip(target.parameters(), world.parameters(), strict=True):
            slow.lerp_(fast, 0.1)


def computation(world: World, target: World) -> Computation:
    """Everything that the little agent does."""

    def run(networks):
        data = make_data(world, device="meta")
        found = losses(networks["model"], networks["target"], data)
        move(networks["target"], networks["model"])
        return found

    return Computation({"model": world, "target": target}, run)


class Agent:
    """Networks, targets and optimisers, copied as one."""

    def __init__(self, seed: int):
        self.world = World(seed)
        self.target = copy.deepcopy(self.world)
        policy = {id(p) for p in self.world.policy.parameters()}
        rest = [p for p in self.world.parameters() if id(p) not in policy]
        self.optimisers = [
            torch.optim.Adam(rest, lr=0.01),
            torch.optim.Adam(self.world.policy.parameters(), lr=0.01),
        ]

    def step(self, data: Data, kept=slice(None)) -> None:
        """One training step of everything."""
        for loss, optimiser in zip(
            losses(self.world, self.target, data, kept), self.optimisers, strict=True
        ):
            parameters = optimiser.param_groups[0]["params"]
            optimiser.zero_grad()
            loss.backward(inputs=parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        move(self.target, self.world)


def exclude(world: World, keep: dict[str, Tensor]) -> None:
    """From now on `world` computes as if the units that are not kept did not exist.

    Whatever reads them reads zeros, and normalisations leave them out of their statistics.
    """
    channels = {name: world.widths[name].channel_mask(mask) for name, mask in keep.items()}

    def read_mask(reads) -> Tensor:
        return torch.cat(
            [channels[r] if isinstance(r, str) else torch.ones(r, dtype=torch.bool) for r in reads]
        )

    for module in world.modules():
        if hasattr(module, "reads"):
            mask = read_mask(module.reads)
            module.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,))
        if isinstance(module, Stacked):
            module.keep_hidden = channels["ensemble"].double()
        if isinstance(module, nn.LayerNorm):
            mask = channels[module.on]
            module.register_forward_hook(
                lambda m, inputs, _, mask=mask: _masked_norm(inputs[0], mask, 1, m)
            )
        if isinstance(module, nn.GroupNorm):
            mask = channels[module.on]
            module.register_forward_hook(
                lambda m, inputs, _, mask=mask: _masked_norm(inputs[0], mask, m.num_groups, m)
            )


def _masked_norm(x: Tensor, mask: Tensor, groups: int, norm: nn.Module) -> Tensor:
    """Normalise over the kept channels of each group."""
    parts = x.reshape(*x.shape[:-1], groups, -1)
    kept = mask.view(groups, -1).double()
    count = kept.sum(-1, keepdim=True)
    mean = (parts * kept).sum(-1, keepdim=True) / count
    variance = ((parts - mean).square() * kept).sum(-1, keepdim=True) / count
    normal = ((parts - mean) / (variance + norm.eps).sqrt()).reshape(x.shape)
    if norm.weight is not None:
        normal = normal * norm.weight + norm.bias
    return normal
