"""Damaged files: every file that a stage reads, changed by bytes, cut short, or changed by structure."""

import copy
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.hostile.harness import Case, Ended, Kind, free_port, refusal, resources, stage, stage_here
from tests.hostile.lab import Lab

HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3.5, -0.0, 10**5, 10**9, 2**63, 10**30, float("nan"), float("inf")),
    *("", "0", "64", "x" * 2000, "\u0000", "../../etc/passwd", "/dev/zero", [], {}, [[]], [1, 2, 3], {"": 0}, {"a": {"b": {}}}),
]


@dataclass(frozen=True)
class Target:
    """A file that a stage reads.

    Attributes:
        stage: the stage.
        setting: its setting that names the input.
        source: the input in the lab.
        file: the file within the input; empty if the input is the file.
        share: how many of the cases, relative to other targets.
        changes: other settings of the stage.
        alone: each case needs a process of its own.
        early: a refusal must come before anything was measured.
    """

    stage: str
    setting: str
    source: str
    file: str = ""
    share: float = 1.0
    changes: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    early: bool = True


TARGETS = [
    Target("evaluate", "model_dir", "dense", "config.json", 3),
    Target("prune", "dense_model", "dense", "config.json", 2),
    Target("fetch", "model_id", "dense", "config.json", 1),
    Target("quantize", "model_dir", "distilled", "config.json", 1),
    Target("tokenize", "model_dir", "dense", "tokenizer.json", 4),
    Target("evaluate", "model_dir", "dense", "tokenizer.json", 1),
    Target("tokenize", "model_dir", "dense", "tokenizer_config.json", 2),
    Target("evaluate", "model_dir", "dense", "generation_config.json", 1),
    Target("evaluate", "model_dir", "dense", "model.safetensors", 2),
    Target("fetch", "model_id", "sharded", "model.safetensors.index.json", 1),
    Target("evaluate", "model_dir", "sharded", "model.safetensors.index.json", 1),
    Target("quantize", "model_dir", "distilled", "compression.json", 1),
    Target("distill", "student_model", "pruned", "compression.json", 0.5),
    Target("prune", "dense_model", "fetched", "compression.json", 0.5),
    Target("quantize", "mask_file", "pruned", "sparsity_mask.safetensors", 2),
    Target("distill", "mask_file", "pruned", "sparsity_mask.safetensors", 0.5),
    Target("quantize", "mask_file", "mask.pt", "", 0.5),
    Target("evaluate", "model_dir", "int8", "quanto_qmap.json", 1),
    Target("evaluate", "model_dir", "int8", "model.safetensors", 2),
    Target("evaluate", "model_dir", "fp8", "config.json", 1),
    Target("evaluate", "model_dir", "ct", "config.json", 1),
    Target("evaluate", "model_dir", "ct", "model.safetensors", 1),
    Target("evaluate", "model_dir", "packed-int8", "model.safetensors", 2),
    Target("evaluate", "model_dir", "packed-int4", "model.safetensors", 2),
    Target("evaluate", "model_dir", "packed-int8", "model.safetensors.index.json", 0.5),
    Target("evaluate", "model_dir", "packed-int4", "config.json", 1),
    Target("quantize", "calibration_data", "tokens", "tokens.safetensors", 0.5, {"format": "packed-int4"}),
    Target("evaluate", "eval_data", "tokens", "tokens.safetensors", 2),
    Target("distill", "train_data", "tokens", "tokens.safetensors", 0.5),
    Target("prune", "calibration_data", "tokens", "tokens.safetensors", 0.5),
    Target("report", "models", "int8", "quantize_stats.json", 0.5),
    Target("report", "models", "int8", "distill_stats.json", 0.5),
    Target("report", "models", "int8", "prune_stats.json", 0.5),
    Target("report", "models", "int8", "compression.json", 0.3),
    Target("publish", "models", "int8", "compression.json", 2),
    Target("publish", "publish_to", "published", "v1/complete.json", 1, {"version": "v1"}),
    Target("publish", "publish_to", "published", "v1/version.json", 1, {"version": "v1"}),
    Target("tokenize", "train_data", "corpus", "train.txt", 0.5),
    Target("tokenize", "train_data", "train.jsonl", "", 2),
    Target("tokenize", "train_data", "train.parquet", "", 0.5),
    Target("distill", "deepspeed_config", "deepspeed.json", "", 0.02, {"backend": "deepspeed"}, alone=True),
    Target("distill", "checkpoint_dir", "checkpoints", "step-00000002/manifest.json", 0.5, early=False),
    Target("distill", "checkpoint_dir", "checkpoints", "step-00000002/.metadata", 0.3, early=False),
    Target("distill", "checkpoint_dir", "checkpoints", "step-00000002/__0_0.distcp", 0.3, early=False),
]  # fmt: skip


def cases(lab: Lab, random: Random, count: int) -> Iterator[Case]:
    """`count` mutations, divided among the targets."""
    shares = sum(target.share for target in TARGETS)
    made = 0
    for position, target in enumerate(TARGETS):
        number = count - made if position == len(TARGETS) - 1 else max(1, round(count * target.share / shares))
        for _ in range(number):
            yield _case(lab, target, random.randrange(2**32))
        made += number


