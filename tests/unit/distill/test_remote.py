"""Checkpoints in a bucket: training goes on from them in a new pod, whatever the bucket does meanwhile."""

import re
import shutil
import signal
import threading

import pytest
import torch

from components.core import retry, storage
from components.core.storage.place import open_store
from components.distill import remote, resume
from components.distill.remote import RemoteCheckpoints
from tests.faulty_server import in_front_of
from tests.stores import place_of
from tests.unit.distill.test_distill import curve, pruned, settings, trainer  # noqa: F401 (a fixture)

STEPS = 8


@pytest.fixture(autouse=True)
def usual_handler():
    """Training leaves its handler of SIGTERM behind."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(params=["gs", "s3"])
def place(request, connect, tmp_path):
    connect(request.param)
    return place_of(request.param, tmp_path)


@pytest.fixture
def begin(pruned, corpus, tmp_path, place):  # noqa: F811
    """A function that prepares a run of 8 steps with a checkpoint after each, on a new disk each time."""
    made = []

    def make(**changes):
        plain = {"max_steps": STEPS, "checkpoint_dir": place, "checkpoint_steps": 1}
        made.append(trainer(pruned, corpus, tmp_path, **(plain | changes)))
        return made[-1]

    yield make
    for run in made:
        run.remote.close()


@pytest.fixture
def slow_steps(monkeypatch):
    """Steps take longer than uploads, as in practice."""
    plain = RemoteCheckpoints.is_busy

    def is_busy(self):
        if self.thread.ident:
            self.thread.join()
        return plain(self)

    monkeypatch.setattr(RemoteCheckpoints, "is_busy", is_busy)


@pytest.fixture
def undisturbed(pruned, corpus, tmp_path):  # noqa: F811
    """A run without checkpoints."""
    run = trainer(pruned, corpus, tmp_path, max_steps=STEPS)
    run.fit()
    return run


def check_same(run, other):
    assert curve(run.progress) == curve(other.progress)
    for left, right in zip(run.backend.student.parameters(), other.backend.student.parameters(), strict=True):
        assert torch.equal(left, right)


def lose(run, after):
    """Train until a step and lose the pod: what is on its disk and in its memory is gone."""
    plain = run.step

    def step(rows):
        if len(run.progress.steps) == after:
            raise ConnectionAbortedError("the pod is gone")
        return plain(rows)

    run.step = step
    with pytest.raises(ConnectionAbortedError):
        run.fit()
    run.remote.thread.join()
    shutil.rmtree(run.remote.folder)


def whole(place):
    """The steps of the whole checkpoints in a bucket."""
    return sorted(int(match[1]) for name in open_store(place).list() if (match := re.search(r"step-(\d+)/manifest", name)))


@pytest.mark.parametrize("after", [1, 5, STEPS - 1])
def test_a_new_pod_goes_on_from_the_newest_checkpoint(begin, undisturbed, place, after, slow_steps, capfd):
    lose(begin(), after)
    assert whole(place) == [step for step in (after - 1, after) if step]
    run = begin()
    run.fit()
    assert f"step-{after:08d}" in re.search(r"^resuming from (.*)$", capfd.readouterr().out, re.MULTILINE)[1]
    check_same(run, undisturbed)
    run.remote.thread.join()
    assert whole(place) == [STEPS - 1, STEPS]


def ruin_manifest(store, names):
    store.write(next(name for name in names if name.endswith("manifest.json")), b"{}")


def shorten(store, names):
    store.write(next(name for name in names if name.endswith(".distcp")), b"short")


def remove_one(store, names):
    store.delete([next(name for name in names if name.endswith(".distcp"))])


def remove_manifest(store, names):
    store.delete([next(name for name in names if name.endswith("manifest.json"))])


@pytest.mark.parametrize("damage", [ruin_manifest, shorten, remove_one, remove_manifest])
def test_a_damaged_checkpoint_is_passed_over(begin, undisturbed, place, slow_steps, capfd, damage):
    lose(begin(), 5)
    store = open_store(place)
    damage(store, [name for name in store.list() if "/step-00000005/" in name])
    run = begin()
    run.fit()
    printed = capfd.readouterr().out
    assert ("skipped a damaged checkpoint" in printed) == (damage is not remove_manifest)  # that one was never complete
    assert re.search(r"^resuming from \S+/step-00000004$", printed, re.MULTILINE)
    check_same(run, undisturbed)


def test_another_training_has_another_key(begin, place, slow_steps, capfd):
    lose(begin(), 3)
    before = set(open_store(place).list())
    begin(alpha_kd=0.2).fit()
    assert "resuming from" not in capfd.readouterr().out
    assert before <= set(open_store(place).list())


def test_two_pods_of_one_training_do_not_disturb_each_other(begin, undisturbed, place, slow_steps):
    """The first is thought dead and writes on."""
    first, second = begin(), begin()
    threads = [threading.Thread(target=run._steps().__next__) for run in (first, second)]
    for thread in threads:
        thread.start()
        thread.join()
    for run in (first, second):
        run._save(1, ending=True)
    third = begin()
    third.fit()
    check_same(third, undisturbed)


def test_sigterm_leaves_a_checkpoint_of_the_step_that_was_taken(begin, undisturbed, place, slow_steps):
    run = begin(checkpoint_steps=100)
    plain = run.step

    def step(rows):
        if len(run.progress.steps) == 4:
            signal.raise_signal(signal.SIGTERM)
        return plain(rows)

    run.step = step
    with pytest.raises(SystemExit) as end:
        run.fit()
    assert end.value.code == 143
    assert whole(place) == [5]
    shutil.rmtree(run.remote.folder)
    again = begin(checkpoint_steps=100)
    again.fit()
    check_same(again, undisturbed)


def test_training_does_not_wait_for_a_slow_bucket(begin, undisturbed, place, monkeypatch, capfd):
    free = threading.Event()
    plain = RemoteCheckpoints._wait_for_others

    def wait(self, name, sizes):
        free.wait()
        plain(self, name, sizes)

    monkeypatch.setattr(RemoteCheckpoints, "_wait_for_others", wait)
    monkeypatch.setattr(remote, "END_PATIENCE", 0.1)
    run = begin()
    run.fit()
    printed = capfd.readouterr().out
    assert "no checkpoint at step 5, since the one before is still being uploaded" in printed
    check_same(run, undisturbed)
    free.set()
    run.remote.thread.join()
    assert whole(place) == [1]


def test_a_missing_bucket_is_told_before_the_work(connect, pruned, corpus, tmp_path):  # noqa: F811
    connect("s3")
    with pytest.raises(ValueError, match="checkpoint_dir must be a place that can be written, got s3://no-bucket/x: .* bucket"):
        settings(pruned, corpus, tmp_path / "out", checkpoint_dir="s3://no-bucket/x").check_environment()


def test_the_checkpoints_of_a_folder_and_of_a_bucket_are_the_same(begin, place, tmp_path, slow_steps):
    """A run can be taken from the one to the other by copying."""
    run = begin()
    lose(run, 3)
    (name,) = {name.rpartition("/step-")[0] for name in open_store(place).list()}
    storage.download_artifact(f"{place}/{name}", tmp_path / "copy")
    assert [path.name for path in resume.checkpoints(tmp_path / "copy")] == ["step-00000002", "step-00000003"]


def for_the_first(times, fault):
    """A fault of the first requests that write."""
    left = iter(range(times))
    return lambda method, *_: fault if method in ("PUT", "POST") and next(left, None) is not None else None


def gone(*_):
    return "reset"


@pytest.mark.parametrize(
    ("fault", "times"), [(429, 3), (500, 3), (503, 3), ("reset", 3), (2.0, 2)], ids=["429", "500", "503", "reset", "slow"]
)
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_bucket_that_fails_now_and_then_gets_every_checkpoint(
    begin, undisturbed, place, servers, connect, slow_steps, capfd, fault, times
):
    with in_front_of(servers["s3"]) as server:
        connect("s3", server.url)
        server.fault = for_the_first(times, fault)
        run = begin(checkpoint_steps=4)
        run.fit()
        run.remote.thread.join()
    assert "could not be uploaded" not in capfd.readouterr().out
    connect("s3")
    assert whole(place) == [4, 8]
    check_same(run, undisturbed)


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_bucket_that_is_gone_for_a_while_gets_the_next_checkpoint(
    begin, undisturbed, place, servers, connect, slow_steps, monkeypatch, capfd
):
    monkeypatch.setattr(retry, "TRIES", 2)
    with in_front_of(servers["s3"]) as server:
        connect("s3", server.url)
        run = begin(checkpoint_steps=4)
        plain = run.step

        def step(rows):
            if len(run.progress.steps) == 3:
                server.fault = gone
            if len(run.progress.steps) == 7:
                run.remote.thread.join()
                server.fault = lambda *_: None
            return plain(rows)

        run.step = step
        run.fit()
        run.remote.thread.join()
    assert "checkpoint step-00000004 could not be uploaded, training goes on: s3://" in capfd.readouterr().out
    connect("s3")
    assert whole(place) == [8]
    check_same(run, undisturbed)


def test_a_full_disk_costs_a_checkpoint_and_not_the_training(begin, undisturbed, place, slow_steps, monkeypatch, capfd):
    plain = resume.save

    def save(backend, config, step, *args, **options):
        if step == 4:
            raise OSError(28, "No space left on device")
        plain(backend, config, step, *args, **options)

    monkeypatch.setattr(resume, "save", save)
    run = begin(checkpoint_steps=4)
    run.fit()
    run.remote.thread.join()
    assert "no checkpoint at step 4, training goes on: [Errno 28] No space left on device" in capfd.readouterr().out
    assert whole(place) == [8]
    check_same(run, undisturbed)


def test_a_checkpoint_that_one_machine_cannot_upload_does_not_keep_the_next_ones_waiting(begin, place, monkeypatch, capfd):
    run = begin(checkpoint_steps=4)
    monkeypatch.setattr(
        run.remote, "_wait_for_others", lambda name, _: RemoteCheckpoints._wait_for_others(run.remote, name, {"x": 1})
    )
    run._steps().__next__()
    run._save(1, ending=False)
    assert run.remote.is_busy()
    run.remote.failed = True  # as on the machine that cannot
    assert not run.remote.is_busy()
    assert "could not be uploaded, training goes on: another machine has not uploaded x" in capfd.readouterr().out
    assert whole(place) == []


def test_the_local_disk_holds_no_checkpoint_that_is_in_the_bucket(begin, place, slow_steps):
    lose(begin(), 3)
    run = begin()
    run.fit()
    run.remote.thread.join()
    assert list(run.remote.folder.glob("step-*")) == []
