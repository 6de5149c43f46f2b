"""The hostile suite: `python -m tests.hostile` runs all of it, `--short` the part that `make test` runs.

Every case is damaged input, a kill, a full disk, a wrong value, an unusual model or a race. Each must end well: with the right
result, or with one line that says what is wrong, and nothing lost. Prints how many cases of each kind were tried, ended well,
and failed.
"""

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

KINDS = ("values", "mutations", "models", "kills", "disks", "races")
SHOWN = 20  # failed cases of a kind that are printed


def main() -> None:
    """Run the kinds that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=KINDS, help=f"among {', '.join(KINDS)}; all by default")
    parser.add_argument("--short", action="store_true", help="a few cases of each kind")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="of the random choices")
    parser.add_argument("--count", type=int, help="so many cases of each kind")
    parser.add_argument("--only", default="", help="only cases with this in their name")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cases at a time")
    arguments = parser.parse_args()

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["KUBECONFIG"] = "/nonexistent"  # no case may reach a cluster that happens to be there
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread each, as cases run side by side; and OpenMP does not survive a fork
    # below, so that --help is quick; after this, a fork has everything in memory
    from tests.hostile import harness, lab

    for stage in ("resolve", "fetch", "tokenize", "prune", "distill", "quantize", "evaluate", "report", "publish"):
        importlib.import_module(f"components.{stage}.stage")
    import datasets  # noqa: F401

    import components.quantize.with_compressed_tensors
    import components.quantize.with_packed
    import components.quantize.with_quanto  # noqa: F401

    failed = 0
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        tempfile.tempdir = folder
        (Path(folder) / "lab").mkdir()
        inputs = lab.prepare(Path(folder) / "lab")
        for name in arguments.kinds:
            kind: harness.Kind = importlib.import_module(f"tests.hostile.{name}").KIND
            count = arguments.count or (kind.short if arguments.short else kind.whole)
            cases = list(kind.cases(inputs, Random(f"{name} {arguments.seed}"), count))
            cases = [case for case in cases if arguments.only in case.name]
            start, faults = time.monotonic(), []
            for case, fault in harness.run_cases(cases, arguments.workers):
                if fault:
                    faults.append(case.name)
                    if len(faults) <= SHOWN:
                        print(f"{name}: {case.name}\n    {fault}", flush=True)
            for group, number in Counter(fault.partition(":")[0] for fault in faults).most_common():
                print(f"{name}: {number} failed in {group}")
            seconds = time.monotonic() - start
            print(
                f"{name}: tried {len(cases)}, well {len(cases) - len(faults)}, failed {len(faults)}, "
                f"{seconds:.0f} s, seed {arguments.seed}",
                flush=True,
            )
            failed += len(faults)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
