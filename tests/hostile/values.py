"""Every flag of every command with hostile values.

A value is either right, and the command does its work, or it is refused: one line that names the parameter, soon, with nothing
left behind and no secret repeated.
"""

import ctypes
import dataclasses
import json
import os
import sys
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import kfp.local
from simple_parsing.docstring import get_attribute_docstring

import pipelines.api
import pipelines.compile
import pipelines.run
import pipelines.schedule
import pipelines.submit
from components.core import processes
from components.distill_distributed.config import DistillDistributedConfig
from components.distill_distributed.node import NodeConfig
from components.distill_distributed.sweep import SweepConfig
from tests.hostile.harness import Case, Ended, Kind, Running, config_of, flags, leftovers, refusal, resources
from tests.hostile.lab import Lab

TOKEN = "hf_" + "aBcDeFgH" * 4
PASSWORD = "Tr0ub4dor"
SECRETS = (TOKEN, PASSWORD)
# parameters whose values depend on each other: an error may name the other
RELATED = {
    "len": ("calibration_data", "train_data", "eval_data"),
    "nsamples": ("calibration_data", "train_data"),
    "blocks": ("eval_data",),
    "batch": ("train_data",),
    "size": ("train_data",),
    "steps": ("train_data",),
    "sparsity": ("pattern",),
    "pattern": ("sparsity", "block_size"),
    "backend": ("nproc_per_node",),
    "registry": ("publish_to",),
    "model": ("registry",),
    "revision": ("train_data", "eval_data"),
    "parameters": ("must be a parameter of",),
    "flags": ("seq_len",),  # a node without flags has the default, which is too long for the model
}
HUGE = "9" * 5000
NUMBERS = (
    "", " ", "abc", "-1", "0", "-0", "1", "2", "1.5", "1e3", "1e999", "-1e999", "nan", "-nan", "inf", "-inf", "1e-320",
    "0x10", "1_000", "٣", "１２", "²", "½", "--", "1,5", "1 2", "+1", "1e", ".", "None", "True", "[]", "4294967295",
    "4294967296", "2147483648", "-2147483649", "9223372036854775807", "9223372036854775808", "18446744073709551616", HUGE,
    f"-{HUGE}", f"0.{HUGE}", "0" * 5000, "1e-400", "0.9999999", "1\n2", "1\x00", "NaN(7)", TOKEN, "a" * 100_000, "0b1", "1j",
    "1/2", "%d", "$((1))", "⒈", "-", "--help=1",
)  # fmt: skip
BOOLEANS = (
    "", " ", "true", "FALSE", "1", "0", "2", "-1", "yes", "no", "maybe", "None", "nan", "тrue", "true ", HUGE, TOKEN,
    "a" * 100_000, "[true]", "1.0", "t\nrue", "\udcff",
)  # fmt: skip
PLACES = (
    "", " ", "\t\n", ".", "..", "/", "../..", "../../../../../../..", "~", "~root/x", "no/such/thing", "./no-such",
    "/proc/no/such", "/dev/null", "/dev/zero", "/dev/full", "/dev/stdin", "/dev/tty", "/proc/self/mem", "/proc/self/environ",
    "/proc/1/mem", "/proc/self/fd/0", "/sys/kernel", "/etc/passwd", "here/closed", "here/closed/inside", "here/file",
    "here/file/inside", "here/folder", "here/dangling", "here/loop", "here/loop/inside", "here/pipe", "here/empty.txt",
    "here/empty.json", "here/socket", "a" * 255, "a" * 256, "a" * 5000, "a/" * 2500, "a" * 100_000, "/" * 5000,
    "/" + "a" * 300, "nul\x00nul", "line\nline", "bell\x07\x1b[31m", "\u202eabc", "\udcff\udcfe", "ünïcödé", "日本語", "🦥" * 9,
    "'; rm -rf x; '", "$(touch owned)", "`touch owned`", "%s%n{0}", "a b", "-", "--", "--help", "-rf", "a=b", "*", "?", "[",
    "{}", "[]", "null", "nan", "0", "-1", HUGE, "C:\\x", "\\\\host\\x", "file:///etc/passwd", "gs://", "gs://b",
    "gs://bucket/../x", "s3://b/x?token=" + PASSWORD, f"https://user:{PASSWORD}@host.invalid/x",
    f"http://host.invalid/x?token={PASSWORD}", f"http://127.0.0.1:9/?access_token={PASSWORD}", "http://", "https://[",
    "http://[::1", "ftp://x/y", "owner/name", "owner/name@main", "owner/name@", "@", "a/b/c", "owner/name:config", ":",
    "builtin:", "builtin:python-docs", "builtin:smollm2-136m", TOKEN, f"owner/{TOKEN}", f"{TOKEN}/name",
    f"owner/name@{TOKEN}", f"user=me&password={PASSWORD}", "latest.json", ".hidden", "x.", "x/", "x//y", "unstructured",
    "2:4", "0:0", "1:" + "9" * 400, "auto", "int8", "true",
)  # fmt: skip
# parameters that name what is written, and places that could be written to but do not belong to the case
WRITTEN = (
    "output_dir", "mask_file", "output_mask_file", "checkpoint_dir", "tensorboard_dir", "job_file", "publish_to", "run_dir",
)  # fmt: skip
OUTSIDE = ("/", "..", "../..", "../../../../../../..", "/" * 5000)
LISTS = (("",), ("a", ""), ("int8", "int8"), ("int8",) * 500, ("-1",), ("x=y",), ("model_id=",), ("=",), (f"model_id={TOKEN}",))
STRUCTURES = (
    "{", "[]", "{}", "null", "1", '"x"', "[" * 100_000, '{"a":' * 100_000, '{"resources": 1}', '{"env": {"x": "y"}}',
    '{"volumes": [[]]}', '{"inputs": {}}', '["--seed=1"]', '[1, null]', '{"x": "../../etc"}', '{"x": 1}', "NaN",
    '{"a": 1e999}', '"\\ud800"', "{1: 2}",
)  # fmt: skip
# parameters of a run as the resolve stage is given them → what an error must name
RUNS = {
    json.dumps({name: value}): name
    for name, values in {
        "prune_sparsity": ("0.5", "1.3", "nan", "1e999", "", "0.5\n", HUGE, None, True, [0.5], {}, 1e300, "٣"),
        "distill_epochs": ("1", "1.0", "1.5", "-1", "1e3", HUGE, 10**400, -(10**30), 2.5, "abc"),
        "skip_ppl_eval": ("true", "True", "yes", "", 1, False),
        "publish_to": (
            "", "/proc/x", "/dev/null/x", "/" + "a" * 300, "gs://", 'x"y', "/a\nb", f"s3://b/x?token={PASSWORD}",
            f"https://user:{PASSWORD}@host.invalid/x", 7,
        ),
        "quantize_formats": (["fp8"], "int8", [], ["int4"], [1], [["int8"]], {"a": 1}),
        "gpu_type": (TOKEN, "", "gpu", "a" * 100_000),
        "prune_memory": ("16m", "-1", "1e3", "16Gi ", HUGE),
        "no_such": (1, "x"),
        TOKEN: (1,),
    }.items()
    for value in values
}  # fmt: skip
RUNS |= {
    '{"distill_handover": "/tmp"}': "distill_image",
    '{"distill_handover": "/proc/x", "distill_image": "x"}': "distill_handover",
    '{"skip_ppl_eval": "true", "publish_max_ppl_ratio": "2"}': "publish_max_ppl_ratio",
    '{"": 1}': "must be a parameter of",
    '{"model_id": 5}': "",
}


