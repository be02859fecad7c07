"""python by_speculators.py FOLDER INPUTS.npz OUT.npz: a folder as the package speculators reads it.

OUT: the weights of its model after from_pretrained, and the logits [T, N] of a first step over one document.
"""

import sys

import numpy as np
import torch
from speculators.models.attention import create_float_mask
from speculators.models.eagle3 import Eagle3DraftModel

folder, inputs, out = sys.argv[1:]
given = np.load(inputs)
model = Eagle3DraftModel.from_pretrained(folder).to(torch.float32).eval()
model.config.transformer_layer_config._attn_implementation = model._attn_impl = "eager"
model._create_mask_fn = create_float_mask  # its own for that; flex attention wants to be compiled
seen = []
model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
aux, tokens = torch.tensor(given["aux"], dtype=torch.float32), torch.tensor(given["tokens"])
with torch.no_grad():
    model(aux.reshape(1, len(aux), -1), tokens[None], torch.zeros(1, len(aux), dtype=torch.long), ttt_steps=1)
weights = {name: value.detach().float().numpy() for name, value in model.named_parameters()}
maps = {"d2t": model.d2t.numpy()} if model.d2t is not None else {}
layers = np.array(model.target_layer_ids)
np.savez(out, **weights, **maps, logits=seen[0][0].detach().numpy(), layers=layers)
