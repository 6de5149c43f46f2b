"""The mask file: its bits on disk, both forms, what is rejected, and the invariant that it stands for."""

import contextlib
import json
import os
import pickle
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from components.core.mask.file import MASK_FILE, OLD_MASK_FILE
from components.core.mask.integrity import SparsityError, enforce, integrity
from components.core.mask.mask import FORMAT, Mask, load_mask, pruned_count, save_mask
from components.core.mask.prunable import check_fits, weight_shapes
from tests.conftest import tiny_model


def random_mask(seed: int = 0, **shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) > 0.7 for name, shape in shapes.items()}


def half_mask() -> Mask:
    """Two tensors with exactly half of their weights kept."""
    kept = torch.arange(16).reshape(4, 4) % 2 == 0
    return Mask({"a.weight": kept, "b.weight": ~kept}, "unstructured", 0.5)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (4, 8), (2, 3, 5), (1, 1), (64, 33)])
def test_round_trip_of_every_size(tmp_path, shape):
    tensors = random_mask(weight=shape)
    save_mask(Mask(tensors), tmp_path / MASK_FILE)
    read = load_mask(tmp_path / MASK_FILE)
    assert list(read.tensors) == ["weight"]
    assert read.tensors["weight"].dtype == torch.bool
    assert torch.equal(read.tensors["weight"], tensors["weight"])


@pytest.mark.parametrize("value", [True, False])
def test_round_trip_of_all_kept_and_none_kept(tmp_path, value):
    save_mask(Mask({"w": torch.full((3, 7), value)}), tmp_path / MASK_FILE)
    assert torch.equal(load_mask(tmp_path / MASK_FILE).tensors["w"], torch.full((3, 7), value))


def test_round_trip_of_a_transposed_mask_keeps_row_major_order(tmp_path):
    kept = random_mask(w=(5, 3))["w"].T
    save_mask(Mask({"w": kept}), tmp_path / MASK_FILE)
    assert torch.equal(load_mask(tmp_path / MASK_FILE).tensors["w"], kept)


