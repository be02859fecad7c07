"""Whoever keeps the protocol may answer: the work is shared, and comes back from who cannot go on."""

import asyncio

import pytest

from pipelines.regenerate.answerer import TRUNCATED, WHOLE, Answer, GoneError, TryAgainError
from pipelines.regenerate.talk import Talk
from pipelines.regenerate.work import Work


class Answerer:
    """Answers `most` questions, then is gone; fails at every `fails`-th one."""

    def __init__(self, name, width=2, most=1000, fails=0):
        self.name, self.width, self.left, self.fails, self.asked = name, width, most, fails, []

    async def ready(self):
        await asyncio.sleep(0)

    async def answer(self, messages, tools, seed):
        self.asked.append((messages, seed))
        await asyncio.sleep(0.001)
        if not self.left:
            raise GoneError("tired", mistake=False)
        if self.fails and len(self.asked) % self.fails == 0:
            raise TryAgainError("not now", alone=True)
        self.left -= 1
        kind = TRUNCATED if messages[-1]["content"] == "too long" else WHOLE
        return Answer({"role": "assistant", "content": f"{messages[-1]['content']}!"}, kind, 1)


def talks(count):
    for number in range(count):
        texts = [f"{number}", "more", "too long" if number % 5 == 0 else "most"]
        questions = [{"role": "user", "content": text} for text in texts]
        yield Talk(number, str(number), questions, [], str(number).encode())


def outcomes(answerers, count=30, keep=False):
    found = {}

    def done(talk, outcome):
        assert found.setdefault(talk.number, (outcome, talk)) == (outcome, talk)

    async def run():
        work = Work(talks(count), done, 0, keep)
        await work.run(answerers, lambda: None)
        return work

    return asyncio.run(run()), found


@pytest.mark.parametrize("keep", [False, True])
def test_all_is_answered_once_and_in_the_order_of_each_conversation(keep):
    one, two = Answerer("one"), Answerer("two", width=5)
    work, found = outcomes([one, two], keep=keep)
    assert not work.gone
    assert not work.unanswered
    assert {n: outcome for n, (outcome, _) in found.items()} == {
        n: "truncated" if n % 5 == 0 else "answered" for n in range(30)
    }
    for number, (outcome, talk) in found.items():
        said = [message["content"] for message in talk.messages]
        last = [] if outcome == "truncated" and not keep else [f"{said[4]}!"]
        assert said == [f"{number}", f"{number}!", "more", "more!", said[4], *last]
    assert one.asked
    assert two.asked
    assert len({seed for _, seed in one.asked + two.asked}) == 90


def test_what_fails_or_ends_gives_its_work_to_the_others():
    tired, clumsy = Answerer("tired", width=8, most=10), Answerer("clumsy", fails=3)
    work, found = outcomes([tired, clumsy])
    assert len(found) + len(work.unanswered) == 30
    assert set(work.gone) == {"tired"}
    assert len(found) > 25


def test_it_ends_when_nobody_answers():
    work, found = outcomes([Answerer("tired", most=4), Answerer("weary", most=0)])
    assert set(work.gone) == {"tired", "weary"}
    assert len(found) <= 1


def test_one_that_fails_again_and_again_is_left_and_the_work_ends():
    work, found = outcomes([Answerer("broken", fails=1)], count=3)
    assert not found
    assert sorted(talk.number for talk in work.unanswered) == [0, 1, 2]
    assert work.unanswered[0].reason == "not now"
