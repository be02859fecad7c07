"""A byte-level tokenizer and chat templates small enough to be made in a test."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests import tiny_llama

CHATS = Path(__file__).parents[1] / "data" / "chats.jsonl"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer():
    """Bytes, a few merges (one joins two newlines, one a space and a letter), three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "B"), ("l", "l"), ("Ġ", "Ġ")]
    tokens = [*SPECIALS, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return tokenizer


def write_model(folder, template=CHATML, **config):
    """A model folder with a tokenizer and config.json, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    size = tiny_llama.CONFIG | {"vocab_size": tokenizer.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(size | config))
    return folder


def write_answering_model(folder, length, stops):
    """A random Llama for so many tokens that stops now and then, at any of `stops`."""
    write_model(folder, max_position_embeddings=length)
    tiny_llama.write_weights(str(folder))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *stops]}))
    return str(folder)


def counted_texts(chat, messages):
    """The text of every run of counted tokens, decoded from the tokens alone."""
    (encoded,) = chat.encode([chat.render(messages)])
    runs, before = [], 0
    for token, counted in zip(encoded.tokens.tolist(), encoded.mask.tolist(), strict=True):
        if counted and not before:
            runs.append([])
        if counted:
            runs[-1].append(token)
        before = counted
    return [chat.decode(run) for run in runs]


def chat(*turns):
    """A line of a ShareGPT file, of (role, text)."""
    return json.dumps({"conversations": [{"from": role, "value": text} for role, text in turns]})
