"""A head in a real vLLM on this machine's CPU, in each layout, beside our own figures of the same answers.

The target answers alone, greedily; then with the head, whose drafts the server counts. Our figures are those
of `eval` over the tokens that the target gave alone: walked through as a server does, they are what it must
count, and its answers must be the same. Beside them are those of our own chain (`speculate`).
"""

import os
from collections.abc import Sequence
from itertools import islice
from typing import Any

from common import storage
from common.errors import EyasError
from common.lock import locked
from common.progress import note
from common.store import Store
from dump.chat import Chat
from pipelines import figures
from pipelines.copy_head import copy_head
from pipelines.serving import ask, environment
from pipelines.serving.config import ServeCheckConfig
from pipelines.serving.counters import Drafts
from pipelines.serving.ours import chained, walked
from pipelines.serving.server import Server
from train import launch
from train.check_export import check as check_folder
from train.heads.head import Head, read_serving_config
from train.servers import PORTABLE, SERVERS, require, verdicts

NAME = "target"  # what the server calls it
RESULT = "serve-check.json"
_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def run(config: ServeCheckConfig) -> dict[str, Any]:
    """{"ours", "chain", "answers", "layouts": {layout: figures}}; writes them to OUT/serve-check.json.

    EyasError before anything is set up for a head that vLLM cannot take; and at the end, all being written,
    if a figure or an answer is not ours.
    """
    if storage.is_remote(config.out):
        raise EyasError(f"out={config.out} must be a folder of this machine, from which vLLM is served")
    storage.require_folder(config.out)
    store = Store.open(config.store)
    target, layouts = store.target_config(), config.layouts or SERVERS["vllm"].layouts
    check_folder(config.head, target)
    place = storage.join(config.head, "config.json")
    head = read_serving_config(place, storage.read_json(place), target["num_hidden_layers"])
    for layout in layouts:
        require(verdicts(head.limits(target), layout), ("vllm",), config.head)
    prompts = _prompts(store, config)
    out = os.path.abspath(storage.local_path(config.out))
    with locked(out):
        return _checked(config, store, head, layouts, prompts, out)


def _checked(
    config: ServeCheckConfig,
    store: Store,
    head: Head,
    layouts: Sequence[str],
    prompts: list[list[int]],
    out: str,
) -> dict[str, Any]:
    model, target = os.path.abspath(storage.local_path(config.model)), store.target_config()
    folders = {name: os.path.join(out, name) for name in (PORTABLE, *layouts)}
    source = config.head
    for layout, folder in folders.items():
        copy_head(source, store, folder, ("vllm",), layout, model)
        source = folders[PORTABLE]  # made first: a run that goes on may replace the other one
    served = _Served(config, environment.ready(config.environment), model, head.method, out, prompts)
    note(
        f"serve-check: {len(prompts)} answers of the target alone, {served.plain_tokens} tokens each at most"
    )
    plain, _ = served(None, PORTABLE, served.plain_tokens)
    options = {"ttt_steps": launch.TOKENS, "answer_tokens": config.answer_tokens}
    asked = list(zip(prompts, plain, strict=True))
    ours = walked(model, target["vocab_size"], folders[PORTABLE], head.inputs.aux_layers, asked, **options)
    found = {"ours": _our_figures(ours), "answers": len(plain), "layouts": {}}
    found["chain"] = _our_chain(config, model, folders[PORTABLE], prompts, plain)
    for layout in layouts:
        note(f"serve-check: the same with the head, layout {layout}")
        answers, drafts = served(folders[layout], layout, config.answer_tokens)
        found["layouts"][layout] = _figures(answers, plain, drafts, found["ours"], config.answer_tokens)
    figures.write(os.path.join(out, RESULT), found)
    return found


class _Served:
    """Answers of one server after another."""

    def __init__(
        self,
        config: ServeCheckConfig,
        program: str,
        model: str,
        method: launch.Method,
        out: str,
        prompts: list[list[int]],
    ) -> None:
        self._config, self._program, self._model, self._method = config, program, model, method
        self._out, self._prompts = out, prompts
        # Drafts at an answer's end reach beyond it.
        self.plain_tokens = config.answer_tokens + launch.TOKENS
        self._length = max(map(len, prompts)) + self.plain_tokens + 2 * launch.TOKENS

    def __call__(self, head: str | None, layout: str, tokens: int) -> tuple[list[list[int]], Drafts | None]:
        """(the answers, the drafts that the server counted)"""
        config = self._config
        served = launch.Served(head, layout, self._method) if head else None
        command = launch.command("vllm", self._model, served)

        def on(port: int) -> list[str]:
            here = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
            size = ["--max-model-len", str(self._length), "--max-num-seqs", str(config.concurrency)]
            exact = [word for option in launch.CPU_OPTIONS for word in option]
            return [self._program, *command.arguments()[1:], *here, *size, *exact]

        log = os.path.join(self._out, f"{layout if head else 'plain'}.log")
        with Server(on, launch.CPU | _QUIET, log, config.timeout) as server:
            asking = (NAME, self._prompts, tokens, config.concurrency, config.timeout)
            return ask.answers(server, *asking)


