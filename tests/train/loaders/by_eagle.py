"""python by_eagle.py FOLDER TARGET INPUTS.npz OUT.npz: a folder as EAGLE's own code reads it.

OUT: the weights of its model, what was missing or unknown, and the logits [T, N] of a first step.
"""

import sys

import numpy as np
import torch
from eagle.model.cnets import Model
from eagle.model.configs import EConfig
from safetensors.torch import load_file

folder, target, inputs, out = sys.argv[1:]
given = np.load(inputs)
config = EConfig.from_pretrained(f"{folder}/config.json")
model = Model(config, bias=True, total_tokens=8, depth=3, top_k=4, threshold=1.0, path=target, load_emb=True)
if config.vocab_size == config.draft_vocab_size:
    del model.d2t, model.t2d
loaded = model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
model = model.float().eval()
aux, tokens = torch.tensor(given["aux"], dtype=torch.float32), torch.tensor(given["tokens"])
with torch.no_grad():
    hidden = model(aux.reshape(1, len(aux), -1), tokens[None], use_cache=False)
    logits = model.lm_head(model.norm(hidden))[0]
weights = {name: value.detach().float().numpy() for name, value in model.named_parameters()}
about = {"missing": np.array(loaded.missing_keys), "unknown": np.array(loaded.unexpected_keys)}
np.savez(out, **weights, **about, d2t=model.d2t.numpy(), logits=logits.numpy())
