"""One arena for the memory of all threads of a dump: what it needs does not depend on how long it is."""

import ctypes

_ARENA_MAX = -8  # glibc's M_ARENA_MAX


def share() -> None:
    """Call it before there are threads: an arena that is there stays, and with many the limit comes too late.

    TensorStore copies what it writes into pieces of 64 kB, in threads of its own. With glibc each thread has
    an arena, eight a core, which keeps what was freed there; so a dump came to hold its blocks in flight once
    for every arena, hours into a run. Giving the freed memory back after some blocks would cost more than to
    write one, for each page is made anew. Only for a dump: on two cores one arena makes a training step 3%
    slower and its compiling a quarter, and training writes little.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_ARENA_MAX, 1)
