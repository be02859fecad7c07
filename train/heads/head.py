"""What a kind of draft head is to all others.

A head drafts K tokens at an index: by one rollout for training and scores, and with caches for decoding. What
is common to all kinds, and what is outside of a kind's package relies on:

- Draft step k of index i is of token i + 2 + k (train/targets.py has all of the alignment). Tokens up to
  i + 1 are known; those behind are the text's own in a rollout that takes them, drafted ones in decoding.
- Of another index a step reads step 0 alone, and the target's states. So only live indices need the others.
- Logits are a matrix's, `output`, over the draft vocabulary.

Dimensions: H hidden size, D draft vocabulary, C live indices, K steps; X features (train/sample.py). Of
decoding: B sequences, m indices of each, S states that the head reads.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol, Self

import jax

from common.cached_attention import New
from common.errors import EyasError
from common.params import Declaration
from train.batch import Batch, Frozen, Inputs, Params
from train.heads.eagle3.head import Eagle3
from train.launch import Method
from train.sample import Sample
from train.servers import PORTABLE, Limit
from train.serving_config import require_dtype


class Head(Protocol):
    """The sizes of a head; its parameters are a flat dict. All methods are pure."""

    method: ClassVar[Method]  # by which servers know the kind
    layouts: ClassVar[tuple[str, ...]]  # of train/servers.py, in which it is exported
    variants: ClassVar[Mapping[str, Mapping[str, Any]]]  # {in words: settings, or aux_layers} for SERVING.md
    draft_vocab: ClassVar[int | None]  # the usual size of its draft vocabulary; None: the target's own
    hidden_size: int
    vocab_size: int  # of the target
    draft_vocab_size: int
    rms_eps: float

    @property
    def inputs(self) -> Inputs:
        """The target's states that it reads at an index."""
        ...

    @classmethod
    def for_target(
        cls, target: dict[str, Any], draft_vocab_size: int, aux_layers: tuple[int, ...], **settings: Any
    ) -> Self:
        """The head that fits a target, whose text's config.json is `target`. `aux_layers`: those that it is
        to read, if it reads any; `settings`: all that can be chosen about the kind (`KINDS`)."""
        ...

    @classmethod
    def layout_of(cls, config: dict[str, Any]) -> str | None:
        """The layout (see train/servers.py) of an exported folder with that config.json; None if not ours."""
        ...

    @classmethod
    def from_serving_config(cls, path: str, config: dict[str, Any], num_target_layers: int) -> Self:
        """The head that the config.json at `path` describes. EyasError for a field that is missing, of
        another type, beyond what the kind can have (counts are looped over), or misread by a server."""
        ...

    @classmethod
    def is_published(cls, config: dict[str, Any]) -> bool:
        """Whether a config.json, of whatever trainer, is of a head of this kind; it may be a target's, of one
        that has such a head in it."""
        ...

    @classmethod
    def from_published(cls, path: str, config: dict[str, Any], num_target_layers: int) -> Self:
        """The head of such a config.json. EyasError as above, and for what it has and heads of this kind have
        not."""
        ...

    def asked(self, settings: dict[str, Any], where: str) -> Self:
        """This published head with the settings that were asked for. EyasError for one it can't be given."""
        ...

    def sources(self, found: Iterable[str], path: str) -> dict[str, str]:
        """{parameter: its name among the tensors `found` of a published head at `path`}. EyasError for the
        first that is missing or unknown."""
        ...

    def parameters(self) -> Declaration:
        """Every parameter; `still` are not trained."""
        ...

    @property
    def rows_of(self) -> str:
        """The tensor of the target ("lm_head" or "embed_tokens") whose rows the output may begin as."""
        ...

    def start(self, noise: Params, sample: Sample, lm_head_DH: jax.Array | None, key: jax.Array) -> Params:
        """An untrained head, made of N(0, 0.02) `noise` and of what a sample of the store says."""
        ...

    def units(self, sample: Sample) -> Params:
        """{parameter [out, in]: [in]}: the units in which the optimiser sees the inputs of a matrix."""
        ...

    def matrices(self) -> frozenset[str]:
        """The parameters [out, in] from hidden states to hidden states: what Muon may train."""
        ...

    def rollout(
        self, params: Params, frozen: Frozen, batch: Batch, steps: int, dtype: Any
    ) -> list[jax.Array]:
        """The live indices' states [K, C, H] that `output` turns into logits, for each of `by_steps`. What is
        drawn at random, in training alone, is drawn by `batch.draws`."""
        ...

    def ready(self, params: Params, dtype: Any) -> Any:
        """The parameters as `begin` and `step` take them, made once for all steps."""
        ...

    def empty_cache(self, sequences: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        """What sequences of up to `length` places leave to later steps, [..., B, ...] with B as axis 1."""
        ...

    def begin(self, ready: Any, states_BmSH: jax.Array) -> jax.Array:
        """The states [B, m, H] that the first steps at indices take, from the target's there."""
        ...

    def step(
        self,
        ready: Any,
        cache: dict[str, jax.Array],
        embedded_BmH: jax.Array,
        state_BmH: jax.Array,
        new: New,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """(states that the next steps take, states that `output` turns into logits, cache). What is embedded
        is the token behind an index; the logits are of the one behind that."""
        ...

    def at_once(
        self,
        ready: Any,
        cache: dict[str, jax.Array],
        left: tuple[jax.Array, jax.Array],
        starts_B: jax.Array,
        steps: int,
        embed_VH: jax.Array,
    ) -> jax.Array | None:
        """The states [B, K, H] that `output` turns into logits, of a whole draft, of a kind that needs no
        drafted token for the next one; None of the others, which draft by a `step` a token. `left` are both
        states [B, H] of the first step behind sequences of so many tokens; `embed` the target's embedding,
        for a token that stands for those which are not known."""
        ...

    def tensors(self, layout: str) -> dict[str, str]:
        """{name in an exported file: parameter}; servers may want one under several names."""
        ...

    def beside(self, layout: str) -> Declaration:
        """What an exported file has beside them: d2t, t2d, embed_tokens.weight."""
        ...

    def still(self) -> frozenset[str]:
        """The parameters that are not trained."""
        ...

    def output(self, params: Params) -> jax.Array:
        """The matrix [D, H] from a rollout's states to logits."""
        ...

    def serving_config(
        self, target: dict[str, Any], dtype: str, layout: str = PORTABLE, verifier: str = ""
    ) -> dict[str, Any]:
        """The config.json that servers read, of weights in `dtype`. `target` is the target's; `verifier` its
        folder or Hub id, for layouts that name it."""
        ...

    def card(self, metadata: Mapping[str, Any], target: dict[str, Any], layout: str) -> str:
        """The README.md of an exported head; `metadata` says how it was made, "target" of which target."""
        ...

    def facts(self) -> list[str]:
        """What a check says of it beside its tensors, a line each."""
        ...

    def limits(self, target: dict[str, Any]) -> list[Limit]:
        """What of this head, or of its target's config.json, which servers would refuse or misread."""
        ...

    def require_fit(self, target: dict[str, Any], where: str) -> None:
        """EyasError naming the first thing of the head at `where` that is not its target's."""
        ...

    def shares(self, anchors: float, steps: int) -> tuple[float, ...]:
        """Of the targets, the share that each step of a rollout in training computes with --anchors: never
        more than the step before (train/anchors.py)."""
        ...

    def require_steps(self, steps: int, where: str) -> None:
        """EyasError unless it can draft so many tokens."""
        ...

    def require_pieces(self, pieces: int, where: str) -> None:
        """EyasError unless its rollout can have rows in so many pieces (train/pieces.py)."""
        ...


HEADS: dict[str, type[Head]] = {"eagle3": Eagle3}  # by the names of --kind


def read_serving_config(path: str, config: Any, num_target_layers: int) -> Head:
    """The head of any kind that the config.json at `path` describes, for a target of so many layers."""
    if not isinstance(config, dict):
        raise EyasError(f"{path} is no JSON object; export the head again")
    for kind in HEADS.values():
        if kind.layout_of(config):
            require_dtype(path, config)
            return kind.from_serving_config(path, config, num_target_layers)
    raise EyasError(
        f"{path}: architectures is {config.get('architectures')!r}, of no head that was exported here; "
        "export it, or begin a training with it (--init)"
    )