def _case(lab: Lab, target: Target, seed: int) -> Case:
    name = f"{target.stage} --{target.setting} {target.source}/{target.file}"

    def run(place: Path) -> str | None:
        source = lab.copy(target.source, place)
        file = source / target.file if target.file else source
        how = mutate(file, Random(seed))
        settings = lab.settings(target.stage, **target.changes)
        if target.changes.get("backend"):
            settings["master_port"] = free_port()
        settings[target.setting] = [str(source)] if isinstance(settings.get(target.setting), list) else str(source)
        ended = stage(target.stage, settings, place) if target.alone else stage_here(target.stage, settings)
        fault = verdict(ended, target, file, *settings)
        return f"{how}: {fault}" if fault else None

    return Case(f"{name}: seed {seed}", run)


def verdict(ended: Ended, target: Target, file: Path, *names: str) -> str | None:
    """What is wrong with the end of a stage that read a damaged file."""
    if ended.code == 0:
        return resources(ended)
    if target.early and "[PPL]" in ended.out:
        return f"refused after something was measured: {ended.err[-300:]!r}"
    # wrong numbers in a file of the right form show in the result alone
    results = ("perplexity must be finite", "is not finite; try bfloat16", "zero outside its mask")
    return refusal(ended, file.name, str(file.parent), *results, *names)


def mutate(file: Path, random: Random) -> str:
    """Change a file in one of many ways; returns how."""
    content = file.read_bytes()
    ways: list[tuple[Callable[[bytes, Random], tuple[bytes, str]], int]] = [(_bytes, 1)]
    if file.suffix in (".json", ".jsonl"):
        ways.append((_json_lines if file.suffix == ".jsonl" else _json, 3))
    if file.suffix == ".safetensors":
        ways.append((_safetensors, 3))
    way = random.choices([way for way, _ in ways], [weight for _, weight in ways])[0]
    changed, how = way(content, random)
    file.write_bytes(changed)
    return how


def _bytes(content: bytes, random: Random) -> tuple[bytes, str]:
    at, length = random.randrange(len(content) + 1), random.choice((1, 1, 2, 8, 100))
    junk = random.choice((bytes(length), b"\xff" * length, random.randbytes(length), b"[" * 10_000, b'"', b"9" * length))
    ways = {
        "cut": content[:at],
        "overwritten": content[:at] + junk + content[at + len(junk) :],
        "inserted": content[:at] + junk + content[at:],
        "removed": content[:at] + content[at + length :],
        "twice": content + content,
        "empty": b"",
    }
    how = random.choices(list(ways), (4, 6, 4, 4, 1, 1))[0]
    return ways[how], f"{how} at {at} of {len(content)} with {junk[:10]!r}"


def _json(content: bytes, random: Random) -> tuple[bytes, str]:
    changed, how = _change(json.loads(content), random)
    text = json.dumps(changed)
    if random.random() < 0.03:
        text, how = text.replace("null", "[" * 100_000, 1), f"{how}, nested"
    if random.random() < 0.03:
        text, how = text.replace("1", "1e999", 1), f"{how}, infinite"
    return text.encode(), how


def _json_lines(content: bytes, random: Random) -> tuple[bytes, str]:
    lines = content.splitlines()
    at = random.randrange(len(lines))
    lines[at], how = _json(lines[at], random)
    return b"\n".join(lines), f"line {at}: {how}"


def _safetensors(content: bytes, random: Random) -> tuple[bytes, str]:
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    about = header.get("__metadata__", {})
    inner = [name for name, text in about.items() if text[:1] in "{["]
    if inner and random.random() < 0.4:  # JSON within the metadata
        name = random.choice(inner)
        changed, how = _change(json.loads(about[name]), random)
        about[name] = json.dumps(changed)
    else:
        header, how = _change(header, random)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data, f"header: {how}"


def _change(value: Any, random: Random) -> tuple[Any, str]:
    """Change one node of a JSON value, chosen at random among all depths."""
    value = copy.deepcopy(value)
    path: list[Any] = []
    parent, key, node = None, None, value
    while isinstance(node, dict | list) and node and (parent is None or random.random() < 0.8):
        parent, key = node, random.choice(list(node)) if isinstance(node, dict) else random.randrange(len(node))
        node = parent[key]
        path.append(key)
    hostile = random.choice(HOSTILE)
    where = ".".join(str(part)[:40] for part in path[-4:])
    if parent is None or random.random() < 0.02:
        return hostile, f"all is {str(hostile)[:40]!r}"
    if random.random() < 0.15:
        del parent[key]
        return value, f"{where} removed"
    if isinstance(parent, dict) and random.random() < 0.05:
        parent[str(hostile)] = parent.pop(key)
        return value, f"{where} renamed to {str(hostile)[:40]!r}"
    if isinstance(node, int | float) and not isinstance(node, bool) and random.random() < 0.4:
        hostile = random.choice([node + 1, node - 1, node * 2, -node, node * 10**6, str(node), [node], float(node)])
    parent[key] = hostile
    return value, f"{where} is {str(hostile)[:40]!r}"


KIND = Kind(cases, whole=25_000, short=200)
