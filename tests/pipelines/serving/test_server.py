"""A server is up within its block, gone behind it however it ends, and tells in one line what went wrong."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from common.errors import EyasError, MachineError
from pipelines.serving import ask, server
from pipelines.serving.environment import needed
from pipelines.serving.server import Server
from tests.pipelines.serving import model_server
from tests.pipelines.serving.model_server import tokens_of

PROGRAM = [sys.executable, model_server.__file__, "serve"]


def served(tmp_path, way="good", timeout=30.0, head=True):
    spec = ["--speculative-config", "{}"] if head else []

    def make(port):
        return [*PROGRAM, way, "--port", str(port), *spec]

    return Server(make, {}, str(tmp_path / "server.log"), timeout)


def is_up(url):
    port = int(url.rsplit(":", 1)[1])
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def until_gone(url, seconds=10.0):
    until = time.monotonic() + seconds
    while is_up(url) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_up(url)


def test_it_is_up_within_its_block_and_gone_behind_it(tmp_path):
    with served(tmp_path) as one:
        assert is_up(one.url)
    assert until_gone(one.url)
    with pytest.raises(ZeroDivisionError), served(tmp_path) as two:
        raise ZeroDivisionError
    assert until_gone(two.url)
    with open(two.log) as log:
        assert log.read().startswith("serving good")


def test_it_ends_with_the_process_that_started_it_even_if_that_is_killed(tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from tests.pipelines.serving.test_server import served\n"
        "with served(pathlib.Path(sys.argv[1])) as one:\n"
        "    print(one.url, flush=True)\n"
        "    time.sleep(60)\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    with started:
        url = started.stdout.readline().strip()
        assert is_up(url)
        started.send_signal(signal.SIGKILL)
    assert until_gone(url)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (
            "broken",
            r"the server ended with 3; its log .*server\.log ends: serving broken \| ValueError: no such",
        ),
        ("silent", r"the server did not answer in 2 seconds \(--timeout\); its log .* ends: serving silent"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line_with_the_last_words_of_its_log(tmp_path, way, message):
    with (
        pytest.raises(MachineError, match=message) as caught,
        served(tmp_path, way, 2.0 if way == "silent" else 30),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_another_port_is_tried_where_somebody_was_faster(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1], server.free_port()])
        monkeypatch.setattr(server, "free_port", lambda: next(ports))
        monkeypatch.setattr(server, "_answers", answers_of_others(server._answers, taken.getsockname()[1]))
        with served(tmp_path) as one:
            assert is_up(one.url)


def answers_of_others(real, port):
    """Who has the port does not answer as a server does."""
    return lambda url: False if f":{port}/" in url else real(url)


def test_answers_and_the_drafts_meanwhile_are_told(tmp_path):
    prompts = [[1, 2], [3, 4, 5], [60]]
    with served(tmp_path) as one:
        for _ in range(2):  # differences, not a life's average
            found, drafts = ask.answers(one, "target", prompts, 8, 2, 30.0)
            assert found == [tokens_of(prompt, 8) for prompt in prompts]
            assert (drafts.drafts, drafts.length, drafts.rates) == (12.0, 2.0, [1.0, 0.0, 0.0])
        with pytest.raises(EyasError, match="answers 404: no such model"):
            ask.answers(one, "other", prompts, 8, 2, 30.0)
    with served(tmp_path, head=False) as one:
        assert ask.answers(one, "target", prompts, 8, 2, 30.0)[1] is None
    with pytest.raises(MachineError, match="the server ended with"):
        ask.answers(one, "target", prompts, 8, 2, 30.0)


def test_vllm_is_installed_without_what_a_cpu_does_not_need():
    asked = [
        "torch==2.13.0",
        "torchvision; platform_machine == 'x86_64'",
        "intel-openmp==2024.2.1; platform_machine == 'x86_64'",
        "numba==0.65.0; python_version < '3.10'",
        "transformers<5.20.0,>=5.16.1",
        "pandas; extra == 'bench'",
        "fastapi[standard]<0.137.0,>=0.133.0",
    ]
    assert needed(asked) == [
        "numba",
        "transformers<5.20.0,>=5.16.1",
        "fastapi[standard]<0.137.0,>=0.133.0",
    ]
