"""A head's folder, checked against its target, is written to another place, in a layout that servers load."""

from collections.abc import Callable
from functools import partial
from typing import Any

from safetensors import safe_open

from common import schema, storage, strict_json
from common.errors import EyasError
from common.folders import read_as_one, write_folder
from common.safetensors import Checkpoint
from common.schema import NotRequired, TypedDict
from common.store import Store
from pipelines.compare.runs import require_not_in_a_run
from train import launch
from train.check_export import check
from train.draft_maps import read_draft_ids
from train.export import MADE, TRAINED_FOR, WEIGHTS, export
from train.heads.head import read_serving_config
from train.servers import SPECULATORS, require, verdicts

_Described = TypedDict("_Described", {TRAINED_FOR: NotRequired[dict[str, str]]})
_FILES = (WEIGHTS, "README.md", "config.json")  # the last one makes the folder whole


def copy_head(
    head: str,
    store: Store,
    out: str,
    servers: tuple[str, ...] = (),
    layout: str | None = None,
    target: str | None = None,
) -> list[str]:
    """Checks the folder `head` against its target, writes it to `out` in `layout` and checks that.

    The same files where `layout` is that of the folder, or None. `target` is the target's folder or Hub id.
    Returns what the check found, a line each. EyasError, with nothing written, if `head` is not sound, or one
    of `servers`, keys of servers.SERVERS, cannot take it in that layout.
    """
    require_not_in_a_run(out)
    storage.require_folder(out)
    if storage.is_inside(out, store.url):
        raise EyasError(f"{out} is in the store {store.url}, which is read only; name another folder")
    config = store.target_config()
    with read_as_one(head):
        check(head, config)
        described = storage.read_json(storage.join(head, "config.json"))
        found = read_serving_config(head, described, config["num_hidden_layers"])
        layout = layout or found.layout_of(described)
        if layout not in found.layouts:
            raise EyasError(
                f"{head} cannot be exported in the layout {layout}; its kind has {', '.join(found.layouts)}"
            )
        require(verdicts(found.limits(config), layout), servers, head)
        if layout == found.layout_of(described):
            names = [name for name in _FILES if storage.exists(storage.join(head, name))]
            files = {name: storage.read_bytes(storage.join(head, name)) for name in names}
            write = partial(write_folder, out, files)
        else:
            write = _converted(head, described, store, out, layout, target)
    write()
    made = launch.Served(out, layout, found.method)
    how = launch.commands(verdicts(found.limits(config), layout), target or "TARGET", made)
    lines = "\n".join([*check(out, config), "to serve it:", *how]).splitlines()
    return [f"{out}: written and checked", *(f"  {line}" for line in lines)]


def _converted(
    folder: str, described: dict[str, Any], store: Store, out: str, layout: str, target: str | None
) -> Callable[[], Any]:
    """What writes it, of all that was read."""
    if layout == SPECULATORS and not target:
        raise EyasError(
            f"the layout {layout} names the target, for servers to find: give --target, its folder or Hub id"
        )
    config, tensors = store.target_config(), Checkpoint.open(folder)
    head = read_serving_config(folder, described, config["num_hidden_layers"])
    sources = head.sources(tensors.tensors, folder)
    place = storage.join(folder, "config.json")
    origin = schema.check(_Described, described, place, "export the head anew").get(TRAINED_FOR)
    return partial(
        export,
        out,
        {name: tensors.read(source) for name, source in sources.items()},
        head,
        read_draft_ids(folder, tensors, head),
        config,
        dtype=described["torch_dtype"],
        metadata=_made(folder),
        trained_for=origin,
        layout=layout,
        verifier=target or "",
        embedding=store.target_tensor("embed_tokens") if layout == SPECULATORS else None,
    )


def _made(folder: str) -> dict[str, Any]:
    """What an export says of how its head was made."""
    with storage.as_local(storage.join(folder, WEIGHTS)) as path, safe_open(path, framework="np") as file:
        made = (file.metadata() or {}).get(MADE)
    where = f"{storage.join(folder, WEIGHTS)}, {MADE} of its header"
    found = strict_json.parse((made or "{}").encode(), where)
    return schema.check(dict[str, Any], found, where, "export the head anew")
