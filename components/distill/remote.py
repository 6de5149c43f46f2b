"""Checkpoints of training in a bucket: a pod's disk is lost with the pod.

Each machine trains with a local folder of checkpoints, see `resume`. A thread copies what is saved there to the bucket while
training goes on, the manifest last, and a new pod first fetches the newest whole checkpoint:

    <checkpoint_dir>/<key>/<attempt>/step-00000040/…, manifest.json

The key stands for everything that training depends on, so that a run never finds another's checkpoints. Every start has an
attempt of its own: a pod that is thought dead and still writes cannot damage the checkpoints of the one that follows it.
"""

import hashlib
import json
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from components.core import processes
from components.core.locks import remove_unused, use
from components.core.progress import log
from components.core.storage.place import open_store
from components.distill.backends import SingleProcess
from components.distill.resume import MANIFEST, check_files, files_of, read_manifest, shared

WHOLE = re.compile(rf"(\w+/step-\d+)/{MANIFEST}")
PART = re.compile(r"\w+/step-\d+/")
FOLDERS = "distill-checkpoints-"
OTHERS_PATIENCE = 600.0  # seconds in which the other machines must have uploaded their parts of a checkpoint
END_PATIENCE = 12.0  # seconds for each of the last two uploads when the pod is being stopped; Kubernetes gives it 30
POLL_SECONDS = 1.0


