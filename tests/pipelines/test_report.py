"""Tables say of every figure what it is."""

from pipelines.report import table
from pipelines.speculate import run
from pipelines.speculate.config import SpeculateConfig
from pipelines.speculate.table import _estimate


def evaluation(steps, **more):
    lists = dict.fromkeys(
        ("acc", "cond_acc", "full_acc", "alpha", "accepted_greedy", "accepted_sampled"), [0.25] * steps
    )
    by_k = [1.0 + k / 10 for k in range(1, steps + 1)]
    return lists | {
        "length_greedy": by_k[-1],
        "length_greedy_by_k": by_k,
        "length_sampled": 1.05,
        "length_sampled_by_k": [1.05] * steps,
        "length_drawn_by_k": [1.07] * steps,
        "counted": 1234,
        "drafts": 77,
        "own_text": 0.5,
        "coverage": 0.9,
        **more,
    }


def test_an_evaluation_shows_lengths_by_tokens_drafted_and_what_they_rest_on():
    text = table({"head": evaluation(3), "bigram": evaluation(3)})
    lines = text.splitlines()
    assert lines[0] == "by position, 1,234 answer positions"
    (drafted,) = (line.split() for line in lines if line.startswith("tokens drafted at once"))
    assert drafted[-3:] == ["k=1", "k=2", "k=3"]
    (greedy,) = (line.split() for line in lines if line.startswith("head, temperature 0"))
    assert greedy[-3:] == ["1.100", "1.200", "1.300"]
    (drawn,) = (line.split() for line in lines if "answers that the target drew" in line)
    assert drawn[-3:] == ["1.070"] * 3
    assert "accepted at each position of 77 drafts of 3, temperature 0: 0.250, 0.250, 0.250" in text
    assert "the target's own first choice at 50.0% of the positions (100%: greedy answers" in text
    assert "those at 1 want answers drawn there" in text


def test_what_is_sampled_is_at_most_that_where_a_store_tells_no_more(monkeypatch):
    bound, exact = (table({"head": evaluation(3, **more)}) for more in ({"sampled_at_most": True}, {}))
    for label in ("temperature 1, sampled drafts", "answers that the target drew"):
        assert f"{label}, at most" in bound
    assert "at most" not in exact
    settings = {"steps": 3, "topk": 1, "nodes": 4, "sampled_drafts": True, "slots": 2}
    walked = evaluation(3, length_drawn=1.07, sampled_at_most=True)
    monkeypatch.setattr(run.evaluate, "estimate", lambda *_: walked)
    estimate = run._estimate(SpeculateConfig("model", "head", store="store"), None)
    for temperature, count in ((1.0, 3), (0.0, 0)):
        shown = {"settings": settings | {"temperature": temperature}, "sets": {}, "estimate": estimate}
        text = "\n".join(_estimate(shown))
        assert text.count("at most") == count
        assert "own choice at 50.0%" in text if temperature == 0 else "own first choice are 50.0%" in text