@dataclass(frozen=True)
class Program:
    """A command.

    Attributes:
        module: what `python -m` would be given.
        settings: its settings class.
        good: flags of a run that works, or is refused only because there is no cluster.
        before: called in the process first, to put what would leave the machine or take minutes out of action.
        first: arguments before the flags.
    """

    module: str
    settings: type
    good: dict[str, Any]
    before: Callable[[], object] = lambda: None
    first: tuple[str, ...] = ()


def _accept(*_: Any, **__: Any) -> None:
    """Take the place of what follows the checks."""
    raise SystemExit(0)


def _no_pipeline() -> None:
    kfp.local.init = _accept


def _no_processes() -> None:
    processes.start = _accept


def _no_server() -> None:
    pipelines.api.connect = _accept


def programs(lab: Lab) -> dict[str, Program]:
    """All commands, by name."""
    made = {}
    for name in ("resolve", "fetch", "tokenize", "prune", "distill", "quantize", "evaluate", "report", "publish"):
        good = lab.settings(name)
        if name == "publish":
            good |= {"publish_to": ""}
        made[name] = Program(f"components.{name}", config_of(name), good, _no_processes)
    cluster = {"handover": lab.path("handover"), "image": "x"}
    job = lab.settings("distill") | cluster
    made["distill_distributed"] = Program("components.distill_distributed", DistillDistributedConfig, job)
    inputs = {"teacher_model": "dense", "student_model": "pruned", "mask_file": "pruned", "train_data": "tokens"}
    node = {"result": lab.path("handover"), "flags": "[]"}
    node["inputs"] = json.dumps({parameter: lab.path(folder) for parameter, folder in inputs.items()})
    made["node"] = Program("components.distill_distributed.node", NodeConfig, node, _hasty)
    sweep = {"run_id": "x", "handover": lab.path("handover")}
    made["sweep"] = Program("components.distill_distributed.sweep", SweepConfig, sweep)
    texts = {name: lab.path("corpus") for name in ("train_data", "eval_data")}
    run = {"model_id": lab.path("dense"), "run_dir": "output", **texts}
    made["run"] = Program("pipelines.run", pipelines.run.settings_class(), run, _no_pipeline)
    made["compile"] = Program("pipelines.compile", pipelines.compile.CompileConfig, {"output_dir": "output"})
    made["submit"] = Program("pipelines.submit", pipelines.submit.SubmitConfig, {}, _no_server)
    create = {"name": "x", "every": 60}
    made["schedule"] = Program("pipelines.schedule", pipelines.schedule.CreateConfig, create, _no_server, ("create",))
    return made


