"""Every kind of corpus spec, valid and invalid."""

import json
import os
import platform
import re
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import pytest

from components.core import corpus
from components.core.corpus import (
    PYTHON_DOCS,
    WIKITEXT2,
    check_corpus,
    check_data,
    check_held_out,
    is_hub,
    is_tokens,
    load_text,
    python_docs,
    resolve_corpus,
    splits_overlap,
    text_fingerprint,
)
from components.core.files import content_fingerprint


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` converts out of the home folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path: Path, **columns: list) -> str:
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_text_file_is_read_as_it_is_for_either_split(tmp_path, split):
    (tmp_path / "a.txt").write_text("first line\n\n  ümlaut 漢字\n", encoding="utf-8")
    assert load_text("train_data", str(tmp_path / "a.txt"), split) == "first line\n\n  ümlaut 漢字\n"


def test_documents_of_a_jsonl_file_are_joined_by_a_blank_line(tmp_path):
    spec = write_jsonl(tmp_path / "a.jsonl", [{"text": "one", "id": 1}, {"text": "", "id": 2}, {"text": "two\n", "id": 3}])
    assert load_text("train_data", spec, "train") == "one\n\n\n\ntwo\n"


def test_documents_of_a_parquet_file_are_joined_by_a_blank_line(tmp_path):
    spec = write_parquet(tmp_path / "a.parquet", text=["one", "two"], id=[1, 2])
    assert load_text("eval_data", spec, "eval") == "one\n\ntwo"


def test_a_changed_jsonl_file_is_read_anew(tmp_path):
    spec = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    assert load_text("train_data", spec, "train") == "one"
    write_jsonl(tmp_path / "a.jsonl", [{"text": "changed"}])
    assert load_text("train_data", spec, "train") == "changed"


def test_a_folder_gives_its_named_splits(tmp_path):
    (tmp_path / "train-00.txt").write_text("train one")
    (tmp_path / "Train-01.txt").write_text("train two")
    (tmp_path / "notes.md").write_text("no corpus")
    (tmp_path / "other.txt").write_text("of neither split")
    (tmp_path / "nested").mkdir()
    write_jsonl(tmp_path / "nested" / "test.jsonl", [{"text": "held out"}])
    write_parquet(tmp_path / "validation.parquet", text=["valid"])
    assert load_text("train_data", str(tmp_path), "train") == "train two\n\ntrain one"
    assert load_text("eval_data", str(tmp_path), "eval") == "held out\n\nvalid"


def test_a_folder_without_named_splits_is_one_text(tmp_path):
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    assert load_text("train_data", str(tmp_path), "train") == load_text("eval_data", str(tmp_path), "eval") == "a\n\nb"


def test_a_folder_with_one_of_the_splits_never_lends_it_to_the_other(tmp_path):
    (tmp_path / "train.txt").write_text("train")
    with pytest.raises(ValueError, match="eval_data must have a file whose name begins with eval for its eval text"):
        load_text("eval_data", str(tmp_path), "eval")
    (tmp_path / "train.txt").rename(tmp_path / "test.txt")
    with pytest.raises(ValueError, match="train_data must have a file whose name begins with train for its train text"):
        load_text("train_data", str(tmp_path), "train")


def paragraphs(documents: list[str]) -> set[str]:
    parts = (" ".join(part.split()) for document in documents for part in re.split(r"\n[ \t]*\n", document))
    return {part for part in parts if len(part) >= 40}


def test_python_docs_hold_every_topic_once():
    splits = python_docs()
    assert sorted(splits["train"] + splits["eval"]) == sorted(topics.values())
    assert not set(splits["train"]) & set(splits["eval"])


def test_python_docs_share_no_paragraph():
    splits = {name: paragraphs(documents) for name, documents in python_docs().items()}
    assert len(splits["train"]) > 100
    assert len(splits["eval"]) > 100
    assert splits["train"] & splits["eval"] == set()


def test_python_docs_are_the_same_each_time_and_large_enough_for_both_uses():
    texts = {split: load_text("train_data", PYTHON_DOCS, split) for split in ("train", "eval")}
    assert texts == {split: load_text("train_data", PYTHON_DOCS, split) for split in ("train", "eval")}
    assert len(texts["eval"]) > 20_000
    assert len(texts["train"]) > 3 * len(texts["eval"])


@pytest.mark.parametrize(
    ("spec", "hub"),
    [
        (WIKITEXT2, True),
        ("owner/name", True),
        ("owner/name:config", True),
        ("name:config", True),
        ("name", False),
        ("owner/name/deeper", False),
        ("owner/corpus.txt", False),
        ("owner/corpus.jsonl", False),
        ("./owner/name", False),
        ("../name", False),
        ("/owner/name", False),
        ("~/name", False),
        (PYTHON_DOCS, False),
        ("builtin:other", False),
        ("", False),
    ],
)
def test_which_specs_name_a_dataset_of_the_hub(tmp_path, monkeypatch, spec, hub):
    monkeypatch.chdir(tmp_path)
    assert is_hub(spec) is hub


def test_a_local_path_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub("owner/name")
    (tmp_path / "owner" / "name" / "a.txt").write_text("local")
    assert load_text("train_data", "owner/name", "train") == "local"


@pytest.mark.parametrize("spec", [PYTHON_DOCS, WIKITEXT2, "owner/name", "name:config"])
def test_good_specs_pass_without_the_network(spec):
    check_corpus("train_data", spec)
    check_data("train_data", spec)


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("", "train_data must be an existing file or folder, or a hub dataset 'name:config', got ''"),
        ("nothing", "train_data must be an existing file or folder, or a hub dataset 'name:config', got 'nothing'"),
        ("/no/such.txt", "train_data must be an existing file or folder, .* got '/no/such.txt'"),
        ("no/such.jsonl", "train_data must be an existing file or folder, .* got 'no/such.jsonl'"),
        ("builtin:python", "train_data must be builtin:python-docs, a hub dataset or a local path, got 'builtin:python'"),
        ("folder", r"train_data must hold \.txt, \.jsonl, \.parquet files, got folder"),
        ("table.csv", r"train_data must be a \.txt, \.jsonl, \.parquet file, got table\.csv"),
    ],
)
@pytest.mark.parametrize("check", [check_corpus, check_data, resolve_corpus, lambda *spec: load_text(*spec, "train")])
def test_wrong_specs_are_refused(tmp_path, monkeypatch, check, spec, rule):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "readme.md").touch()
    (tmp_path / "table.csv").touch()
    with pytest.raises(ValueError, match=f"^{rule}$"):
        check("train_data", spec)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", b""),
        ("blank.txt", b" \n\t\n"),
        ("empty.jsonl", b""),
        ("blank.jsonl", b'{"text": ""}\n{"text": " "}\n'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_corpus_without_text_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^eval_data must .*{name}"):
        load_text("eval_data", str(tmp_path / name), "eval")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", "ü".encode("latin-1")),
        ("garbage.jsonl", b"\x00\x01garbage"),
        ("half.jsonl", b'{"text": "a"}\n{"text": "b'),
        ("null.jsonl", b'{"text": "a"}\n{"text": null}\n'),
        ("number.jsonl", b'{"text": 1}\n'),
        ("garbage.parquet", b"PAR1 garbage"),
        ("empty.parquet", b""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_read_is_named_with_its_parameter(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^eval_data must .*{name}"):
        load_text("eval_data", str(tmp_path / name), "eval")


def test_text_in_a_parquet_file_that_is_not_utf8_is_refused(tmp_path):
    spec = write_parquet(tmp_path / "a.parquet", text=["first", "second"])
    content = Path(spec).read_bytes()
    Path(spec).write_bytes(content.replace(b"second", b"\xff\xfe\xfdond"))
    assert Path(spec).read_bytes() != content
    with pytest.raises(ValueError, match=f"^eval_data must have text in UTF-8, {spec} has not"):
        load_text("eval_data", spec, "eval")


def test_a_jsonl_or_parquet_file_without_text_is_refused(tmp_path):
    for spec, rule in (
        (write_jsonl(tmp_path / "a.jsonl", [{"body": "one", "id": 1}]), "an object with a 'text' in each line: line 1 of .*"),
        (write_parquet(tmp_path / "a.parquet", body=["one"], id=[1]), r"a 'text' column, .* has \['body', 'id'\]$"),
    ):
        with pytest.raises(ValueError, match=f"^train_data must have {rule}"):
            load_text("train_data", spec, "train")


def test_a_line_that_is_nested_without_end_is_refused(tmp_path):
    """Libraries that parse such lines in C or C++ die of it."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ' + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="^train_data must have an object with a 'text' in each line: line 2 of .*recursion"):
        load_text("train_data", str(tmp_path / "a.jsonl"), "train")


def test_a_local_corpus_that_changed_since_it_was_resolved_is_refused(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text("one")
    (tmp_path / "test.txt").write_text("two")
    revision = resolve_corpus("train_data", str(tmp_path))
    assert resolve_corpus("train_data", str(tmp_path)) == revision
    assert load_text("train_data", str(tmp_path), "train", revision) == "one"
    file.write_text("three")
    now = resolve_corpus("train_data", str(tmp_path))
    assert now != revision
    with pytest.raises(ValueError, match=f"^train_data must still be at revision {revision}, .* is at {now}: start anew$"):
        load_text("train_data", str(tmp_path), "train", revision)
    assert load_text("train_data", str(tmp_path), "train", now) == "three"


def test_a_file_changed_within_its_size_has_another_revision(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    os.utime(file, ns=(1, 1))
    revision = resolve_corpus("train_data", str(file))
    file.write_text("two")
    os.utime(file, ns=(2, 2))
    assert resolve_corpus("train_data", str(file)) != revision


def test_python_docs_are_at_the_revision_of_their_python():
    revision = f"python-{platform.python_version()}"
    assert resolve_corpus("train_data", PYTHON_DOCS) == revision
    assert load_text("train_data", PYTHON_DOCS, "train", revision)
    with pytest.raises(ValueError, match=r"train_data must still be at revision python-2\.7\.0"):
        load_text("train_data", PYTHON_DOCS, "train", "python-2.7.0")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the download: the requests it received, and the splits it answers with."""
    asked, splits = [], {}

    def load_dataset(name, config, revision):
        asked.append((name, config, revision))
        return {split: datasets.Dataset.from_dict(columns) for split, columns in splits.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, splits


def test_a_hub_dataset_is_asked_for_by_name_configuration_and_commit(hub):
    asked, splits = hub
    splits |= {"train": {"text": ["a", "b"]}, "test": {"text": ["c"]}, "validation": {"text": ["d"]}}
    assert load_text("train_data", "owner/name:config", "train", "abc") == "a\n\nb"
    assert load_text("eval_data", "owner/name", "eval") == "c"
    assert asked == [("owner/name", "config", "abc"), ("owner/name", None, None)]


def test_validation_text_of_a_hub_dataset_stands_in_for_test_but_train_never_does(hub):
    splits = hub[1]
    splits |= {"train": {"text": ["a"]}, "validation": {"text": ["d"]}}
    assert load_text("eval_data", "owner/name", "eval") == "d"
    del splits["validation"]
    with pytest.raises(ValueError, match="^eval_data must have a test or validation split, owner/name has train$"):
        load_text("eval_data", "owner/name", "eval")


def test_a_hub_dataset_without_text_is_refused(hub):
    hub[1]["train"] = {"body": ["a"]}
    with pytest.raises(ValueError, match=r"^train_data must have a 'text' column, owner/name has \['body'\]$"):
        load_text("train_data", "owner/name", "train")


def test_without_the_network_a_hub_dataset_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"^train_data must be a dataset that can be reached, got owner/name: .*local file"):
        load_text("train_data", "owner/name", "train")
    with pytest.raises(ValueError, match=r"^train_data is not on this machine, and the hub is off"):
        resolve_corpus("train_data", "owner/name")


def test_overlap_of_training_and_evaluation_text(tmp_path):
    for name in ("train.txt", "test.txt", "other.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").touch()
    folder, train, test, other, plain = (str(tmp_path / name) for name in (".", "train.txt", "test.txt", "other.txt", "plain"))
    assert not splits_overlap(folder, folder)
    assert splits_overlap(train, train)
    assert splits_overlap(test, folder)
    assert not splits_overlap(train, folder)
    assert splits_overlap(plain, plain)
    assert splits_overlap(plain, f"{plain}/a.txt")
    assert splits_overlap(f"{plain}/../other.txt", other)
    assert not splits_overlap(PYTHON_DOCS, PYTHON_DOCS)
    assert not splits_overlap(WIKITEXT2, WIKITEXT2)


@pytest.mark.parametrize("kind", ["copy", "hard link", "symbolic link"])
def test_a_copy_of_the_training_text_is_not_held_out(tmp_path, kind):
    (tmp_path / "train").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "train" / name).write_text(f"the text of {name}" * 100_000)
    train, held_out = str(tmp_path / "train"), tmp_path / "held_out.txt"
    make = {"copy": shutil.copyfile, "hard link": os.link, "symbolic link": os.symlink}[kind]
    make(f"{train}/b.txt", held_out)
    with pytest.raises(ValueError, match=f"^eval_data must be other text than train_data, got {held_out}: give another file"):
        check_held_out("train_data", train, str(held_out))


def test_only_files_of_equal_size_are_read_to_tell_whether_they_are_copies(tmp_path, monkeypatch):
    read, sizes = [], {"train.txt": 10, "train2.txt": 20, "test.txt": 20, "test2.txt": 30, "train3.txt": 0, "test3.txt": 0}
    for name, size in sizes.items():
        (tmp_path / name).write_text(name[:2] * (size // 2))
    monkeypatch.setattr(corpus, "content_fingerprint", lambda file: (read.append(file.name), content_fingerprint(file))[1])
    check_held_out("train_data", str(tmp_path), str(tmp_path))
    assert sorted(read) == ["test.txt", "train2.txt"]


def test_a_tokens_folder_is_known_by_its_file(tmp_path):
    assert not is_tokens(str(tmp_path))
    with pytest.raises(ValueError, match="train_data must hold"):
        check_data("train_data", str(tmp_path))
    (tmp_path / "tokens.safetensors").touch()
    assert is_tokens(str(tmp_path))
    check_data("train_data", str(tmp_path))


def test_text_fingerprint_tells_texts_apart():
    assert text_fingerprint("a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert text_fingerprint("a") != text_fingerprint("a ")


def test_a_closed_folder_within_a_corpus_is_told(tmp_path, monkeypatch):
    (tmp_path / "texts" / "closed").mkdir(parents=True)
    (tmp_path / "texts" / "train.txt").write_text("text")
    scan = os.scandir

    def scandir(place):
        if str(place).endswith("closed"):  # root may look into any folder
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        check_corpus("train_data", str(tmp_path / "texts"))
