"""Time to move a checkpoint to gs:// and back, compared with one stream: one file after another by the client library.

    python tests/benchmarks/storage.py --shards 8 --megabytes 250 --repeats 3

The store is tests/gcs_server.py in separate processes, on loopback and on the same disk. It is measured twice: without a
limit, where client and server share this machine's cores and nothing waits, and with a limit of `--stream_limit` megabytes
per second for each connection, as with a remote store. Both ways take turns on the same bytes, and what comes back is
compared. Exits with 1 if, with the limit, the round trip takes more than 0.6 times as long as one stream. Without the limit,
the table shows how many cores were busy, and thus how much could still be gained.
"""

import argparse
import filecmp
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from google.cloud.storage import Client

from components.core import storage

GOAL = 0.6
SERVER = Path(__file__).parents[1] / "gcs_server.py"
STEPS = ("upload", "download")


def busy() -> float:
    """CPU seconds used by all cores together since boot."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own() -> float:
    """CPU seconds used by this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def timed(work: Callable[[], None]) -> tuple[float, float, float]:
    """Seconds that `work` takes, and how many cores the machine and this process keep busy meanwhile."""
    os.sync()  # so that earlier writes do not count here
    start, machine, client = time.perf_counter(), busy(), own()
    work()
    seconds = time.perf_counter() - start
    return seconds, (busy() - machine) / seconds, (own() - client) / seconds


def one_stream(source: Path, target: Path) -> dict[str, Callable[[], None]]:
    """The naive way: one file after another."""
    bucket = Client(project=None).bucket("bucket")
    names = sorted(path.name for path in source.iterdir())

    def upload() -> None:
        for name in names:
            bucket.blob(f"one-stream/{name}").upload_from_filename(str(source / name))

    def download() -> None:
        target.mkdir()
        for name in names:
            bucket.blob(f"one-stream/{name}").download_to_filename(str(target / name))

    return {"upload": upload, "download": download}


def parallel(source: Path, target: Path) -> dict[str, Callable[[], None]]:
    """This project's way, including checksums on both sides."""
    place = "gs://bucket/parallel"

    def upload() -> None:
        storage.remove(place)
        storage.upload(source, place)

    return {"upload": upload, "download": lambda: storage.download(place, target)}


def compare(source: Path, folder: Path, repeats: int, limit: float) -> float:
    """Run both ways in turn against a new server and print a table; return the ratio of their round-trip times."""
    (folder / "store" / "bucket").mkdir(parents=True)
    line = [sys.executable, str(SERVER), str(folder / "store"), *([str(limit)] if limit else [])]
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            os.environ["STORAGE_EMULATOR_HOST"] = server.stdout.readline().strip()
            for _ in range(repeats):
                for way in (one_stream, parallel):
                    target = folder / "back"
                    for step, work in way(source, target).items():
                        found.setdefault((way.__name__, step), []).append(timed(work))
                    names = [path.name for path in source.iterdir()]
                    assert filecmp.cmpfiles(source, target, names, shallow=False)[0] == names, "what came back differs"
                    shutil.rmtree(target)
        finally:
            server.terminate()
    shutil.rmtree(folder / "store")
    size = sum(path.stat().st_size for path in source.iterdir()) / 1e6
    title = f"{limit:.0f} MB/s a connection" if limit else "no limit"
    print(f"\n{title:24}{'time, s':>10}{'MB/s':>10}{'busy cores':>12}{'of client':>12}")
    total = dict.fromkeys(("one_stream", "parallel"), 0.0)
    for (way, step), runs in found.items():
        seconds, machine, client = (statistics.median(values) for values in zip(*runs, strict=True))
        total[way] += seconds
        print(f"{f'{way}, {step}':24}{seconds:10.2f}{size / seconds:10.0f}{machine:12.2f}{client:12.2f}")
    ratio = total["parallel"] / total["one_stream"]
    print(f"{'there and back':24}{total['parallel']:10.2f} / {total['one_stream']:.2f} = {ratio:.2f}")
    return ratio


def main() -> None:
    """Parse the command line, write a checkpoint of random bytes, and compare with and without a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("shards", 8), ("megabytes", 250), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--stream_limit", type=float, default=100, help="megabytes a second a connection")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "source").mkdir()
        for shard in range(arguments.shards):
            with (folder / "source" / f"model-{shard + 1:05}.safetensors").open("wb") as file:
                for _ in range(arguments.megabytes):
                    file.write(os.urandom(10**6))
        print(f"{arguments.shards} shards of {arguments.megabytes} MB, {os.cpu_count()} cores, median of {arguments.repeats}")
        compare(folder / "source", folder, arguments.repeats, 0)
        ratio = compare(folder / "source", folder, arguments.repeats, arguments.stream_limit)
    print(f"with the limit {ratio:.2f}, goal {GOAL}")
    raise SystemExit(0 if ratio <= GOAL else 1)


if __name__ == "__main__":
    main()
