"""Answers that are drafted are the target's own, token by token, whatever the drafts are worth."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.cached_attention import New
from common.errors import EyasError
from common.mesh import make_mesh
from common.params import initialise
from dump import target
from pipelines.decoding import engine
from pipelines.decoding import steps as steps_
from pipelines.decoding.drafting import Drafter, Drafting, Last, draft
from pipelines.decoding.engine import Engine
from pipelines.decoding.sampling import Sampling, probabilities
from tests.goldens import golden
from tests.pipelines.decoding.oracle import Known, Oracle, drafting, informed
from train.heads.eagle3.head import Eagle3

GREEDY = Sampling()
LENGTH, ANSWER = 48, 24
PROMPTS = ([5, 9, 2, 11, 3, 8, 1], [7, 7, 4], [12, 1, 6, 30, 2, 14, 3, 9, 9, 4, 1])
CHAIN, TREE = {"steps": 3, "nodes": 4}, {"steps": 3, "topk": 3, "nodes": 12}
OTHERS = ("qwen3_next", "qwen3_moe", "deepseek_v3", "gemma3", "gpt_oss")
STATES = ("deepseek_v3", "qwen3_next")  # MLA's compressed keys, and recurrent states
RANKS = (0, 0, 1, 0, 2, 0, 0, 0, 4)  # of the right token among the head's, from position to position


class Target:
    """A golden's model on one device."""

    def __init__(self, name, tmp_path):
        made = golden.read(name)
        folder = golden.write_folder(made, tmp_path)
        self.cfg, self.aux_layers = target.read_config(folder), made.aux_layers
        loaded = target.load(folder, self.cfg, make_mesh(), jnp.float32)
        self.weights = {name: x.addressable_data(0) for name, x in loaded.items()}
        self.forward = jax.jit(partial(target.forward, self.cfg, self.weights), static_argnums=3)

    def answers(self, head=(), sampling=GREEDY):
        """(the answers' tokens, how many each step gave): all prompts side by side, each in its own slot."""
        engine = Engine(self.cfg, self.weights, len(PROMPTS), LENGTH, sampling, *head)
        found, steps = {}, []
        for seed, prompt in reversed(list(enumerate(PROMPTS))):  # the last slot is taken first
            slot, token = engine.begin(prompt, seed)
            found[slot] = [token]
        while found.keys() - {slot for slot in range(len(PROMPTS)) if len(found[slot]) >= ANSWER}:
            tokens, counts = engine.step()
            for slot, answer in found.items():
                if len(answer) < ANSWER:
                    answer += tokens[slot, : counts[slot]].tolist()
                    steps.append(int(counts[slot]))
                    if len(answer) >= ANSWER:
                        engine.end(slot)
        return [found[slot][:ANSWER] for slot in range(len(PROMPTS))], steps


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Target("llama", tmp_path_factory.mktemp("llama"))


def eagle3(model, dtype=jnp.float32, **how):
    """A random head of the model, which drafts every other token of the vocabulary."""
    ids = jnp.arange(0, model.cfg.vocab_size, 2, dtype=jnp.int32)
    head = Eagle3.for_target(model.cfg.text, len(ids), model.aux_layers)
    params = initialise(head.parameters(), jax.random.key(0))
    return Drafting(head, **how), Drafter(head.ready(params, dtype), head.output(params).astype(dtype), ids)


def oracle(model, plain, ranks=RANKS, **how):
    slots = tuple((*prompt, *answer, *[0] * 8) for prompt, answer in zip(PROMPTS, plain, strict=True))
    return drafting(Oracle(model.cfg.vocab_size, model.aux_layers, slots, ranks), **how)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_greedy_answers_are_the_plain_ones(name, tmp_path):
    model = Target(name, tmp_path)
    plain, steps = model.answers()
    assert set(steps) == {1}
    chain, steps = model.answers(oracle(model, plain, **CHAIN))
    assert chain == plain
    assert set(steps) == {1, 2, 3, 4}, "drafts of every length are accepted"
    if name == "qwen3_next":
        with pytest.raises(EyasError, match=r"keep a state.*--eagle-topk 1"):
            model.answers(oracle(model, plain, **TREE))
        return
    tree, of_tree = model.answers(oracle(model, plain, **TREE))
    assert tree == plain
    assert len(of_tree) < len(steps), "a tree has tokens that a chain misses"