class RemoteCheckpoints:
    """The checkpoints of one training in a bucket, and their copies in a local folder.

    Args:
        place: the setting `checkpoint_dir`, a place in a bucket.
        identity: what the training depends on, see `resume.identity`.
        keep: how many checkpoints to keep.
        backend: the backend to train on; every process calls every method.

    Attributes:
        folder: the local folder, of the same name on every machine; removed when the process ends, or by the next one.
    """

    def __init__(self, place: str, identity: Mapping[str, Any], keep: int, backend: SingleProcess) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.place, self.keep, self.backend = f"{place}/{key}", keep, backend
        self.attempt = backend.from_first(uuid.uuid4().hex)
        self.thread, self.failed, self.given_up = threading.Thread(), False, threading.Event()
        self.folder = Path(tempfile.gettempdir()) / f"{FOLDERS}{self.attempt}"
        if processes.is_first_here():
            remove_unused(self.folder.parent.glob(f"{FOLDERS}*"))
            self.folder.mkdir(mode=0o700)
            self.lock = use(self.folder)

    def close(self) -> None:
        """Wait for the last upload, and remove the local folder."""
        self.finish()
        if processes.is_first_here():
            shutil.rmtree(self.folder, ignore_errors=True)

    def fetch(self) -> None:
        """Bring the newest whole checkpoint to the local folder of every machine, skipping damaged ones.

        Raises:
            OSError: the bucket cannot be read, on all processes; starting from the beginning would be worse than ending here.
        """
        found = shared(lambda: self._whole() if self.backend.rank == 0 else [])
        for name in sorted((name for part in found for name in part), key=step_of, reverse=True):
            faults = shared(partial(self._fetch, name))
            if not any(faults):
                return
            if self.backend.rank == 0:
                log(f"skipped a damaged checkpoint in {self.place}: {next(filter(None, faults))}")
            self.clear()

    def _whole(self) -> list[str]:
        """The whole checkpoints in the bucket, as `<attempt>/<step>`."""
        return [match[1] for name in open_store(self.place).list() if (match := WHOLE.fullmatch(name))]

    def _fetch(self, name: str) -> str:
        """Copy a checkpoint to this machine's folder; returns what is damaged about it, or an empty text."""
        if not processes.is_first_here():
            return ""
        store, folder = open_store(f"{self.place}/{name}"), self.folder / step_name(name)
        folder.mkdir(parents=True)
        try:
            held = store.list()
            store.get({MANIFEST: folder / MANIFEST})
            files = read_manifest(folder)["files"]
            if missing := sorted(files.keys() - held.keys()):
                raise ValueError(f"{self.place}/{name} must have the file {missing[0]}, which is missing")
            for path in (folder / file for file in files):
                path.parent.mkdir(parents=True, exist_ok=True)
            store.get({file: folder / file for file in files})
            check_files(folder, files)
        except (ValueError, KeyError) as error:  # the latter: an object was removed meanwhile, by an attempt that still runs
            return str(error) or type(error).__name__
        log(f"checkpoint fetched from {self.place}/{name}")
        return ""

    def clear(self) -> None:
        """Remove this machine's local checkpoints, which all of its processes have read or cannot use."""
        self.backend.barrier()
        if processes.is_first_here():
            for folder in self.folder.glob("step-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def is_busy(self) -> bool:
        """Whether any machine still uploads the checkpoint before; one that another machine has given up is given up here."""
        if self.backend.any(self.failed):
            self.given_up.set()
            self.finish()
        return self.backend.any(self.thread.is_alive())

    def send(self, step: int) -> None:
        """Begin to upload a checkpoint from the local folders of all machines; training goes on meanwhile."""
        if processes.is_first_here():
            self.failed, self.given_up = False, threading.Event()
            self.thread = threading.Thread(target=self._send, args=(self.folder / f"step-{step:08d}",), daemon=True)
            self.thread.start()

    def finish(self) -> None:
        """Wait for the upload that is going on, for as long as a pod that is being stopped can wait."""
        if self.thread.is_alive():
            self.thread.join(END_PATIENCE)
        if self.thread.is_alive():
            log("a checkpoint could not be uploaded in time")

    def _send(self, folder: Path) -> None:
        """Upload this machine's files; the first process then waits for those of the others and writes the manifest."""
        try:
            name = f"{self.attempt}/{folder.name}"
            store = open_store(self.place)
            store.put({f"{name}/{file}": path for file, path in files_of(folder).items()})
            if self.backend.rank == 0:
                manifest = (folder / MANIFEST).read_bytes()
                self._wait_for_others(name, {file: held["size"] for file, held in json.loads(manifest)["files"].items()})
                store.write(f"{name}/{MANIFEST}", manifest)
                log(f"checkpoint uploaded: {self.place}/{name}")
                self._remove_old(step_of(name))
        except (OSError, ValueError) as error:
            self.failed = True
            log(f"checkpoint {folder.name} could not be uploaded, training goes on: {error}")
        shutil.rmtree(folder, ignore_errors=True)  # so that a disk holds one checkpoint at a time

    def _wait_for_others(self, name: str, sizes: Mapping[str, int]) -> None:
        """Wait until the bucket holds every file. Raises ValueError, which names the first that is missing."""
        store, start = open_store(f"{self.place}/{name}"), time.monotonic()
        while True:
            there = store.list()
            missing = [file for file, size in sizes.items() if file not in there or there[file].size != size]
            if not missing:
                return
            if self.given_up.wait(POLL_SECONDS) or time.monotonic() - start > OTHERS_PATIENCE:
                raise ValueError(f"another machine has not uploaded {missing[0]}")

    def _remove_old(self, newest: int) -> None:
        """Delete checkpoints before the last ones, and what was never completed before them; manifests first."""
        store = open_store(self.place)
        names = sorted((name for name in store.list() if PART.match(name)), key=lambda name: not name.endswith(MANIFEST))
        whole = sorted({step_of(name) for name in names if WHOLE.fullmatch(name)})
        kept = [step for step in whole if step <= newest][-self.keep :]
        store.delete([name for name in names if step_of(name) < kept[0]])


def step_name(name: str) -> str:
    """`step-00000040` of `<attempt>/step-00000040/…`."""
    return name.split("/")[1]


def step_of(name: str) -> int:
    """40 of `<attempt>/step-00000040/…`."""
    return int(step_name(name).removeprefix("step-"))