def _hasty() -> None:
    time.sleep = lambda _: None


def _prepare(program: Program) -> None:
    # as root, without the right to open any file, so that a closed folder is closed
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    sys.modules.pop(program.module, None)  # runpy would warn of it
    program.before()


def cases(lab: Lab, random: Random, count: int) -> Iterator[Case]:
    """So many cases; the values of each flag in a random order, as many of each as it takes."""
    waiting = []
    for name, program in programs(lab).items():
        for entry in dataclasses.fields(program.settings):
            get_attribute_docstring(program.settings, entry.name)  # kept in memory for the processes that are forked
        hints = typing.get_type_hints(program.settings)
        for entry in dataclasses.fields(program.settings):
            values = list(_values(hints[entry.name], entry.name))
            random.shuffle(values)
            waiting.append([(name, program, entry.name, value) for value in values])
    random.shuffle(waiting)
    made = 0
    while waiting and made < count:
        for values in waiting:
            if made < count:
                made += 1
                name, program, parameter, value = values.pop()
                shown = ascii(value)[:60]
                yield Case(f"{name} --{parameter} {shown}", partial(_check, lab, program, parameter, value))
        waiting = [values for values in waiting if values]


def _values(kind: Any, name: str) -> Iterator[Any]:
    if kind is bool:
        yield from BOOLEANS
    elif kind in (int, float):
        yield from NUMBERS
    elif kind is str:
        yield from (place for place in PLACES if not (name in WRITTEN and place in OUTSIDE))
        if name in ("pod", "inputs", "flags", "params", "parameters"):
            yield from STRUCTURES
        if name == "parameters":
            yield from RUNS
    else:
        yield from map(list, LISTS)
        yield from ([place] for place in PLACES)


def _check(lab: Lab, program: Program, parameter: str, value: Any, place: Path) -> str | None:
    _hostile_files(place / "here")
    arguments = [*program.first, *flags(program.good | {parameter: value})]
    if any("\0" in argument for argument in arguments):
        arguments = [argument.replace("\0", "\x01") for argument in arguments]  # which no command line can hold
    before = {path.name for path in place.iterdir()}
    ended = Running(program.module, arguments, place, partial(_prepare, program)).wait()
    return _judge(ended, parameter, value) or _traces(ended, place, before)


def _judge(ended: Ended, parameter: str, value: Any) -> str | None:
    said = ended.out + ended.err
    if secret := next((secret for secret in SECRETS if secret in said), None):
        return f"repeats {secret}: {said[max(said.index(secret) - 100, 0) :][:300]!r}"
    if ended.code == 0:
        return resources(ended)
    if ended.err.startswith(("error: a job needs a cluster", "error: host must be a KFP API")):
        return resources(ended)
    names = [parameter, *RELATED.get(parameter.rpartition("_")[2], ())]
    if isinstance(value, str) and 2 < len(value) < 100:
        names.append(value)  # what is wrong with a file is told by its name
    if isinstance(value, str) and value in RUNS:
        names = ["***" if RUNS[value] == TOKEN else RUNS[value]]
    if isinstance(value, list):  # of which each element may be refused by a name of its own
        names = []
    return refusal(ended, *names)


def _traces(ended: Ended, place: Path, before: set[str]) -> str | None:
    if (place / "owned").exists():
        return "a value was run by a shell"
    return leftovers(place, *before) if ended.code else None


def _hostile_files(folder: Path) -> None:
    """Files that no command can use, or only as far as it must."""
    (folder / "closed").mkdir(parents=True)
    (folder / "folder").mkdir()
    for name in ("file", "empty.txt", "empty.json"):
        (folder / name).touch()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (folder / "closed").chmod(0)


KIND = Kind(cases, whole=2600, short=60)
