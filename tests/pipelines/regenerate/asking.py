"""What the tests of regenerating share: a data set, and a run over servers of the tests' own."""

import json
from dataclasses import replace
from pathlib import Path

from pipelines.regenerate.run import run

SYSTEM = {"role": "system", "content": "Be brief."}


def user(text):
    return {"role": "user", "content": text}


def old(text="the data's own answer"):
    return {"role": "assistant", "content": text}


def write_data(path, count=20):
    """Conversations of one to three questions, half with a system turn."""
    with open(path, "w") as file:
        for n in range(count):
            turns = [turn for k in range(1 + n % 3) for turn in (user(f"question {n}.{k}?"), old())]
            record = {"id": f"chat{n}", "messages": [SYSTEM] * (n % 2) + turns}
            file.write(json.dumps(record) + "\n")
    return str(path)


def ask(config, *servers, **changes):
    return run(replace(config, endpoint=tuple(server.url for server in servers), **changes))


def lines(config):
    return [json.loads(line) for line in Path(config.out).read_bytes().splitlines()]


def record(config):
    return json.loads((Path(config.out).parent / "answers.settings.json").read_text())


def only_one(config, *turns, **fields):
    Path(config.data[0]).write_text(json.dumps({"id": "one", "messages": turns} | fields))
    return config
