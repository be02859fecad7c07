"""A set of digests in a third of what Python's own takes: which of millions of conversations came before."""

WIDTH = 16  # bytes of a digest
_EMPTY = bytes(WIDTH)
_FIRST = 1 << 10  # slots to begin with; a power of two


class Digests:
    """Digests lie in one table, each in the first free slot from the one that it names itself on."""

    def __init__(self) -> None:
        self._table = bytearray(WIDTH * _FIRST)
        self._slots, self._size = _FIRST, 0

    def __len__(self) -> int:
        return self._size

    def add(self, digest: bytes) -> bool:
        """Whether it is new; it is there from now on. Not for a digest of zeros, which marks a free slot."""
        if 5 * self._size >= 4 * self._slots:
            self._grow()
        new = self._put(digest)
        self._size += new
        return new

    def _put(self, digest: bytes) -> bool:
        table, last = self._table, WIDTH * (self._slots - 1)
        place = WIDTH * int.from_bytes(digest[:8], "little") & last
        while (found := table[place : place + WIDTH]) != _EMPTY:
            if found == digest:
                return False
            place = place + WIDTH & last
        table[place : place + WIDTH] = digest
        return True

    def _grow(self) -> None:
        before, self._slots = self._table, 2 * self._slots
        self._table = bytearray(WIDTH * self._slots)
        for place in range(0, len(before), WIDTH):
            digest = before[place : place + WIDTH]
            if digest != _EMPTY:
                self._put(digest)
