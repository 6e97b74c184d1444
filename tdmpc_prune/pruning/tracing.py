"""Find out which channels of which tensors are tied, by watching a computation run (ours).

The computation runs on meta tensors (shapes without data); each operation that PyTorch executes
hands the nodes of its inputs' dimensions on to its outputs, and ties those that it brings together:
the columns of a weight and the channels that they multiply, the operands of an addition, the two
sides of a loss. What nodes and ties are is in `ties.py`; the rules, one per operation, are in
`rules.py`. An operation without one is an error that names it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Computation
from tdmpc_prune.pruning.rules import UnknownOperation, find_rule
from tdmpc_prune.pruning.ties import Number, Running, Ties, Trace

_TO_BE_FILLED = {"zeros", "ones", "full", "empty"}  # operations that make a tensor
# What arange counts to are sizes; PyTorch calls detach where somebody else holds a new tensor.
_NO_ARITHMETIC = {"arange", "detach"}


def trace(computation: Computation) -> Trace:
    """Run a computation and see which channels it ties.

    Raises:
        UnknownOperation: there is no rule for an operation on a prunable channel.
        UserError: a parameter takes no part in the computation, or belongs to no component; or
            the computation does not run on tensors without data, and in which module.
    """
    networks = without_data(computation.networks)
    running = Running(networks)
    ties = Ties(networks, running)
    watcher = Watcher(running, ties)
    with watching(watcher):
        ties.leaves(computation.run(networks))
        numbers = tuple(watcher.numbers)
        if computation.cost is not None:
            ties.counting = True
            ties.leaves(computation.cost(networks))
    return ties.result(numbers)


def numbers_in(computation: Computation, networks: dict[str, nn.Module]) -> tuple[Number, ...]:
    """What enters the arithmetic beside tensors when `run` gets these copies (`without_data`).

    Raises:
        UserError: the computation does not run on them, and in which module.
    """
    watcher = Watcher(Running(networks))
    with watching(watcher):
        computation.run(networks)
    return tuple(watcher.numbers)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Watch what is run, leave nothing behind, and say where it could not go on."""
    validated = Distribution._validate_args  # it would look at values, and there are none
    Distribution.set_default_validate_args(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()), watcher:
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{watcher.running.place()} cannot be traced: {in_one_line(error)} (it is run on "
            f"tensors without data, so what it does may depend on their shapes, but not on their "
            f"values)"
        ) from error
    finally:
        Distribution.set_default_validate_args(validated)


def in_one_line(error: Exception) -> str:
    """What an error says, for people; its type where it says nothing or too little."""
    text = " ".join(str(error).split())
    if isinstance(error, (RuntimeError, ValueError, UserError)) and text:
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def without_data(
    networks: dict[str, nn.Module],
    shapes: Mapping[tuple[str, str], tuple[int, ...]] | None = None,
) -> dict[str, nn.Module]:
    """Copies on the meta device. What the originals share, the copies share.

    Args:
        networks: by name.
        shapes: (network, parameter or buffer) → another shape.

    Raises:
        UserError: a network holds what cannot be copied.
    """
    copies: dict[int, Any] = {}
    for (network, name), (_, tensor) in owners(networks).items():
        if id(tensor) not in copies:
            empty = torch.empty_like(tensor, device="meta")
            if shapes and (network, name) in shapes:
                empty = empty.new_empty(shapes[network, name])
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=False)
            copies[id(tensor)] = empty
    try:
        with _LeaveResultsOut():
            copied = copy.deepcopy(networks, copies)
    except Exception as error:
        raise UserError(f"the networks cannot be copied: {in_one_line(error)}") from error
    return {name: module.eval() for name, module in copied.items()}


