"""What users are told: one line, limited, without secrets, whatever a library raised."""

import pytest

from components.core.errors import LINE, one_line, readable, shown


def test_a_text_becomes_one_line_with_its_ends():
    line = one_line("begins here\n\t" + "x" * 10_000 + " ends here")
    assert len(line) == LINE
    assert line.startswith("begins here xxx")
    assert line.endswith("xxx ends here")
    assert one_line("a\n b") == "a b"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("model hf_abcdefghijkl is", "model *** is"),
        ("https://host/x?token=abc&y=1", "https://host/x?token=***&y=1"),
        ("https://me:pass@host/x", "https://***@host/x"),
        ("https:/me:pass@host/x", "https:/***@host/x"),
        ("s3://b?X-Amz-Signature=abc", "s3://b?X-Amz-Signature=***"),
        ("AWS_SECRET_ACCESS_KEY=abc", "AWS_SECRET_ACCESS_KEY=***"),
        ("owner/model@main", "owner/model@main"),
        ("hf_transfer", "hf_transfer"),
        ("key=value", "key=***"),
    ],
)
def test_secrets_are_masked(text, masked):
    assert one_line(text) == masked


def test_a_value_is_shortened_and_quoted():
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 1000)) == 120


class Panic(BaseException):
    """Like that of PyO3, which is no Exception."""


@pytest.mark.parametrize("raised", [KeyError("a"), RecursionError(), Panic("b"), OSError("no number"), MemoryError()])
def test_whatever_a_library_raises_is_a_value_error(raised):
    with pytest.raises(ValueError, match="the file must be good: "), readable("the file must be good"):
        raise raised


@pytest.mark.parametrize("raised", [PermissionError(13, "denied"), OSError(28, "full"), KeyboardInterrupt(), SystemExit(143)])
def test_an_error_of_the_system_and_an_end_stay_what_they_are(raised):
    with pytest.raises(type(raised)), readable("the file must be good"):
        raise raised
