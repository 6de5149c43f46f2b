"""Text corpora, each named by one spec string.

- `Salesforce/wikitext:wikitext-2-raw-v1`: a hub dataset, `name:configuration`, loaded with `datasets`;
- a local .txt, .jsonl or .parquet file (the last two with a `text` column), or a folder of such files; in a folder, files
  whose names begin with train are the training text, and those with test, eval or valid the evaluation text;
- `builtin:python-docs`: the English language reference that ships with CPython, for runs without a network.

Documents are joined by a blank line, as is usual for WikiText perplexity (GPTQ, SparseGPT).
"""

import hashlib
import os
import platform
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from components.core.errors import readable, shown
from components.core.files import content_fingerprint, stat_fingerprint
from components.core.hub import from_hub
from components.core.reading import parse_json

WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1"
PYTHON_DOCS = "builtin:python-docs"
TOKENS_FILE = "tokens.safetensors"
SUFFIXES = (".txt", ".jsonl", ".parquet")
EVAL_NAMES = ("test", "eval", "valid")
MOST_FILES = 100_000  # in a folder
SEPARATOR = "\n\n"
SHARED_PARAGRAPH = 40  # characters; topics that share a paragraph at least this long go to the same split


class Document(TypedDict):
    """A line of a .jsonl file, as far as it is used."""

    text: str


def check_corpus(parameter: str, spec: str) -> None:
    """Check a spec without using the network or reading the text.

    Raises:
        ValueError: the spec is empty, an unknown `builtin:`, a missing path, an unsupported file or a folder without text.
    """
    if spec == PYTHON_DOCS or is_hub(spec):
        return
    path = Path(spec)
    if spec.startswith("builtin:"):
        raise ValueError(f"{parameter} must be {PYTHON_DOCS}, a hub dataset or a local path, got {shown(spec)}")
    if not spec or not path.exists():
        raise ValueError(f"{parameter} must be an existing file or folder, or a hub dataset 'name:config', got {shown(spec)}")
    if path.is_dir() and sum(1 for _ in islice(_all_files(path), MOST_FILES + 1)) > MOST_FILES:  # such as a whole disk
        raise ValueError(f"{parameter} must hold at most {MOST_FILES} files, {spec} has more")
    if path.is_dir() and not _folder_files(path):
        raise ValueError(f"{parameter} must hold {', '.join(SUFFIXES)} files, got {spec}")
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ValueError(f"{parameter} must be a {', '.join(SUFFIXES)} file, got {spec}")


def check_data(parameter: str, data: str) -> None:
    """Check a setting that takes a tokens folder or a corpus spec. Raises the errors of `check_corpus`."""
    if not is_tokens(data):
        check_corpus(parameter, data)


def is_tokens(data: str) -> bool:
    """Whether `data` is a tokens folder, as written by the tokenize stage."""
    return (Path(data) / TOKENS_FILE).is_file()


def is_hub(spec: str) -> bool:
    """Whether a spec names a hub dataset: `name:configuration`, or an `owner/name` that is not a local path."""
    return (
        not spec.startswith("builtin:")
        and not Path(spec).exists()
        and (":" in spec or spec.count("/") == 1)
        and (Path(spec).suffix not in SUFFIXES and not spec.startswith((".", "/", "~")))
    )


def load_text(parameter: str, spec: str, split: str, revision: str | None = None) -> str:
    """The `train` or `eval` text of a corpus as one string.

    Args:
        parameter: name of the setting, for error messages.
        spec: see the module's docstring.
        split: `train` or `eval`.
        revision: the version that `resolve_corpus` returned; None = the current one.

    Raises:
        ValueError: the corpus has no such split, is empty, cannot be read, is no longer at the revision, or is refused
            by the hub.
    """
    check_corpus(parameter, spec)
    if revision and not is_hub(spec) and (found := resolve_corpus(parameter, spec)) != revision:
        raise ValueError(f"{parameter} must still be at revision {revision}, {spec} is at {found}: start anew")
    if spec == PYTHON_DOCS:
        documents = python_docs()[split]
    elif is_hub(spec):
        documents = _hub_documents(parameter, spec, split, revision)
    else:
        documents = _local_documents(parameter, Path(spec), split)
    text = SEPARATOR.join(documents)
    if not text.strip():
        raise ValueError(f"{parameter} must hold {split} text, {spec} is empty")
    return text


def resolve_corpus(parameter: str, spec: str) -> str:
    """Find the exact version of a corpus without downloading it: its hub commit, or a fingerprint of its local files.

    Raises:
        ValueError: as for `check_corpus`, or the hub does not provide it; the message says what to do.
    """
    check_corpus(parameter, spec)
    if spec == PYTHON_DOCS:
        return f"python-{platform.python_version()}"
    if not is_hub(spec):
        return stat_fingerprint([Path(spec)] if Path(spec).is_file() else _folder_files(Path(spec)))
    from huggingface_hub import HfApi

    commit = from_hub(parameter, spec, lambda: HfApi().dataset_info(spec.partition(":")[0]).sha)
    assert commit is not None
    return commit


