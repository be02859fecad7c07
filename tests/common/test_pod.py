"""Processes of a pod agree on what one of them decided or met, and none waits for ever for another."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from common import pod
from common.errors import EyasError
from tests import pod as miniature


def ended(work, processes=3):
    return miniature.wait(miniature.start(work, processes))


def test_alone_nothing_is_exchanged():
    assert (pod.size(), pod.index(), pod.is_first()) == (1, 0, True)
    assert pod.exchange({"a": 1}) == [{"a": 1}]
    assert pod.told(lambda: 5) == 5
    with pytest.raises(EyasError, match="mine"), pod.together():
        raise EyasError("mine")


def test_exchange_and_told():
    found = ended("print(pod.exchange(me * 10), pod.told(lambda: f'by {me}'))")
    assert [(p.code, p.out.strip()) for p in found] == [(0, "[0, 10, 20] by 0")] * 3, found


def test_an_error_of_one_is_everybodys_line():
    work = """
pod.exchange(0)
with pod.together():
    if me == 1:
        raise EyasError("the bucket is full; make room")
"""
    begin = time.monotonic()
    found = ended(work)
    assert time.monotonic() - begin < 30
    assert [p.code for p in found] == [2, 2, 2], found
    assert found[1].err.strip().endswith("Error: the bucket is full; make room")
    for other in (found[0], found[2]):
        assert other.err.strip().endswith("Error: process 1: the bucket is full; make room")


@pytest.mark.slow
@pytest.mark.parametrize("meeting", [False, True])
@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_is_told_to_those_who_wait_inside_a_computation(victim, meeting):
    """Also where it is met in a `together`, to which the others never come."""
    work = f"""
import jax
from contextlib import nullcontext
pod.exchange(0)
with pod.together() if {meeting} else nullcontext():
    if me == {victim}:
        raise EyasError("no row is left")
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("all")
"""
    begin = time.monotonic()
    found = ended(work)
    assert time.monotonic() - begin < 40
    assert [p.code for p in found] == [2, 2, 2], found
    assert all("no row is left" in p.err and "Traceback" not in p.err for p in found), found


@pytest.mark.slow
@pytest.mark.parametrize("me", [0, 1])
def test_a_process_that_is_left_alone_says_so(me):
    """JAX itself would end with a stack trace of its own language."""
    with socket.create_server(("", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = f"""
import sys
from common import joining, pod
from common.errors import RestartError
joining.SECONDS, joining._PATIENCE = 3, 1
try:
    pod.initialise({address!r}, 2, {me})
except RestartError as error:
    print("Error:", error, file=sys.stderr)
    pod.leave(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 42, done.stderr
    assert "waiting for the other processes" in done.stderr
    assert "do not find each other (not all came within 3 seconds)" in done.stderr.splitlines()[-1]


def test_what_differs_between_processes_is_named():
    work = """
pod.require_same({"a": 1, "b": [2]}, "options")
pod.require_same({"a": 1 + (me == 2)}, "options")
"""
    found = ended(work)
    assert [p.code for p in found] == [2, 2, 2], found
    line = "Error: process 2 (there) has other options than process 0 (here): a: 2 there, 1 here; start"
    assert all(p.err.splitlines()[-1].startswith(line) for p in found), found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 42), (signal.SIGINT, 130)])
def test_a_process_that_waits_for_another_hears_that_it_is_to_stop(kind, code):
    """The first one prepares for hours, say: both end within the seconds that a machine has left."""
    work = """
import time
from common.stopping import Stop
def decide():
    print(1, flush=True)
    time.sleep(100)
with Stop(everywhere=True), pod.announced():
    if me:
        print(1, flush=True)
    pod.told(decide)
"""
    started = miniature.start(work, 2)
    for process in started:
        process.stdout.readline()
    begin = time.monotonic()
    started[1].send_signal(kind)
    found = miniature.wait(started)
    assert time.monotonic() - begin < 15
    assert [p.code for p in found] == [code, code], found
    assert "Error: process 1: stopped; the same command goes on from what is kept" in found[0].err
    assert "Error: stopped; the same command goes on from what is kept" in found[1].err


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_process_ends_the_others_with_the_code_that_starts_them_again(lost):
    """Of the first one JAX hears before we do, and aborts."""
    started = miniature.start("import time\nprint(1, flush=True)\ntime.sleep(100)", 3)
    for process in started:
        process.stdout.readline()
    os.kill(started[lost].pid, signal.SIGKILL)
    begin = time.monotonic()
    found = miniature.wait(started)
    assert time.monotonic() - begin < 30
    assert found.pop(lost).code == -9
    assert [p.code for p in found] == [42, 42], found
    assert all(f"Error: process {lost} is lost; start the same command again" in p.err for p in found)


def test_who_compiles_hears_that_another_process_is_asked_to_stop():
    work = """
import os, signal, time
from common import stopping
with stopping.Stop() as stop:
    def check():
        stop.check()
        pod.check()
    if me:
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        with pod.together():
            stopping.interruptible(lambda: time.sleep(100), check)
    except KeyboardInterrupt as stopped:
        print("all know of signal", stopped.number)
"""
    found = ended(work)
    assert [(p.code, p.out) for p in found] == [(0, "all know of signal 15\n")] * len(found), found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_process_that_ends_at_once_tells_the_others(number):
    """Else JAX would abort them."""
    work = f"""
import os, time
from common import stopping
stopping.end_at_once()
if me == 0:
    time.sleep(0.5)
    os.kill(os.getpid(), {int(number)})
time.sleep(100)
"""
    code = 42 if number == signal.SIGTERM else 130
    found = ended(work)
    assert [p.code for p in found] == [code] * len(found), found
    assert all(p.err.splitlines()[-1].startswith("Error: ") for p in found)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("a:1", None, None), "give all three or none"),
        ((None, 2, None), "give all three or none"),
        (("a:1", 2, 2), "from 0 to 1"),
        (("a:1", 2, -1), "from 0 to 1"),
        (("host", 2, 0), "no HOST:PORT"),
        (("host:port", 2, 1), "no HOST:PORT"),
        ((":80", 2, 1), "no HOST:PORT"),
        (("host:65536", 2, 1), "no HOST:PORT"),
    ],
)
def test_a_pod_that_cannot_be_is_refused(given, said):
    with pytest.raises(EyasError, match=said):
        pod.initialise(*given)


def test_a_port_that_is_in_use_is_named():
    """JAX would die of it without a word."""
    with socket.create_server(("", 0)) as taken:
        code = f"""
from common import pod
pod.initialise("127.0.0.1:{taken.getsockname()[1]}", 2, 0)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "cannot listen there (Address already in use)" in done.stderr.splitlines()[-1]
