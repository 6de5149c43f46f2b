"""Processes that end together with the one that started them."""

import signal
import subprocess
import sys
import time

import psutil

CHILD = """
import os, sys, time
from components.core.cli import stop_at_sigterm
from components.core.process import end_with
stop_at_sigterm()
end_with(int(sys.argv[1]))
try:
    print(os.getpid(), flush=True)
    time.sleep(60)
finally:
    print("cleaned up", flush=True)
"""
PARENT = f"""
import os, subprocess, sys
subprocess.run([sys.executable, "-c", {CHILD!r}, str(os.getpid())], start_new_session=True)
"""


def test_a_child_ends_gracefully_when_its_parent_is_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(1.5)
        assert child.is_running()
        parent.send_signal(signal.SIGKILL)
        assert parent.stdout.read() == "cleaned up\n"  # read to its end: nobody holds it any more
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running()


def test_a_child_whose_parent_has_died_already_ends_at_once():
    done = subprocess.run([sys.executable, "-c", CHILD, "0"], stdout=subprocess.PIPE, text=True, timeout=30)
    assert done.returncode == 128 + signal.SIGTERM