def python_docs() -> dict[str, list[str]]:
    """Split the topics of `pydoc_data` into train and eval so that no paragraph is in both.

    Some topics quote others at length (`compound` contains all of `for`), so topics that share a paragraph are grouped;
    every fifth group, in order of name, is for evaluation.
    """
    from pydoc_data.topics import topics

    group = {name: name for name in topics}  # union-find over topics

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    first_seen: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in (" ".join(part.split()) for part in topics[name].split("\n\n")):
            if len(paragraph) >= SHARED_PARAGRAPH:
                group[root(name)] = root(first_seen.setdefault(paragraph, name))
    members = defaultdict(list)
    for name in sorted(topics):
        members[root(name)].append(topics[name])
    splits: dict[str, list[str]] = {"train": [], "eval": []}
    for position, key in enumerate(sorted(members)):
        splits["eval" if position % 5 == 4 else "train"] += members[key]
    return splits


def _hub_documents(parameter: str, spec: str, split: str, revision: str | None) -> list[str]:
    import datasets

    name, _, config = spec.partition(":")
    datasets.disable_progress_bars()
    try:
        loaded: Any = datasets.load_dataset(name, config or None, revision=revision)
    except Exception as error:  # the hub's client raises many exception types; the user needs one line
        raise ValueError(
            f"{parameter} must be a dataset that can be reached, got {spec}: {type(error).__name__}: {error}. "
            "Check its name, `hf auth login` if it is gated, or give a local file"
        ) from error
    choices = ("train",) if split == "train" else ("test", "validation")
    for choice in choices:
        if choice in loaded:
            return list(_texts(parameter, spec, loaded[choice]))
    raise ValueError(f"{parameter} must have a {' or '.join(choices)} split, {spec} has {', '.join(loaded)}")


def _folder_files(folder: Path) -> list[Path]:
    return sorted(file for file in _all_files(folder) if file.suffix in SUFFIXES and file.is_file())


def _all_files(folder: Path) -> Iterator[Path]:
    """All files below a folder. Unlike `rglob`, it does not pass over a folder that is closed."""

    def stop(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=stop):
        yield from (Path(place, name) for name in names)


def _local_files(path: Path, split: str) -> list[Path]:
    """The files of a split. A single file, or a folder without named splits, serves as either split."""
    if path.is_file():
        return [path]
    files = _folder_files(path)
    held_out = [file for file in files if file.stem.lower().startswith(EVAL_NAMES)]
    train = [file for file in files if file.stem.lower().startswith("train")]
    if not held_out and not train:
        return files
    return (held_out if split == "eval" else train) or []


def _local_documents(parameter: str, path: Path, split: str) -> list[str]:
    files = _local_files(path, split)
    if not files:
        raise ValueError(f"{parameter} must have a file whose name begins with {split} for its {split} text, {path} has none")
    return [document for file in files for document in _read_file(parameter, file)]


def _read_file(parameter: str, file: Path) -> Iterator[str]:
    if file.suffix == ".txt":
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{parameter} must be UTF-8 text, {file} is not: {error}") from error
    elif file.suffix == ".jsonl":
        yield from _read_jsonl(parameter, file)
    else:
        yield from _read_parquet(parameter, file)


def _read_jsonl(parameter: str, file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield parse_json(line, f"line {number} of {file}", Document)["text"]
            except ValueError as error:
                raise ValueError(f"{parameter} must have an object with a 'text' in each line: {error}") from error


def _read_parquet(parameter: str, file: Path) -> Iterator[str]:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it also logs what it raises
    with readable(f"{parameter} must be a parquet file, {file} is not one"):
        table: Any = datasets.load_dataset("parquet", data_files=str(file), split="train")
    yield from _texts(parameter, str(file), table)


def _texts(parameter: str, spec: str, table: Any) -> Iterator[str]:
    """Yield the texts of a `datasets` table."""
    if "text" not in table.column_names:
        raise ValueError(f"{parameter} must have a 'text' column, {spec} has {table.column_names}")
    rows = enumerate(table["text"], start=1)
    while True:
        with readable(f"{parameter} must have text in UTF-8, {spec} has not"):  # it is decoded row by row
            row, text = next(rows, (0, None))
        if not row:
            return
        if not isinstance(text, str):
            raise ValueError(f"{parameter} must have strings as 'text', {spec} has {type(text).__name__} in row {row}")
        yield text


def check_held_out(parameter: str, train_data: str, eval_data: str) -> None:
    """Check that evaluation and training, whose setting is `parameter`, read local files of different content.

    Raises:
        ValueError: they share a file, or one has a copy of the other's.
    """
    if splits_overlap(train_data, eval_data):
        raise ValueError(
            f"eval_data must be other text than {parameter}, got {eval_data}: give another file, "
            "or a folder with train.* and test.* files"
        )


def splits_overlap(train_spec: str, eval_spec: str) -> bool:
    """Whether training and evaluation would share a local file or its content; only files of equal size are read.

    The blocks of a tokens folder are compared when they are loaded, see `components.core.tokens.count_overlaps`.
    """
    if any(spec == PYTHON_DOCS or is_hub(spec) or is_tokens(spec) for spec in (train_spec, eval_spec)):
        return False
    files = _local_files(Path(train_spec), "train"), _local_files(Path(eval_spec), "eval")
    if set.intersection(*({file.resolve() for file in split} for split in files)):
        return True
    sizes = set.intersection(*({file.stat().st_size for file in split} for split in files)) - {0}
    contents = ({content_fingerprint(file) for file in split if file.stat().st_size in sizes} for split in files)
    return bool(set.intersection(*contents))


def text_fingerprint(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