def _prompts(store: Store, config: ServeCheckConfig) -> list[list[int]]:
    """What stands in front of the first answers of held-out conversations. EyasError if there is nothing."""
    rows = store.split_rows("test")
    found: list[list[int]] = []
    for row in rows:
        if len(found) >= config.prompts:
            break
        columns = store.read(("tokens", "segment_ids", "loss_mask"), [int(row)])
        found += islice(
            _first_questions(*(columns[name][0] for name in columns)), config.prompts - len(found)
        )
    if not found:
        raise EyasError(f"{config.store} has no held-out conversations; prepare one with holdout above 0")
    return found


def _first_questions(tokens_T: Any, segments_T: Any, mask_T: Any) -> Any:
    for segment in range(1, int(segments_T.max()) + 1):
        inside = segments_T == segment
        tokens, mask = tokens_T[inside], mask_T[inside]
        if mask.any() and (first := int(mask.argmax())) > 0:
            yield tokens[:first].tolist()


def _our_figures(ours: dict[str, Any]) -> dict[str, Any]:
    return {
        "length": ours["length_greedy_by_k"][launch.TOKENS - 1],
        "by_position": ours["accepted_greedy"],
        "drafts": ours["drafts"],
    }


def _our_chain(
    config: ServeCheckConfig, model: str, head: str, prompts: list[list[int]], plain: Sequence[list[int]]
) -> dict[str, Any]:
    """The figures of our own chain. The drafts at an answer's end, which reach beyond it, are cut there."""
    stops, slots = Chat.load(model).stops, config.concurrency
    its, answers = chained(model, head, stops, prompts, config.answer_tokens, slots)
    return {
        "length": its["acceptance_length"],
        "by_position": its["accepted"],
        "drafts": its["drafts"],
        "equal_answers": sum(a == b[: len(a)] for a, b in zip(answers, plain, strict=True)),
    }


def _figures(
    answers: Sequence[list[int]],
    plain: Sequence[list[int]],
    drafts: Drafts | None,
    ours: dict[str, Any],
    tokens: int,
) -> dict[str, Any]:
    wanted = [answer[:tokens] for answer in plain]
    pairs = list(zip(answers, wanted, strict=True))
    agreeing = sum(_same_start(one, other) for one, other in pairs)
    length = drafts.length if drafts else None
    return {
        "length": length,
        "by_position": drafts.rates if drafts else [],
        "drafts": drafts.drafts if drafts else 0,
        "of_ours": None if length is None else length / ours["length"] - 1,
        "equal_answers": sum(one == other for one, other in pairs),
        "equal_tokens": agreeing / sum(map(len, wanted)),
    }


def _same_start(one: list[int], other: list[int]) -> int:
    same = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        same += 1
    return same


def table(found: dict[str, Any]) -> str:
    """The result as a person reads it."""
    ours, answers = found["ours"], found["answers"]
    lines = [f"{'':<14}  length  by position          of ours  equal answers  equal tokens"]
    lines.append(f"{'ours':<14}  {ours['length']:6.4f}  {_rates(ours['by_position']):<19}")
    chain = found["chain"]
    lines.append(
        f"{'our own chain':<14}  {chain['length']:6.4f}  {_rates(chain['by_position']):<19}  "
        f"{chain['length'] / ours['length'] - 1:>+7.2%}  {chain['equal_answers']:>6} of {answers}"
    )
    for layout, its in found["layouts"].items():
        length = "  none" if its["length"] is None else f"{its['length']:6.4f}"
        share = "" if its["of_ours"] is None else f"{its['of_ours']:+.2%}"
        lines.append(
            f"{layout:<14}  {length}  {_rates(its['by_position']):<19}  {share:>7}  "
            f"{its['equal_answers']:>6} of {answers:<4}  {its['equal_tokens']:>11.2%}"
        )
    return "\n".join(lines)


def _rates(rates: list[float]) -> str:
    return " ".join(f"{rate:.3f}" for rate in rates)


def require_agreement(found: dict[str, Any], tolerance: float) -> None:
    """EyasError naming each layout whose drafts or answers are not ours."""
    wrong = []
    for layout, its in found["layouts"].items():
        if its["of_ours"] is None:
            wrong.append(f"{layout}: the server drafted nothing")
        elif abs(its["of_ours"]) > tolerance:
            wrong.append(
                f"{layout}: {its['length']:.4f} tokens a step, {found['ours']['length']:.4f} expected"
            )
        if its["equal_tokens"] < 1 - tolerance:
            wrong.append(f"{layout}: {1 - its['equal_tokens']:.1%} of the tokens are not the target's")
    if wrong:
        raise EyasError(f"vLLM does not serve this head as it was measured: {'; '.join(wrong)}")