def test_a_perfect_head_has_all_accepted_and_a_random_one_almost_nothing(llama):
    plain, _ = llama.answers()
    perfect, steps = llama.answers(oracle(llama, plain, (0,), **CHAIN))
    assert perfect == plain
    assert set(steps) == {CHAIN["nodes"]}
    random, steps = llama.answers(eagle3(llama, **CHAIN))
    assert random == plain
    assert np.mean(steps) < 1.1


@pytest.mark.parametrize("how", [CHAIN, pytest.param(TREE, marks=pytest.mark.slow)])
def test_sampled_answers_with_greedy_drafts_are_the_plain_ones_of_the_same_seeds(llama, how):
    sampling = Sampling(0.7, top_p=0.9, top_k=20)
    plain, _ = llama.answers(sampling=sampling)
    assert plain != llama.answers()[0]
    drafted, steps = llama.answers(oracle(llama, plain, **how), sampling)
    assert drafted == plain
    assert max(steps) == CHAIN["nodes"]


def chi_squared(tokens, p):
    """How far draws are from the distribution p, in standard deviations of what they would be."""
    expected = len(tokens) * p
    assert not np.isin(tokens, np.flatnonzero(p == 0)).any()
    off = (np.bincount(tokens, minlength=len(p)) - expected)[p > 0] ** 2 / expected[p > 0]
    return (off.sum() - len(off) + 1) / np.sqrt(2 * len(off))


def next_logits(model, texts):
    """float32 [N, V]: what the target says behind each of N texts of one length, without any cache."""
    tokens = np.zeros((len(texts), 16), np.int32)  # what stands behind a text changes nothing in it
    tokens[:, : len(texts[0])] = texts
    row = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), tokens.shape)
    _, last = model.forward(tokens, jnp.ones_like(row), row, model.aux_layers)
    return target.logits(model.cfg, model.weights, last[:, len(texts[0]) - 1])


def well_informed(model, prompt, first, **how):
    """A head that knows the target but for some noise and an eighth of its vocabulary. Of what it has drafted
    it sees the last token; before it, it takes what it thinks the likeliest to stand."""
    V, known, behind = model.cfg.vocab_size, [], [*prompt]
    ids = jnp.flatnonzero(jnp.arange(V) % 8 > 0).astype(jnp.int32)
    for k in range(how["steps"]):
        logits_VV = next_logits(model, [[*behind, token] for token in range(V)])
        known.append(logits_VV + 0.1 * jax.random.normal(jax.random.key(k), (V, V)))
        behind.append(first if k == 0 else int(ids[known[-2][behind[-1]][ids].argmax()]))
    tables = Known(model.weights["embed_tokens"], jnp.stack(known))
    return informed(tables, len(prompt) - 1, ids, model.aux_layers, **how)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("llama", True),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("llama", False), *((n, True) for n in STATES))
        ),
    ],
)
def test_sampled_drafts_leave_the_targets_distribution_as_it_is(name, good, tmp_path):
    """The tokens of a step that thousands of answers take at once, which differ by their seeds: each behind
    the text that most of them have before it. A good head's are accepted to the last, a random one's now and
    then."""
    model, B, prompt = Target(name, tmp_path), 6_000, PROMPTS[0]
    sampling = Sampling(0.3 if good else 0.8, top_k=12)
    first = int(next_logits(model, [prompt])[0].argmax())
    shape = CHAIN | {"sampled": True}
    head = well_informed(model, prompt, first, **shape) if good else eagle3(model, **shape)
    how, w = steps_.How(model.cfg, sampling, head[0]), steps_.Weights(model.weights, head[1])
    one = [np.array([n], np.int32) for n in (len(prompt), 0, 5)]
    greedy = how._replace(sampling=GREEDY)  # of the first token alone
    token, held = steps_.prefill(greedy, w, steps_.nothing(how, 1, 16, jnp.float32), np.array([prompt]), *one)
    assert int(token[0]) == first
    held = steps_.Held(
        *({name: jnp.repeat(x, B, 1) for name, x in of.items()} for of in held[:2]),
        *(jnp.repeat(x, B, 0) for x in held[2:]),
    )
    same = (jnp.full(B, n, jnp.int32) for n in (first, len(prompt)))
    given, _ = jax.jit(partial(steps_.step, how))(w, held, *same, jnp.arange(B), jnp.ones(B, jnp.int32))
    tokens, counts = np.asarray(given.tokens_Bd), np.asarray(given.counts_B)
    text, answers = [*prompt, first], np.arange(B)
    for number in range(CHAIN["nodes"] if good else 2):
        answers = answers[counts[answers] > number]
        p = np.asarray(probabilities(sampling, next_logits(model, [text])))[0]
        assert chi_squared(tokens[answers, number], p) < 4, number
        assert len(answers) > 100, number
        accepted = answers[counts[answers] > number + 1]
        text += [int(np.bincount(tokens[accepted, number]).argmax())] if len(accepted) else []
        answers = accepted[tokens[accepted, number] == text[-1]]
    assert counts.mean() > 2.5 if good else 0.02 < (counts > 1).mean() < 0.5


