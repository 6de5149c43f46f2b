"""The weights of a checkpoint, read from its safetensors files part by part, under the names that the model has for them.

transformers renames and converts what older checkpoints store, and dequantizes compressed-tensors. Its loader can do that for
some of a model's tensors at a time, which `from_pretrained` does not offer; so nothing here decides how a tensor is read. What
optimum-quanto stores is turned back into plain weights on the way, integers (or float8) times the scale of their row; and what
lies in the records of a packed format, after its checksum.
"""

import contextlib
import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo

from components.core.checkpoint.files import QUANTO_FILE, Stored, stored_tensors
from components.core.errors import one_line, readable
from components.core.packed.record import HEADER, Packed, checked, header_of, unpack
from components.core.progress import quiet_bars

DATA, SCALE, UNUSED = "._data", "._scale", (".input_scale", ".output_scale")  # optimum-quanto's; the last are of activations


class Weights:
    """What a checkpoint stores for a model.

    Args:
        folder: the checkpoint.
        model: its model, the parameters on the meta device in the number format to load them in.
        quantizer: transformers' quantizer, if compressed-tensors quantized the checkpoint.
        packed: whether the checkpoint is in a packed format.

    Raises:
        ValueError: a weight is missing, is not one of the model's, or has another shape; names the first.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, quantizer: Any = None, packed: bool = False) -> None:
        self.folder, self.model, self.packed = folder, model, packed
        dtype = model.dtype
        self.config = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            hf_quantizer=quantizer,
            weight_mapping=get_model_conversion_mapping(model, None, quantizer),
            ignore_mismatched_sizes=True,  # reported by name
        )
        stored = stored_tensors(folder)
        is_quanto = (folder / QUANTO_FILE).is_file()
        self.entries = quanto_entries(folder, stored) if is_quanto else {name: (name,) for name in stored}
        self.files = {name: tensor.file for name, tensor in stored.items()}
        if quantizer:  # a scale without its weight would end in an error of the conversion that names neither
            names = {name.removesuffix("_packed") for name in stored}
            _refuse(folder, {name.removesuffix("_scale") for name in names if name.endswith(".weight_scale")} - names, ())
        shapes = packed_shapes(stored) if packed else {name: tensor.shape for name, tensor in stored.items()}
        self.targets = self._find_targets({name: shapes[parts[0]] for name, parts in self.entries.items()})

    def _find_targets(self, shapes: dict[str, list[int]]) -> dict[str, str]:
        """Stored name → the model's name (of a conversion, the first of them), for all that the model uses.

        Args:
            shapes: of the stored tensors, by name.
        """
        mapping = self.config.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        expected = self.model.state_dict(keep_vars=True)
        prefix = self.model.base_model_prefix
        targets: dict[str, str] = {}
        unexpected: set[str] = set()
        found: set[str] = set()
        for name, shape in shapes.items():
            target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if target not in expected and name in expected:  # as the loader decides
                target, pattern = rename_source_key(name, [], [], prefix, expected)
            if target not in expected:
                unexpected.add(target)
                continue
            targets[name] = target
            found.add(target)
            if pattern is None:
                _check_shape(self.folder, target, shape, expected[target].shape)
            else:  # a conversion may make several of the model's tensors of it
                made = next(entry for entry in converters if pattern in entry.source_patterns).target_patterns
                found |= {target.replace(made[0], other) for other in made}
        info = LoadStateDictInfo(self._missing(expected, found), unexpected, set(), [], {}, set())
        self.model._adjust_missing_and_unexpected_keys(info)
        _refuse(self.folder, info.missing_keys, info.unexpected_keys)
        return targets

    def _missing(self, expected: dict[str, Tensor], found: set[str]) -> set[str]:
        """The model's names for tensors of which no name was found; tied weights have several, and are stored once."""
        names_of: dict[int, set[str]] = defaultdict(set)
        for name, tensor in expected.items():
            names_of[id(tensor)].add(name)
        groups = [*names_of.values(), *({target, source} for target, source in self.model.all_tied_weights_keys.items())]
        missing = {name for name in expected if name not in found}
        for names in groups:
            if names & found:
                missing -= names
        self.untied = {name for name in expected if name not in found}  # what tying has to fill
        return missing

    def load(self, device: torch.device, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Load the tensors that are wanted by the model's names; the others stay as they are.

        Raises:
            ValueError: transformers cannot load them.
        """
        names = [name for name, target in self.targets.items() if wanted(target)]
        what = f"{self.folder} must hold weights that transformers can load"
        with readable(what), contextlib.ExitStack() as stack, quiet_bars():
            parts = sorted({part for name in names for part in self.entries[name]})
            opened = {
                file: stack.enter_context(safe_open(file, framework="pt"))
                for file in sorted({self.files[part] for part in parts})
            }
            slices = {part: opened[self.files[part]].get_slice(part) for part in parts}
            tensors = {name: self._entry(name, [slices[part] for part in self.entries[name]]) for name in names}
            config = replace(self.config, device_map={"": device})
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        for name, found, expected in sorted(info.mismatched_keys):
            _check_shape(self.folder, name, found, expected)
        for name, fault in sorted(info.conversion_errors.items()):
            raise ValueError(f"{what}: {name}: {one_line(fault)}")

    def _entry(self, name: str, slices: list[Any]) -> Any:
        """What the loader reads for a tensor of the dense model, from the slices of its parts."""
        if self.packed:
            return Unpacked(slices[0], self.files[name], name)
        return slices[0] if len(slices) == 1 else Dequantized(*slices)

    def check_records(self) -> None:
        """Compare the checksums of all records of a packed checkpoint. Raises ValueError."""
        for file in sorted(set(self.files.values())):
            with safe_open(file, framework="pt") as opened:
                for name in sorted(opened.keys()):
                    with readable(f"{file} must hold undamaged records, {name} is not one"):
                        checked(opened.get_tensor(name))

    def tie(self) -> None:
        """Tie the weights that are stored once, when all of one kind are loaded."""
        self.model.tie_weights(missing_keys=set(self.untied), recompute_mapping=False)

    def stored_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the model's names → by the names that checkpoints of this architecture have, converted back if need be."""
        names: dict[str, Tensor] = revert_weight_conversion(self.model, tensors)
        return names


def unload(module: nn.Module, keep: Iterable[nn.Module] = ()) -> None:
    """Free the parameters of a module: they are on the meta device afterwards.

    Args:
        module: the module.
        keep: parts of it whose parameters stay.
    """
    kept = {id(part) for whole in keep for part in whole.modules()}
    moved: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and id(part) not in kept:
                empty = nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
                part._parameters[name] = moved.setdefault(id(value), empty)
    value = None  # the last of them
    return_memory()


def return_memory() -> None:
    """Give freed memory of tensors on the CPU back to the system, which glibc keeps for itself up to 32 MB a tensor."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def quanto_entries(folder: Path, stored: dict[str, Stored]) -> dict[str, tuple[str, ...]]:
    """Name of each tensor of the dense model → the names under which its parts are stored.

    Raises:
        ValueError: a part is missing or does not fit the other.
    """
    entries: dict[str, tuple[str, ...]] = {}
    for name, tensor in stored.items():
        if name.endswith(DATA):
            scale = name.removesuffix(DATA) + SCALE
            if scale not in stored:
                _refuse(folder, [scale], ())
            _check_shape(folder, scale, stored[scale].shape, [tensor.shape[0], *(1 for _ in tensor.shape[1:])])
            entries[name.removesuffix(DATA)] = (name, scale)
        elif name.endswith(SCALE) and name.removesuffix(SCALE) + DATA in stored:
            continue
        elif not name.endswith(UNUSED):
            entries[name] = (name,)
    return entries


class Dequantized:
    """A weight that optimum-quanto stored, to be read as if it were stored as a plain tensor."""

    def __init__(self, data: Any, scale: Any) -> None:
        self.data, self.scale = data, scale

    def __getitem__(self, _: Any) -> Tensor:
        scale: Tensor = self.scale[...]  # [out, 1]
        weight: Tensor = scale * self.data[...].to(scale.dtype)  # [out, in]
        return weight


def packed_shapes(stored: dict[str, Stored]) -> dict[str, list[int]]:
    """Name → shape of the tensor in each record of a packed checkpoint; of the records, only their headers are read.

    Raises:
        ValueError: one is not a record.
    """
    shapes: dict[str, list[int]] = {}
    for file in sorted({tensor.file for tensor in stored.values()}):
        with readable(f"{file} must be a safetensors file"), safe_open(file, framework="pt") as opened:
            starts = {name: opened.get_slice(name)[: HEADER.size] for name in opened.keys()}  # noqa: SIM118 (not a dict)
        for name, start in starts.items():
            with readable(f"{file} must hold records of a packed format, {name} is none"):
                shapes[name] = header_of(start).shape
    return shapes


class Unpacked:
    """A weight in a record of a packed format, to be read as if it were stored as a plain tensor.

    Args:
        record: the record's slice.
        where: its file.
        name: its name.
    """

    def __init__(self, record: Any, where: Path, name: str) -> None:
        self.record, self.where, self.name = record, where, name

    def __getitem__(self, _: Any) -> Tensor:
        with readable(f"{self.where} must hold undamaged records, {self.name} is not one"):
            content = unpack(self.record[...])
        return content.dense() if isinstance(content, Packed) else content


def _refuse(path: str | Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise ValueError if a checkpoint lacks weights of its model, or has others; names the first."""
    for name in sorted(missing):
        raise ValueError(f"{path} must hold every weight of its model, {name} is missing")
    for name in sorted(unexpected):
        raise ValueError(f"{path} must hold only weights of its model, {name} is not one of them")


def _check_shape(path: str | Path, name: str, found: Iterable[int], expected: Iterable[int]) -> None:
    if [*found] != [*expected]:
        raise ValueError(f"{path} must hold weights of its model's shapes, {name} is {[*found]}, not {[*expected]}")
