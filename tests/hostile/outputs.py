"""Whether the output of a stage is what an undisturbed run makes."""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.hostile.lab import Lab

# stage → the folder in the lab that an undisturbed run with the lab's settings has made
REFERENCE = {
    "fetch": "fetched",
    "tokenize": "tokens",
    "prune": "pruned",
    "distill": "distilled",
    "quantize": "int8",
    "report": "summary",
    "publish": "published",
}
OTHER: dict[tuple[str, Any], str] = {
    ("teacher_cache", "always"): "distilled_cached",
    ("allocation", "search"): "pruned_unevenly",
}  # a change → the result with it, where it is another
SAME = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*.json", "quanto_qmap.json", "summary.json")
VARYING = ("seconds", "peak_memory_bytes")


def digest(folder: Path) -> dict[str, str]:
    """Path within a folder → hash of each file whose content does not depend on the time or the machine."""
    files = sorted({file for pattern in SAME for file in folder.rglob(pattern)})
    return {str(file.relative_to(folder)): hashlib.sha256(_steady(file)).hexdigest() for file in files}


def _steady(file: Path) -> bytes:
    if file.suffix == ".safetensors":  # the order of its metadata varies
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        return json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode() + content[8 + length :]
    if file.name != "summary.json":
        return file.read_bytes()
    return json.dumps(_without_times(json.loads(file.read_text()))).encode()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(part) for key, part in value.items() if key not in VARYING}
    return [_without_times(part) for part in value] if isinstance(value, list) else value


def wrong(lab: Lab, stage: str, output: Path, changes: Mapping[str, Any], reference: str = "") -> str | None:
    """How an output differs from that of an undisturbed run with the same changes, or from a reference that is named."""
    changed = (other for (name, value), other in OTHER.items() if changes.get(name) == value)
    reference = reference or next(changed, REFERENCE[stage])
    expected, found = digest(lab.root / reference), digest(output)
    for held in (expected, found):  # it holds the times of the report's own run
        held.pop("v1/report/summary.json", None)
    if changes.get("mask_file"):
        expected.pop("sparsity_mask.safetensors")
        mask = output.with_name(changes["mask_file"])
        if _steady(mask) != _steady(lab.root / reference / "sparsity_mask.safetensors"):
            return "the mask is other"
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{name} is {'other' if name in expected and name in found else 'missing' if name in expected else 'new'}"
    return None
