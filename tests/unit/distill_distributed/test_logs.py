"""What of a node's log is shown: of tracebacks that only tell of another node's loss, one line."""

import pytest

from components.distill_distributed.logs import folded

TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "<frozen runpy>", line 88, in _run_code',
    "    work.wait()",
    "    ^^^^^^",
]
GLOO = "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.77.0.2]:13507."
NCCL = "torch.distributed.DistBackendError: NCCL error, remote process exited or there was a network error"
STORE = "torch.distributed.DistNetworkError: Failed to recv, got 0 bytes. Did the remote server shutdown or crash?"
RENDEZVOUS = "torch.distributed.elastic.rendezvous.api.RendezvousConnectionError: The connection to the C10d store has failed."
CHILD = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:"
SUMMARY = [
    "=" * 60,
    "components.distill FAILED",
    "-" * 60,
    "Failures:",
    "  <NO_OTHER_FAILURES>",
    "[0]:",
    "  exitcode  : 1",
    "=" * 60,
]
WARNING = "[W1124 TCPStore.cpp:106] [c10d] sendBytes failed on SocketImpl(fd=3): Broken pipe"
FRAMES = [
    "Exception raised from sendBytes at /pytorch/torch/csrc/distributed/c10d/Utils.hpp:758 (most recent call first):",
    "frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x9d (0x7f6a in /torch/lib/libc10.so)",
    "<omitting python frames>",
    "frame #33: _start + 0x21 (0x55d90 in python)",
]
LEFT_OUT = "(traceback of 4 lines left out)"


def fold(lines: list[str]) -> list[str]:
    """Fold lines that have times, as those of Kubernetes have; return them without."""
    return [line.removeprefix("2026-01-01T00:00:00Z ") for line in folded([f"2026-01-01T00:00:00Z {line}" for line in lines])]


@pytest.mark.parametrize("error", [GLOO, NCCL, STORE, RENDEZVOUS])
def test_the_traceback_of_a_lost_neighbour_is_one_line(error):
    assert fold(["step 1", *TRACEBACK, error, "step 2"]) == ["step 1", f"{error} {LEFT_OUT}", "step 2"]


def test_torchruns_own_traceback_and_summary_are_one_line():
    lines = ["E1124 failed (exitcode: 1) local_rank: 0", *TRACEBACK, f"{CHILD} ", *SUMMARY, "after"]
    assert fold(lines) == [lines[0], f"{CHILD} {LEFT_OUT}", "after"]


def test_a_traceback_of_torchruns_without_a_summary_hides_no_line():
    assert fold([*TRACEBACK, CHILD, "after", "=" * 60, "text"]) == [f"{CHILD} {LEFT_OUT}", "after", "=" * 60, "text"]


def test_a_chain_of_tracebacks_is_one_line_each():
    chain = ["", "The above exception was the direct cause of the following exception:", ""]
    assert fold([*TRACEBACK, STORE, *chain, *TRACEBACK, RENDEZVOUS]) == [f"{STORE} {LEFT_OUT}", f"{RENDEZVOUS} {LEFT_OUT}"]


def test_frames_of_another_language_are_left_out():
    assert fold([WARNING, *FRAMES, "after"]) == [WARNING, "after"]


def test_the_mixed_tracebacks_of_several_processes_are_told_apart():
    own = "torch.OutOfMemoryError: CUDA out of memory"
    first, second = ([f"[rank{rank}]: {line}" for line in [*TRACEBACK, error]] for rank, error in enumerate((GLOO, own)))
    mixed = [line for pair in zip(first, second, strict=True) for line in pair]
    assert fold(mixed) == [f"[rank0]: {GLOO} {LEFT_OUT}", *second]


@pytest.mark.parametrize(
    "lines",
    [
        [*TRACEBACK, "KeyError: 'weight'", "", "During handling of the above exception, another exception occurred:", ""],
        [*TRACEBACK, "OSError: Connection closed by peer"],
        TRACEBACK,
        ["", "  indented", "", "=" * 60, "text"],
        [],
    ],
    ids=["own-fault", "of-a-bucket", "cut", "plain", "empty"],
)
def test_anything_else_is_shown_as_it_is(lines):
    assert fold(lines) == lines
