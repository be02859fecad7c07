"""STORE/target: all that a train job needs of the target, so that it never reads the target's checkpoint."""

from common import safetensors, storage, zarr
from common.progress import note
from common.storage import readable_errors
from common.store import CHECKSUMS
from dump.plan import Plan
from dump.target.weights import stacks

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def write_target(plan: Plan) -> None:
    """Writes embed_tokens and (where it is not tied) lm_head [V, H] in the checkpoint's dtype, the text
    decoder's config.json and the tokenizer's files. The checksums come last; where they are, nothing is done.
    """
    model, folder = plan.config.model, f"{plan.config.store.rstrip('/')}/target"
    if storage.exists(f"{folder}/{CHECKSUMS}"):
        return
    note(f"dump: copying embeddings, output head and tokenizer to {folder}")
    source, declared = safetensors.Checkpoint.open(model), stacks(plan.target, plan.config.tp)
    names = ("embed_tokens",) if plan.target.tied else ("embed_tokens", "lm_head")
    tensors = {name: source.read(declared[name].weight.source) for name in names}
    with readable_errors(folder):
        safetensors.write(f"{folder}/{safetensors.SINGLE}", tensors)
        storage.write_json(f"{folder}/config.json", plan.target.text)
        for name in _TOKENIZER:
            if storage.exists(storage.join(model, name)):
                storage.write_bytes(storage.join(folder, name), storage.read_bytes(storage.join(model, name)))
        sums = {name: zarr.crc32(tensor) for name, tensor in tensors.items()}
        storage.write_json(f"{folder}/{CHECKSUMS}", sums)
