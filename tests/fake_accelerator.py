"""A fake accelerator: its tensors say that they are on device `fake:0`, while their numbers lie in the memory of the CPU.

Mixing devices is refused as a GPU refuses it, so what runs here forgets no tensor on the CPU. It is installed for a whole
process, see `install`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
CPU = torch.device("cpu")
MOVES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
# it has plenty of memory, and does not tell how much of it is used
MEMORY: dict[str, Any] = {
    "get_memory_info": lambda _: (10**12, 10**12),
    "memory_allocated": lambda _: 0,
    "max_memory_allocated": lambda _: 10**6,
    "memory_reserved": lambda _: 0,
    "reset_peak_memory_stats": lambda _: None,
}
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Backend(_DummyBackendModule):
    """What torch asks a device's module for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class Placed(Tensor):
    """A tensor on the fake device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> "Placed":
        made: Placed = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("fake", 0),
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Placed({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor on fake:0 to numpy, use .cpu() first")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    """Also sees the functions that make tensors."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a function of torch on the numbers, and place its result."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    placed = any(isinstance(tensor, Placed) for tensor in tensors)
    if placed and function not in MOVES:
        check(function, args, tensors)
    target = kwargs.get("device")
    is_placed = placed if target is None else torch.device(target).type == "fake"
    plain_args, plain = tree_map(lambda value: value.held if isinstance(value, Placed) else value, (args, kwargs))
    if target is not None and is_placed:
        plain["device"] = CPU
    result = function(*plain_args, **plain)
    if function._schema.is_mutable and function._schema.name.endswith("_") and isinstance(args[0], Tensor):  # changed in place
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(lambda value: Placed(value) if isinstance(value, Tensor) else value, result) if is_placed else result


def check(function: Any, args: Any, tensors: list[Tensor]) -> None:
    """Refuse tensors of the CPU, but for what a GPU takes too: single numbers, and indices."""
    for tensor in tensors:
        is_index = function in INDEXES and isinstance(args[0], Placed) and tensor.dtype in (torch.int64, torch.bool)
        if not isinstance(tensor, Placed) and tensor.dim() and not is_index:
            raise RuntimeError(f"{function} got tensors on fake:0 and on the CPU, the latter {list(tensor.shape)}")


@contextlib.contextmanager
def installed() -> Iterator[torch.device]:
    """The device, which can be used until the end of the `with`; once in a process."""
    _setup_privateuseone_for_python_backend("fake", backend_module=Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast is allowed, and changes nothing
    with Everywhere(), mock.patch.multiple(torch.accelerator, **MEMORY):
        yield torch.device("fake", 0)
