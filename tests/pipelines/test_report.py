"""Tables say of every figure what it is."""

from pipelines.report import table


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
    assert "the target's own first choice at 50.0% of the positions" in text