class _LeaveResultsOut(TorchFunctionMode):
    """While copying: results that modules have kept (activations) become tensors without data."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return torch.empty_like(args[0].detach(), device="meta")
        return func(*args, **(kwargs or {}))


def owners(networks: dict[str, nn.Module]) -> dict[tuple[str, str], tuple[nn.Module, Tensor]]:
    """(network, name of a parameter or buffer) → the module that holds it, and itself."""
    return {
        (network, f"{path}.{name}" if path else name): (module, tensor)
        for network, root in networks.items()
        for path, module in root.named_modules()
        for name, tensor in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        )
    }


class Watcher(TorchDispatchMode):
    """Sees every operation: runs it without data, notes its numbers, and asks its rule for ties.

    Attributes:
        running: which module runs.
        numbers: what entered the arithmetic beside tensors so far.
    """

    def __init__(self, running: Running, ties: Ties | None = None):
        """Watch the modules of `running`; without `ties` only the numbers are noted."""
        super().__init__()
        self.running = running
        self.numbers: list[Number] = []
        self._ties = ties
        self._made: dict[int, Tensor] = {}  # from nothing, inside a module

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to be kept out of PyTorch's compiler, which would be imported for it alone."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()))
        self._note_numbers(func, args, kwargs)
        args, kwargs = self._drop_data(func, args, kwargs, tensors)
        empty = any(tensor.is_meta for tensor in tensors)
        result = _result(func, args, kwargs) if empty else func(*args, **kwargs)
        if func is torch.ops.aten._is_all_true.default and tensors[0].is_meta:
            result = torch.ones((), dtype=torch.bool)  # a distribution told to validate
        elif self._ties is not None:
            self._hand_on(func, args, kwargs, tensors, result)
        return result

    def _hand_on(self, func, args: tuple, kwargs: dict, tensors: list[Tensor], result: Any) -> None:
        """Tie what an operation brings together, and give its result labels."""
        ties = self._ties
        ties.uses(tensors)
        made = [id(tensor) in self._made for tensor in tensors]
        fresh = self.running.innermost is not None and all(made)
        if fresh or func.overloadpacket.__name__.startswith("new_"):
            self._made |= {id(t): t for t in tree_leaves(result) if isinstance(t, Tensor)}
        if not any(nodes is not None for tensor in tensors for nodes in ties.labels(tensor)):
            return
        made = any(id(tensor) in self._made for tensor in tensors)
        what = "a tensor made inside forward" if made else "an input, a constant or a position"
        ties.reason = f"{func} in {self.running.place()} ties it to {what}"
        rule = find_rule(func)
        if rule is None:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            raise UnknownOperation(
                f"operation {func} on a prunable channel in {self.running.place()} (shapes "
                f"{shapes}) has no pruning rule; write it with known operations, or add one to "
                f"pruning/rules.py"
            )
        names = [argument.name for argument in func._schema.arguments]
        given = {a.name: a.default_value for a in func._schema.arguments}
        given |= dict(zip(names, args, strict=False)) | kwargs
        found = rule(ties, given, result)
        outputs = [result] if isinstance(result, Tensor) else list(result or ())
        if isinstance(found, tuple):
            found = [found] * len(outputs)
        for output, labels in zip(outputs, found, strict=False):
            if isinstance(output, Tensor) and len(labels) == output.dim():
                ties.label(output, labels)

    def _drop_data(self, func, args: tuple, kwargs: dict, tensors: list[Tensor]):
        """Arguments for an operation on tensors without data.

        A tensor of the program's own (a constant, a plain attribute) keeps its data until it meets
        one that has none; what is made to be filled (zeros) never has any.
        """
        name = func.overloadpacket.__name__
        empty = any(tensor.is_meta for tensor in tensors)
        if kwargs.get("device") is not None and (empty or name in _TO_BE_FILLED):
            kwargs = kwargs | {"device": torch.device("meta")}
        if empty and not all(tensor.is_meta for tensor in tensors):
            written = [
                value
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            if any(isinstance(tensor, Tensor) and not tensor.is_meta for tensor in written):
                raise UserError(
                    f"{func} in {self.running.place()} writes into a tensor that has values "
                    f"already: make it with torch.zeros, or register it as a buffer"
                )
            args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        return args, kwargs

    def _note_numbers(self, func, args: tuple, kwargs: dict) -> None:
        """Remember what enters an operation's arithmetic beside tensors; sizes do not."""
        if func.overloadpacket.__name__ in _NO_ARITHMETIC:
            return
        values: list[float] = []
        for place, name in _arithmetic_arguments(func):
            given = args[place] if place < len(args) else kwargs.get(name)
            for value in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
                    value = value.item()
                if isinstance(value, (int, float)):
                    values.append(float(value))
        self.numbers.append(Number(self.running.place(), str(func), tuple(values)))


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among an operation's arguments, in lists too."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


@cache
def _makes_anew(func: torch._ops.OpOverload) -> bool:
    """Whether an operation neither writes to its arguments nor returns views of them."""
    schema = func._schema
    return all(each.alias_info is None for each in (*schema.arguments, *schema.returns))


def _result(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Any:
    """What an operation on tensors without data returns.

    What new tensors look like is worked out once for each operation on the same shapes: PyTorch
    does it in Python, and what is traced does most things again and again.
    """
    if _makes_anew(func):
        given = _look(args), tuple(kwargs), _look(tuple(kwargs.values()))
        looks = _looks_of_result(func, *given, torch.get_default_dtype())
        if looks is not None:
            return _shown(looks)
    return func(*args, **kwargs)


@lru_cache(maxsize=1 << 14)
def _looks_of_result(func, args: tuple, names: tuple, values: tuple, _: torch.dtype) -> Any:
    """The look of what an operation returns; None if that is not all tensors without data.

    By the arguments' looks, and the default dtype, on which some results depend.
    """
    result = func(*_shown(args), **dict(zip(names, _shown(values), strict=True)))
    made = all(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(result))
    return _look(result) if made else None


class _Look(NamedTuple):
    """All that there is of a tensor without data."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _look(value: Any) -> Any:
    """An operation's arguments, or its result, as something that can be looked up."""
    if isinstance(value, Tensor):
        return _Look(value.shape, value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_look, value))
    return type(value), value  # 1, 1.0 and True are not the same


def _shown(look: Any) -> Any:
    """What has this look, with new tensors; lists are tuples."""
    if isinstance(look, _Look):
        return torch.empty_strided(look.shape, look.stride, dtype=look.dtype, device="meta")
    if look and isinstance(look[0], type):
        return look[1]
    return tuple(map(_shown, look))


@cache
def _arithmetic_arguments(func: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that are no sizes, dimensions or switches."""
    kinds = [(argument.name, str(argument.type).lower()) for argument in func._schema.arguments]
    return tuple(
        (place, name)
        for place, (name, kind) in enumerate(kinds)
        if "int" not in kind and "bool" not in kind
    )