def test_one_bit_per_weight_on_disk(tmp_path):
    shapes = {"a": (1024, 512), "b": (3, 5)}
    save_mask(Mask(random_mask(**shapes)), tmp_path / MASK_FILE)
    with safe_open(tmp_path / MASK_FILE, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in shapes}
    assert {name: (tensor.dtype, tensor.numel()) for name, tensor in stored.items()} == {
        "a": (torch.uint8, 1024 * 512 // 8),
        "b": (torch.uint8, 2),
    }
    assert (tmp_path / MASK_FILE).stat().st_size < 1024 * 512 // 8 + 1024


def test_first_weight_is_the_lowest_bit_and_padding_is_zero(tmp_path):
    kept = torch.tensor([[True, False, False, True, False], [False, False, False, True, True]])
    save_mask(Mask({"w": kept}), tmp_path / MASK_FILE)
    with safe_open(tmp_path / MASK_FILE, framework="pt") as file:
        assert file.get_tensor("w").tolist() == [0b00001001, 0b00000011]


def test_metadata_tells_shapes_pattern_and_sparsity(tmp_path):
    save_mask(Mask(random_mask(a=(3, 5), b=(8,)), "2:4", 0.5), tmp_path / MASK_FILE)
    with safe_open(tmp_path / MASK_FILE, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == FORMAT
    assert metadata["pattern"] == "2:4"
    assert json.loads(metadata["sparsity"]) == 0.5
    assert json.loads(metadata["shapes"]) == {"a": [3, 5], "b": [8]}
    read = load_mask(tmp_path / MASK_FILE)
    assert (read.pattern, read.sparsity) == ("2:4", 0.5)


def test_uneven_sparsity_is_kept_by_name_and_checked_by_name(tmp_path):
    kept = {"a": torch.tensor([[True, False, False, False]]), "b": torch.ones(2, 4, dtype=torch.bool)}
    save_mask(Mask(kept, sparsity={"a": 0.75, "b": 0.0}), tmp_path / MASK_FILE)
    read = load_mask(tmp_path / MASK_FILE)
    assert read.sparsity == {"a": 0.75, "b": 0.0}
    weights = {name: mask.float() for name, mask in kept.items()}
    assert integrity(weights, read)["passed"]
    assert integrity(weights, read.only(["b"]))["passed"]
    wrong = Mask(read.tensors, sparsity={"a": 0.5, "b": 0.0})
    assert integrity(weights, wrong)["tensors"] == {"a": {"pruned": 3, "asked_for": 2}}


def test_a_sparsity_that_some_tensors_lack_is_refused(tmp_path):
    save_mask(Mask(random_mask(a=(3, 5), b=(8,)), sparsity={"a": 0.7}), tmp_path / MASK_FILE)
    with pytest.raises(ValueError, match="^mask_file must have a sparsity for each of its 2 tensors, got 1"):
        load_mask(tmp_path / MASK_FILE)


def test_a_mask_file_is_readable_by_others(tmp_path):
    umask = os.umask(0o022)
    try:
        save_mask(half_mask(), tmp_path / MASK_FILE)
    finally:
        os.umask(umask)
    assert (tmp_path / MASK_FILE).stat().st_mode & 0o777 == 0o644


def test_saving_leaves_nothing_beside_the_mask(tmp_path):
    save_mask(half_mask(), tmp_path / MASK_FILE)
    assert [file.name for file in tmp_path.iterdir()] == [MASK_FILE]


def test_fingerprint_changes_with_one_bit_name_or_shape():
    tensors = random_mask(a=(3, 5), b=(4, 4))
    original = Mask(tensors).fingerprint()
    assert Mask({name: tensors[name].clone() for name in ("b", "a")}).fingerprint() == original
    for position in range(15):
        flipped = tensors["a"].clone()
        flipped.view(-1)[position] ^= True
        assert Mask({**tensors, "a": flipped}).fingerprint() != original
    assert Mask({"c": tensors["a"], "b": tensors["b"]}).fingerprint() != original
    assert Mask({"a": tensors["a"].reshape(5, 3), "b": tensors["b"]}).fingerprint() != original


def test_realised_sparsity_counts_all_tensors_together():
    mask = Mask({"a": torch.tensor([True, False, False, False]), "b": torch.ones(12, dtype=torch.bool)})
    assert mask.realised_sparsity() == 3 / 16


@pytest.mark.parametrize(
    ("sparsity", "numel", "count"), [(0.0, 7, 0), (0.7, 10, 7), (0.5, 5, 3), (0.7, 4096, 2867), (0.99, 10, 10)]
)
def test_pruned_count_rounds_to_the_nearest(sparsity, numel, count):
    assert pruned_count(sparsity, numel) == count


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_old_form_is_read(tmp_path, zipped):
    tensors = random_mask(a=(3, 5), b=(4, 4))
    torch.save(tensors, tmp_path / OLD_MASK_FILE, _use_new_zipfile_serialization=zipped)
    read = load_mask(tmp_path / OLD_MASK_FILE)
    assert read.sparsity is None
    assert {name: tensor.tolist() for name, tensor in read.tensors.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_folder_gives_the_new_form_first_then_the_old(tmp_path):
    torch.save({"old": torch.ones(3, dtype=torch.bool)}, tmp_path / OLD_MASK_FILE)
    assert list(load_mask(tmp_path).tensors) == ["old"]
    save_mask(Mask({"new": torch.ones(3, dtype=torch.bool)}), tmp_path / MASK_FILE)
    assert list(load_mask(tmp_path).tensors) == ["new"]


class RunsCode:
    """Unpickling this creates a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("container", ["pickle", "zip", "legacy", "entry"])
def test_code_in_an_old_mask_is_refused_and_not_run(tmp_path, container):
    trace, file = tmp_path / "trace", tmp_path / OLD_MASK_FILE
    content = {"a": torch.ones(2, dtype=torch.bool), "b": RunsCode(trace)} if container == "entry" else RunsCode(trace)
    if container == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=container != "legacy")
    with pytest.raises(ValueError, match="mask_file must be a dictionary of bool tensors"):
        load_mask(file)
    assert not trace.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(file, weights_only=False)
    assert trace.exists()  # the file really is harmful


@pytest.mark.parametrize(
    "content",
    [{}, [1, 2], torch.ones(2, dtype=torch.bool), {"a": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.uint8)}, {"a": 1}],
    ids=["empty", "list", "tensor", "float", "uint8", "number"],
)
def test_old_form_of_other_content_is_refused(tmp_path, content):
    torch.save(content, tmp_path / OLD_MASK_FILE)
    with pytest.raises(ValueError, match="mask_file must be a dictionary of bool tensors"):
        load_mask(tmp_path / OLD_MASK_FILE)


def test_truncated_mask_is_refused_at_every_length(tmp_path):
    save_mask(half_mask(), tmp_path / MASK_FILE)
    whole = (tmp_path / MASK_FILE).read_bytes()
    for length in range(len(whole)):
        (tmp_path / MASK_FILE).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="mask_file must be a safetensors file"):
            load_mask(tmp_path / MASK_FILE)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_old_mask_is_refused_at_every_length(tmp_path, zipped):
    torch.save(half_mask().tensors, tmp_path / OLD_MASK_FILE, _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / OLD_MASK_FILE).read_bytes()
    for length in range(0, len(whole), 5 if zipped else 1):
        (tmp_path / OLD_MASK_FILE).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="mask_file"):
            load_mask(tmp_path / OLD_MASK_FILE)


@pytest.mark.parametrize("name", [MASK_FILE, OLD_MASK_FILE])
def test_garbage_is_refused(tmp_path, name):
    random_bytes = random.Random(0)
    for _ in range(300):
        (tmp_path / name).write_bytes(random_bytes.randbytes(random_bytes.randrange(1, 200)))
        with pytest.raises(ValueError, match="mask_file"):
            load_mask(tmp_path / name)


def test_missing_file_and_folder_without_mask_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.safetensors"):
        with pytest.raises(ValueError, match="mask_file must be a sparsity_mask.safetensors or a folder that holds one"):
            load_mask(path)


def test_safetensors_of_another_kind_is_refused(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / MASK_FILE)
    with pytest.raises(ValueError, match=f"mask_file must have format '{FORMAT}' in its metadata, got None"):
        load_mask(tmp_path / MASK_FILE)


METADATA = {"format": FORMAT, "pattern": "unstructured", "sparsity": "0.5", "shapes": '{"w": [2, 8]}'}


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": '{"w": [2, 9]}'},
        {"shapes": '{"v": [2, 8]}'},
        {"shapes": '{"w": [2, 8], "v": [2, 8]}'},
        {"shapes": None},
        {"pattern": "4:2"},
        {"pattern": None},
        {"sparsity": None},
    ],
    ids=["other shape", "other name", "a tensor less", "no shapes", "impossible pattern", "no pattern", "no sparsity"],
)
def test_contradicting_metadata_is_refused(tmp_path, change):
    metadata = {key: value for key, value in {**METADATA, **change}.items() if value is not None}
    save_file({"w": torch.zeros(2, dtype=torch.uint8)}, tmp_path / MASK_FILE, metadata)
    with pytest.raises(ValueError, match="mask_file|pattern"):
        load_mask(tmp_path / MASK_FILE)


def test_check_fits_names_what_does_not_fit():
    mask = Mask({"a.weight": torch.ones(4, 8, dtype=torch.bool)})
    check_fits(mask, {"a.weight": [4, 8], "other": [3]})
    with pytest.raises(ValueError, match="it masks a.weight, which the model does not have"):
        check_fits(mask, {"other": [3]})
    with pytest.raises(ValueError, match=r"a\.weight is \[8, 4\] there and \[4, 8\] in the mask"):
        check_fits(mask, {"a.weight": [8, 4]})
    with pytest.raises(ValueError, match="mask_file must mask at least one tensor, got none"):
        check_fits(Mask({}), {"a.weight": [4, 8]})


def test_weight_shapes_of_a_model_fit_a_mask_of_its_linears():
    model = tiny_model()
    name = "model.layers.1.mlp.up_proj.weight"
    assert weight_shapes(model)[name] == [128, 64]
    check_fits(Mask({name: torch.ones(128, 64, dtype=torch.bool)}), weight_shapes(model))


def masked_weights(mask: Mask) -> dict[str, torch.Tensor]:
    return {name: kept.float() for name, kept in mask.tensors.items()}


def test_integrity_passes_on_zeros_and_reports_the_sparsity():
    mask = half_mask()
    assert integrity(masked_weights(mask), mask) == {
        "passed": True,
        "sparsity": 0.5,
        "violations": 0,
        "max_abs": 0.0,
        "eps": 0.0,
        "tensors": {},
    }
    enforce(integrity(masked_weights(mask), mask))


def test_integrity_passes_where_a_kept_weight_is_zero():
    mask = half_mask()
    assert integrity({name: torch.zeros(4, 4) for name in mask.tensors}, mask)["passed"]


def test_integrity_counts_violations_and_names_the_tensor():
    mask = half_mask()
    weights = masked_weights(mask)
    weights["b.weight"][0, 0] = -0.25
    weights["b.weight"][0, 2] = 1e-30
    found = integrity(weights, mask)
    assert not found["passed"]
    assert (found["violations"], found["max_abs"]) == (2, 0.25)
    assert found["tensors"] == {"b.weight": {"violations": 2, "max_abs": 0.25}}
    with pytest.raises(SparsityError, match=r"2 weights are not \(largest 0\.25\), in 1 tensors, the worst being b\.weight"):
        enforce(found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_integrity_finds_what_is_not_finite(value):
    mask = half_mask()
    weights = masked_weights(mask)
    weights["a.weight"][0, 1] = value
    found = integrity(weights, mask, eps=1.0)
    assert found["violations"] == 1
    assert list(found["tensors"]) == ["a.weight"]
    json.dumps(found, allow_nan=False)
    with pytest.raises(SparsityError, match="a.weight"):
        enforce(found)


def test_integrity_eps_is_the_largest_allowed_magnitude():
    mask = half_mask()
    weights = masked_weights(mask)
    weights["a.weight"][0, 1] = 0.5
    assert integrity(weights, mask, eps=0.5)["passed"]
    assert not integrity(weights, mask, eps=0.49)["passed"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_integrity_reads_quantized_data(dtype):
    mask = half_mask()
    weights = {name: weight.to(dtype) for name, weight in masked_weights(mask).items()}
    assert integrity(weights, mask)["passed"]
    weights["a.weight"] = torch.ones(4, 4).to(dtype)
    assert integrity(weights, mask)["violations"] == 8


def test_integrity_finds_a_wrong_sparsity():
    kept = torch.zeros(4, 4, dtype=torch.bool)
    kept[0] = True
    mask = Mask({"a.weight": kept}, sparsity=0.5)
    found = integrity({"a.weight": torch.zeros(4, 4)}, mask)
    assert not found["passed"]
    assert found["tensors"] == {"a.weight": {"pruned": 12, "asked_for": 8}}
    with pytest.raises(SparsityError, match=r"a\.weight: \{'pruned': 12, 'asked_for': 8\}"):
        enforce(found)
    assert integrity({"a.weight": torch.zeros(4, 4)}, Mask(mask.tensors))["passed"]  # no sparsity was requested
