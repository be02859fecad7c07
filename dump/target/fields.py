"""config.json is checked once against a table of types, then read field by field; what nobody read and nobody
knows to be harmless is refused."""

from collections.abc import Mapping
from typing import Any

from common import schema
from common.errors import EyasError
from common.rope import check_scaling
from dump.target.schema import HARMLESS, ConfigJson, short
from dump.target.spec import Rope

_REQUIRED = object()
_ADVICE = "correct the file, or fetch it again"


class Fields:
    """Reads a JSON object and remembers what was read; `finish` refuses the rest by name.

    `found` is the object as the file has it, `raw` the same completed (see `complete`). Every value of a name
    that is in `types` has its type; reading another name is a mistake of the caller's.
    """

    def __init__(self, raw: Any, where: str, types: type = ConfigJson, harmless: frozenset[str] = HARMLESS):
        self.found: dict[str, Any] = dict(schema.check(types, raw, where, _ADVICE))
        self.raw = self.found
        self.where = where
        self.dynamic_limit: int | None = None  # rows longer than this would change a dynamic rotation
        self._types, self._harmless = types.__annotations__, harmless
        self._read: set[str] = set()

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field, or `default` where it is absent or null; EyasError if it is required."""
        assert name in self._types, name
        self._read.add(name)
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise EyasError(f"{self.where} lacks {name!r}; complete it")
        return default

    def alike(self, *names: str) -> Any:
        """The value of a field that goes by several names; EyasError where two of them differ."""
        present = {name: self.get(name, None) for name in names}
        present = {name: value for name, value in present.items() if value is not None}
        if not present:
            return self.get(names[0])
        first, *others = present
        for other in others:
            if present[other] != present[first]:
                raise EyasError(
                    f"{self.where}: {first}={present[first]!r} and {other}={present[other]!r} are two names "
                    "of one field; make them equal"
                )
        return present[first]

    def only(self, name: str, *known: Any) -> Any:
        """A field of which only some values are implemented; the first of them where it is absent or null."""
        value = self.get(name, known[0])
        if value not in known:
            supported = ", ".join(map(repr, known))
            raise EyasError(f"{self.where}: {name}={short(value)} is not supported; supported: {supported}")
        return value

    def skip(self, *names: str) -> None:
        """Fields that the forward pass does not depend on."""
        self._read.update(names)

    def rope(self, head_dim: int, partial: bool = False) -> Rope:
        """The rotation of all layers; see `rotation`."""
        self.skip("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_dim")
        return self.rotation(head_dim, self.get("rope_parameters"), partial)

    def rotation(self, head_dim: int, scaling: Mapping[str, Any], partial: bool = False) -> Rope:
        """A rotation, as it stands in `rope_parameters`; EyasError naming the file if it is not supported.

        A part of the dimensions may be rotated only with `partial`: in other families transformers rotates
        all of them and other servers a part.
        """
        factor = scaling.get("partial_rotary_factor") or 1.0
        if factor != 1.0 and not partial:
            raise EyasError(
                f"{self.where}: partial_rotary_factor={factor} is not supported for this architecture, of "
                "which transformers rotates all and other servers a part; remove it if that is wrong"
            )
        dim = int(head_dim * factor)
        try:
            kind = check_scaling(dict(scaling))
        except EyasError as error:
            raise EyasError(f"{self.where}: {error}") from None
        if dim < 2 or dim % 2:
            raise EyasError(f"{self.where}: RoPE turns pairs of dimensions, but {dim} of a head are rotated")
        if kind == "dynamic":
            self.dynamic_limit = self.get("max_position_embeddings")
        kept = {} if kind == "default" else scaling
        known = tuple(sorted((name, value) for name, value in kept.items() if value is not None))
        return Rope(dim, float(scaling["rope_theta"]), known)

    def finish(self) -> None:
        """EyasError naming the first field that is set, was not read, and is not known to be harmless."""
        for name, value in self.found.items():
            if name in self._read or name in self._harmless or value in (None, False, [], {}):
                continue
            raise EyasError(
                f"{self.where} sets {name}={short(value)}, which is not supported here; "
                "remove it only if it leaves the model's result alone"
            )
