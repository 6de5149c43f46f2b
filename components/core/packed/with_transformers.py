"""Packed checkpoints for transformers: once this module has been imported, `from_pretrained` loads them.

transformers reads a checkpoint's `quantization_config` and asks its registry of quantizers how to load the rest. Here, each
record is unpacked to dense weights on the way, before any conversion that the architecture needs; the model is an ordinary one.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform, _IdentityOp
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from components.core.checkpoint.files import PACKED_METHOD
from components.core.checkpoint.weights import Weights
from components.core.errors import shown
from components.core.packed.record import VERSION, Packed, unpack

ANY = r"(\w+)"  # a pattern for every name


@register_quantization_config(PACKED_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What `config.json` says of a packed checkpoint.

    Args:
        format: `packed-int8` or `packed-int4`.
        version: of the layout.
        quant_method: that of this class.

    Raises:
        ValueError: the version is another one.
    """

    def __init__(self, format: str = "", version: int = 0, quant_method: str = PACKED_METHOD) -> None:
        if version != VERSION:
            raise ValueError(f"version must be {VERSION}, that of the layout which is known here, got {shown(version)}")
        self.quant_method: Any = quant_method
        self.format, self.version = format, version
        self.dequantize = True  # so that transformers takes the model for a dense one when it is loaded


@register_quantizer(PACKED_METHOD)
class PackedQuantizer(HfQuantizer):
    """Loads packed checkpoints; it quantizes nothing itself."""

    requires_calibration = True

    def is_serializable(self) -> bool:
        """Whether transformers may save the model: it is dense."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model may be trained: it is dense."""
        return True

    def update_weight_conversions(self, weight_conversions: list[WeightTransform], model: Any) -> list[WeightTransform]:
        """The architecture's own conversions, each after unpacking, and unpacking alone for all other tensors."""
        made = [
            entry.copy(
                entry._original_source_patterns, entry._original_target_patterns, operations=[Unpack(), *entry.operations]
            )
            if isinstance(entry, WeightConverter)
            else entry
            for entry in weight_conversions
        ]
        return [*made, WeightConverter(ANY, r"\1", [Unpack()])]

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        """Refuse a checkpoint that is damaged, lacks tensors of its model or has others: transformers would only warn."""
        with torch.device("cpu"):  # where the model is made, the meta device is the default
            Weights(Path(checkpoint_files[0]).parent, model, packed=True).check_records()
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Forget the conversion of all names, which saving the model would revert."""
        model._weight_conversions = [entry for entry in model._weight_conversions if entry.source_patterns != [ANY]]
        return model


class Unpack(ConversionOps):
    """Turns records into dense tensors."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """See `ConversionOps`: the records of one tensor of the model, by pattern → its dense parts, by pattern or name.

        Raises:
            ValueError: a record is damaged.
        """
        kind = model.get_parameter_or_buffer(full_layer_name).dtype
        dense = {name: [unpacked(record, kind) for record in records] for name, records in input_dict.items()}
        return {full_layer_name: dense[ANY][0]} if [*dense] == [ANY] else dense

    @property
    def reverse_op(self) -> ConversionOps:
        """What saving the model does in its place: nothing, as it is dense."""
        return _IdentityOp()


def unpacked(record: Tensor, kind: torch.dtype) -> Tensor:
    """The dense tensor of a record, in a number format if its numbers are not whole ones, on the record's device."""
    content = unpack(record.cpu())
    tensor = content.dense() if isinstance(content, Packed) else content
    return tensor.to(record.device, kind if tensor.is_floating_point() else tensor.dtype)
