"""Requests to stop are seen between steps, and never lost."""

import gc
import os
import signal
import threading

import pytest

from common.stopping import Stop

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request_and_the_second_interrupts(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_at_once_interrupts_at_the_first(number):
    with pytest.raises(KeyboardInterrupt), Stop(at_once=True):
        os.kill(os.getpid(), number)


def test_an_interrupt_that_a_callback_swallows_is_not_lost_and_not_printed(capfd):
    def collected(phase, _):
        if phase == "start" and not stop.asked:
            os.kill(os.getpid(), signal.SIGINT)

    with Stop(at_once=True) as stop:
        gc.callbacks.append(collected)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(collected)
        with pytest.raises(KeyboardInterrupt):
            stop.check()
    assert capfd.readouterr().err == ""


def test_other_threads_get_no_signals():
    before, found = signal.getsignal(signal.SIGINT), []

    def run():
        with Stop() as stop:
            found.extend((stop.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False, before]
