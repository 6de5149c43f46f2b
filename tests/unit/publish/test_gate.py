"""The gate: the record's numbers, every limit, every model; unknown values do not pass."""

import pytest

from components.publish.gate import check_gate, read_candidate
from tests.unit.publish.conftest import DENSE, INT8, save_model


def candidate(tmp_path, **changes):
    return read_candidate(save_model(tmp_path / "model", **changes))


def test_the_numbers_are_those_of_the_history(tmp_path):
    found = candidate(tmp_path)
    assert (found.name, found.perplexity, found.dense_perplexity, found.sparsity) == ("int8", INT8, DENSE, 0.7)
    assert found.ppl_ratio() == INT8 / DENSE
    assert found.source == {"model_id": "some/model", "revision": "abc"}


def test_a_limit_that_is_met_exactly_passes(tmp_path):
    check_gate([candidate(tmp_path)], INT8 / DENSE, 0.7)


def test_a_model_pruned_to_whole_weights_meets_its_sparsity(tmp_path):
    """SmolLM2-135M pruned to 0.7 has a sparsity of 0.6999995."""
    check_gate([candidate(tmp_path, sparsity=0.699999491373698)], 0, 0.7)


def test_every_failure_of_every_model_is_reported_together(tmp_path):
    good = candidate(tmp_path / "good")
    worse = candidate(tmp_path / "worse", format="fp8", perplexity=60.0, sparsity=0.699)
    denser = candidate(tmp_path / "denser", format="int4", sparsity=0.5)
    with pytest.raises(ValueError, match="the gate failed") as failed:
        check_gate([good, worse, denser], 2.5, 0.7)
    assert str(failed.value) == (
        "nothing is published, the gate failed; "
        "fp8: perplexity over dense must be at most max_ppl_ratio 2.5, got 3.0000 (60.0000 over 20.0000); "
        "fp8: sparsity must be at least min_sparsity 0.7, got 0.699; "
        "int4: sparsity must be at least min_sparsity 0.7, got 0.5"
    )


UNKNOWN = {
    "skip_ppl_eval": {"perplexity": None, "dense": None, "text": None, "dense_text": None},
    "no perplexity": {"perplexity": None},
    "no dense perplexity": {"dense": None},
    "another text": {"dense_text": "e" * 64},
    "no text": {"text": None, "dense_text": None},
    "zero dense": {"dense": 0.0},
    "negative": {"perplexity": -1.0},
    "text for a number": {"perplexity": "2.0"},
}


@pytest.mark.parametrize("changes", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_perplexity_fails_a_limit_and_only_a_limit(tmp_path, changes):
    found = candidate(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"int8: perplexity .* max_ppl_ratio 100, and the .*model's perplexity.* not measured"):
        check_gate([found], 100, 0)
    check_gate([found], 0, 0.7)


@pytest.mark.parametrize("changes", [{"sparsity": None}, {"passed": False}], ids=["not measured", "integrity check failed"])
def test_an_unknown_sparsity_fails_a_limit_and_only_a_limit(tmp_path, changes):
    found = candidate(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"int8: sparsity .* min_sparsity 0.1, and no sparsity was measured that holds"):
        check_gate([found], 0, 0.1)
    check_gate([found], 3, 0)


@pytest.mark.parametrize(
    "history",
    [
        "[]",
        "{}",
        '{"format": 1, "source": {"model_id": "a", "revision": null}, "steps": []}',
        '{"format": 1, "source": {}, "steps": []}',
    ],
)
def test_a_history_of_another_kind_is_refused_by_name(tmp_path, history):
    (tmp_path / "compression.json").write_text(history)
    with pytest.raises(ValueError, match=f"{tmp_path}/compression.json must (be JSON of its form|list at least one step)"):
        read_candidate(str(tmp_path))


def test_a_format_that_would_leave_the_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match="format must be lower-case letters"):
        candidate(tmp_path, format="../latest")
