"""What runs through a network's layers, as rows: inputs, outputs, and weights as matrices (ours).

A linear layer and a convolution are the same thing here, y = M x + b for every row x: a
convolution's rows are the patches that its kernel sees, those of a transposed one the patches of
its input with zeros between. A norm scales and shifts every channel of what it normalises.

Shapes: R rows, C channels read, K places of the kernel (1 for a linear layer), M channels written.
A row of inputs is channel by channel: channel c lies at c·K … (c + 1)·K − 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_NORMS = (F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm)


@dataclass(frozen=True)
class Product:
    """One call of a linear layer or a convolution."""

    weight: Tensor
    bias: Tensor | None
    input: Tensor
    output: Tensor
    geometry: Geometry | None = None  # of a convolution

    @property
    def kernel(self) -> int:
        """K, the inputs in a row for each channel."""
        return self.weight[0, 0].numel()

    def inputs(self) -> Tensor:
        """`[R, C·K]`."""
        if self.geometry is None:
            return self.input.reshape(-1, self.input.shape[-1])
        return self.geometry.patches(self.input, self.weight.shape[2:])

    def outputs(self, like_output: Tensor) -> Tensor:
        """`[R, M]` of a tensor of the output's shape (the output itself, its gradient)."""
        if self.geometry is None:
            return like_output.reshape(-1, like_output.shape[-1])
        return like_output.movedim(1, -1).flatten(0, -2)

    def matrix(self) -> Tensor:
        """The weight as `[M, C·K]`."""
        weight = self.weight
        if self.geometry is not None and self.geometry.transposed:
            weight = weight.transpose(0, 1).flip(tuple(range(2, weight.dim())))
        return weight.flatten(1)

    def weight_of(self, matrix: Tensor) -> Tensor:
        """The weight that `matrix` `[M, C·K]` is of."""
        if self.geometry is None or not self.geometry.transposed:
            return matrix.reshape(self.weight.shape)
        read, written, *sizes = self.weight.shape
        weight = matrix.reshape(written, read, *sizes).flip(tuple(range(2, self.weight.dim())))
        return weight.transpose(0, 1)


@dataclass(frozen=True)
class Geometry:
    """How a convolution's kernel moves; one number for each dimension of space."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...] = ()
    transposed: bool = False

    def patches(self, x: Tensor, kernel: torch.Size) -> Tensor:
        """`[B, C, …]` → `[R, C·K]`: what the kernel sees at each place."""
        stride = self.stride
        if self.transposed:
            x = self._with_zeros_between(x, kernel)
            stride = (1,) * len(stride)
        else:
            x = F.pad(x, [side for pair in reversed(self.padding) for side in pair])
        for dim, (size, step, gap) in enumerate(zip(kernel, stride, self.dilation, strict=True)):
            x = x.unfold(2 + dim, gap * (size - 1) + 1, step)[..., ::gap]
        return x.movedim(1, len(kernel) + 1).flatten(0, len(kernel)).flatten(1)

    def _with_zeros_between(self, x: Tensor, kernel: torch.Size) -> Tensor:
        """The input over which a plain convolution with the flipped kernel does the same."""
        sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], self.stride, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *sizes)
        spread[(..., *(slice(None, None, step) for step in self.stride))] = x
        sides = []
        for size, gap, (before, after), more in zip(
            kernel, self.dilation, self.padding, self.output_padding, strict=True
        ):
            reach = gap * (size - 1)
            sides.insert(0, (reach - before, reach - after + more))
        return F.pad(spread, [side for pair in sides for side in pair])


@dataclass(frozen=True)
class Norm:
    """One call of a norm with a weight for each channel."""

    weight: Tensor
    bias: Tensor | None
    input: Tensor  # normalised, neither scaled nor shifted
    output: Tensor
    dim: int  # of the channels

    def inputs(self) -> Tensor:
        """`[R, C]`."""
        return self.outputs(self.input)

    def outputs(self, like_output: Tensor) -> Tensor:
        """`[R, C]` of a tensor of the output's shape."""
        return like_output.movedim(self.dim, -1).reshape(-1, len(self.weight))


class Watch(TorchFunctionMode):
    """Takes down the calls of layers, by the weight that they are made with.

    So it does not matter which class of module makes them, or how often: a layer is the module that
    owns the `weight`. Calls with other tensors, and layers of other kinds, are not seen.
    """

    def __init__(self, network: nn.Module, layers: Iterable[str] | None = None):
        """Watch some layers of a network, or all of them (None)."""
        super().__init__()
        wanted = None if layers is None else {f"{layer}.weight" for layer in layers}
        self._names = {
            id(parameter): name.removesuffix(".weight")
            for name, parameter in network.named_parameters()
            if name.endswith(".weight") and (wanted is None or name in wanted)
        }
        self.calls: dict[str, list[Product | Norm]] = {}  # in the order of first calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.linear:
            self._product(_given("input weight bias", args, kwargs), output)
        elif func in _CONVOLUTIONS:
            names = "input weight bias stride padding dilation groups"
            self._product(_given(names, args, kwargs), output, convolution=True)
        elif func in _TRANSPOSED:
            names = "input weight bias stride padding output_padding groups dilation"
            self._product(_given(names, args, kwargs), output, convolution=True, transposed=True)
        elif func in _NORMS:
            self._norm(func, args, kwargs, output)
        return output

    def _product(self, given, output, convolution=False, transposed=False) -> None:
        weight, bias = given["weight"], given.get("bias")
        name = self._names.get(id(weight))
        if name is None or given.get("groups", 1) != 1:
            return
        geometry = _geometry(given, weight.dim() - 2, transposed) if convolution else None
        x = given["input"]
        if convolution and x.dim() < weight.dim():  # without a batch
            x, output = x.unsqueeze(0), output.unsqueeze(0)
        self.calls.setdefault(name, []).append(Product(weight, bias, x, output, geometry))

    def _norm(self, func, args, kwargs, output) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        weight = next((tensor for tensor in tensors if id(tensor) in self._names), None)
        if weight is None or weight.dim() != 1:
            return
        following = tensors[[id(t) for t in tensors].index(id(weight)) + 1 :]
        bias = following[0] if following else None
        affine = {id(weight), id(bias)}
        bare = func(
            *(None if id(value) in affine else value for value in args),
            **{key: None if id(value) in affine else value for key, value in kwargs.items()},
        )
        dim = -1 if func in (F.layer_norm, F.rms_norm) else 1
        call = Norm(weight, bias, bare, output, dim)
        self.calls.setdefault(self._names[id(weight)], []).append(call)


def _given(names: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(names.split(), args, strict=False)) | kwargs


def _geometry(given: dict[str, Any], dims: int, transposed: bool) -> Geometry:
    def each(name: str, default: int) -> tuple[int, ...]:
        value = given.get(name, default)
        value = (value,) if isinstance(value, int) else tuple(value)
        return value * dims if len(value) == 1 else value

    dilation, padding = each("dilation", 1), given.get("padding", 0)
    if isinstance(padding, str):
        sizes = given["weight"].shape[2:]
        totals = [gap * (size - 1) for gap, size in zip(dilation, sizes, strict=True)]
        sides = tuple((n // 2, n - n // 2) if padding == "same" else (0, 0) for n in totals)
    else:
        sides = tuple((n, n) for n in each("padding", 0))
    more = each("output_padding", 0)
    return Geometry(each("stride", 1), sides, dilation, more, transposed)
