"""A set of digests, compared with Python's own."""

import random

from dump.digests import WIDTH, Digests


def test_it_is_a_set_that_grows():
    rng, ours, wanted = random.Random(0), Digests(), set()
    few = [rng.randbytes(WIDTH) for _ in range(4000)]
    for _ in range(20_000):
        digest = rng.choice(few)
        assert ours.add(digest) == (digest not in wanted)
        wanted.add(digest)
    assert len(ours) == len(wanted)


def test_digests_that_begin_alike_are_kept_apart():
    ours = Digests()
    alike = [b"\xff" * 8 + i.to_bytes(8, "big") for i in range(600)]
    assert all(map(ours.add, alike))
    assert not any(map(ours.add, alike))
