"""Requests to stop are seen between steps, and never lost."""

import gc
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from common import stopping
from common.progress import Progress
from common.stopping import Stop, Stopped

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request_and_the_second_interrupts(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.asked
        with pytest.raises(Stopped) as again:
            os.kill(os.getpid(), number)
        assert again.value.number == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_request_ends_a_progress_at_its_next_step(number):
    with Stop(everywhere=True), Progress("counting", 3, "step") as progress:
        progress.update(1)
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as stopped:
            progress.update(1)
    assert stopped.value.number == number
    stopping.check()


def test_a_stage_that_looks_itself_is_not_interrupted_by_its_progress():
    with Stop(everywhere=True) as outer, Stop() as own, Progress("training", 3, "step") as progress:
        os.kill(os.getpid(), signal.SIGTERM)
        progress.update(1)
        assert own.asked
        assert not outer.asked


def test_a_request_inside_a_callback_that_swallows_exceptions_is_not_lost():
    def collected(phase, _):
        if phase == "start" and not stop.asked:
            os.kill(os.getpid(), signal.SIGINT)

    hook = sys.unraisablehook
    with Stop() as stop:
        assert sys.unraisablehook is hook
        gc.callbacks.append(collected)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(collected)
        with pytest.raises(KeyboardInterrupt):
            stop.check()


def test_other_threads_get_no_signals():
    before, found = signal.getsignal(signal.SIGINT), []

    def run():
        with Stop(everywhere=True) as stop:
            stopping.check()
            found.extend((stop.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False, before]


CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 42)]
LINE = "Error: stopped; the same command goes on from what is kept\n"


def program(code):
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_while_the_command_line_is_imported_is_one_line(number, code):
    done = program(
        "import sys, os\n"
        "class Late:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'pipelines.cli': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Late())\n"
        "from pipelines.__main__ import main\n"
        "main()\n"
    )
    assert (done.returncode, done.stderr) == (code, LINE)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_second_signal_inside_a_callback_that_swallows_exceptions_ends_the_command(number, code):
    done = program(
        "import gc, os, sys\n"
        "from pipelines import cli\n"
        "from pipelines.__main__ import main\n"
        "@cli.main.command()\n"
        "def spin():\n"
        f"    gc.callbacks.append(lambda phase, _: os.kill(os.getpid(), {int(number)}))\n"
        "    gc.collect()\n"
        "    print('still at work')\n"
        "sys.argv = ['eyas', 'spin']\n"
        "main()\n"
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"\nstopping at the next step; once more stops at once\n{LINE}"


WAITS = (
    "import os, signal, sys, time\n"
    "from common import stopping\n"
    "from common.stopping import Stop\n"
    "from pipelines import cli\n"
    "from pipelines.__main__ import main\n"
    "stopping._UNSEEN, stopping._MOST = 0.5, 3.0\n"
    "@cli.main.command()\n"
    "def wait():\n"
    "    {}\n"
    "    print('done')\n"
    "sys.argv = ['eyas', 'wait']\n"
    "main()\n"
)
ASK = "os.kill(os.getpid(), signal.SIGTERM)"


def test_a_request_that_nobody_looks_at_ends_the_command_after_a_while():
    done = program(WAITS.format(f"{ASK}; time.sleep(50)"))
    assert (done.returncode, done.stdout) == (42, "")
    assert done.stderr == f"\nstopping at the next step; once more stops at once\n{LINE}"


@pytest.mark.parametrize(
    "waits",
    [
        f"with Stop():\n        {ASK}; time.sleep(2)",
        f"""{ASK}
    try: stopping.check()
    except KeyboardInterrupt: time.sleep(2)""",
    ],
)
def test_a_stage_that_saves_and_who_has_looked_have_the_time_that_they_need(waits):
    done = program(WAITS.format(waits))
    assert (done.returncode, done.stdout) == (0, "done\n")


@pytest.mark.parametrize(("number", "code", "out"), [("SIGTERM", 42, ""), ("SIGINT", 0, "done\n")])
def test_of_a_machine_that_is_taken_away_no_server_is_waited_for(number, code, out):
    """However long it takes to save; who asks by Ctrl-C can do so once more."""
    done = program(WAITS.format(f"with Stop():\n        {ASK.replace('SIGTERM', number)}; time.sleep(4)"))
    assert (done.returncode, done.stdout) == (code, out)


def test_what_a_stage_was_asked_before_it_looked_itself_is_not_lost():
    with Stop(everywhere=True):
        os.kill(os.getpid(), signal.SIGTERM)
        with Stop() as own:
            with pytest.raises(Stopped) as stopped:
                own.check()
            assert stopped.value.number == signal.SIGTERM
            with pytest.raises(Stopped):
                os.kill(os.getpid(), signal.SIGTERM)


def test_who_waits_for_what_never_comes_can_be_stopped():
    def check():
        raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        stopping.awaited(Future(), check)