@pytest.mark.parametrize("shape", [None, CHAIN, TREE, CHAIN | {"sampled": True}, {"steps": 1, "nodes": 2}])
def test_what_steps_leave_to_each_other_keeps_its_shapes_in_bfloat16(llama, shape):
    """So one compiled program serves all steps."""
    dtype = jnp.bfloat16
    weights = {name: x.astype(dtype) for name, x in llama.weights.items()}
    drafting, drafter = (None, None) if shape is None else eagle3(llama, dtype, **shape)
    how = steps_.How(llama.cfg, Sampling(0.5, top_p=0.9), drafting)
    held = steps_.nothing(how, 2, 16, dtype)
    w, one, two = steps_.Weights(weights, drafter), *(jnp.ones(n, jnp.int32) for n in (1, 2))
    _, after = jax.eval_shape(
        partial(steps_.prefill, how), w, held, jnp.ones((1, 8), jnp.int32), one, one, one
    )
    given, later = jax.eval_shape(partial(steps_.step, how), w, held, two, two, two, two)
    before, *others = (jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (held, after, later))
    assert all(other == before for other in others)
    assert given.tokens_Bd.shape == (2, 1 if shape is None else shape["steps"] + 1)


def test_a_trees_nodes_are_the_likeliest_behind_their_own_branches(llama):
    """What other branches of the head's cache hold has no part in them."""
    d, drafter = eagle3(llama, **TREE)
    how, w = steps_.How(llama.cfg, GREEDY, d), steps_.Weights(llama.weights, drafter)
    prompt, one = PROMPTS[0], [np.array([n], np.int32) for n in (len(PROMPTS[0]), 0, 0)]
    token, held = jax.jit(partial(steps_.prefill, how))(
        w, steps_.nothing(how, 1, 16, jnp.float32), np.array([prompt]), *one
    )
    embed = llama.weights["embed_tokens"]
    last = Last(token, one[0], one[1], one[1] + 1, held.state_BH, held.hidden_BH)
    found, _ = jax.jit(partial(draft, d, GREEDY))(drafter, embed, held.head, last)
    tokens, parents = (np.asarray(x)[0].tolist() for x in found[:2])
    assert len(set(parents)) > 3, "several branches grow"
    step = jax.jit(partial(d.head.step, drafter.ready))

    def behind(node):
        """The head's states behind a node, along its branch alone: its state, its output, cache, depth."""
        if node == 0:
            return held.state_BH[:, None], held.hidden_BH[:, None], held.head, 0
        state, _, cache, depth = behind(parents[node])
        new = New.behind(jnp.asarray(one[0]) + depth, 1)
        return *step(cache, embed[jnp.asarray([[tokens[node]]])], state, new), depth + 1

    for parent in set(parents):
        logits = behind(parent)[1][0, 0] @ drafter.output_DH.T
        best = np.asarray(drafter.ids_D)[np.argsort(-np.asarray(logits))[: d.topk]]
        children = [tokens[n] for n in range(1, len(tokens)) if parents[n] == parent]
        assert children == best[: len(children)].tolist()


def test_a_target_that_does_not_fit_its_device_is_refused_before_it_is_read(llama, monkeypatch):
    monkeypatch.setattr(engine, "_device_memory", lambda: 1000)
    with pytest.raises(EyasError, match=r"nowhere has .* GiB of weights in bfloat16, .* must fit one device"):
        engine.on_one_device("nowhere", llama.cfg, "bfloat16")
