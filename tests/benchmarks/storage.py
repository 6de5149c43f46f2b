"""Time to move a checkpoint to gs:// and back, against one stream: one file after the other by the client library.

    python tests/benchmarks/storage.py --shards 8 --megabytes 250 --repeats 3

The store is tests/gcs_server.py in processes of its own, on loopback and on the same disk. It is measured twice: with no
limit, where client and server share the cores of this machine and nothing waits, and with `--stream_limit` megabytes a
second a connection, as a store that is far away has. Both ways run in turn on the same bytes; what came back is compared.
Exits with 1 if moving there and back takes more than 0.6 of the time of one stream, with the limit; without it the table
tells how many cores were busy, and so what is left to win.
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
    """Seconds that all cores together worked since the start of the machine."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own() -> float:
    """Seconds that this process worked."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def timed(work: Callable[[], None]) -> tuple[float, float, float]:
    """Seconds, busy cores of the machine and busy cores of this process while `work` runs."""
    os.sync()  # so that what was written before is not paid for here
    start, machine, client = time.perf_counter(), busy(), own()
    work()
    seconds = time.perf_counter() - start
    return seconds, (busy() - machine) / seconds, (own() - client) / seconds


def one_stream(source: Path, target: Path) -> dict[str, Callable[[], None]]:
    """The plain way: one file after the other."""
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
    """The way of this project; checksums of both sides are part of it."""
    place = "gs://bucket/parallel"

    def upload() -> None:
        storage.remove(place)
        storage.upload(source, place)

    return {"upload": upload, "download": lambda: storage.download(place, target)}


def compare(source: Path, folder: Path, repeats: int, limit: float) -> float:
    """Run both ways in turn against a new server and print a table; the ratio of their times there and back."""
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
    """Read the command line, write a checkpoint of random bytes, and compare with and without a limit."""
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
