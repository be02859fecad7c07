"""A fresh head, with what the store's sample knows."""

import jax
import numpy as np

from common.params import initialise
from common.store import Store
from train.heads import Head
from train.sample import Sample, Weights


def start(head: Head, store: Store, sample: Sample, draft_ids: np.ndarray, init: str, seed: int) -> Weights:
    """A fresh head in float32: all N(0, 0.02) in units of its features ("normal"), with the target's rows as
    its output ("target"), or also with the sample's fit ("fitted"). The same arguments give the same head.
    """
    noise = {name: np.array(x) for name, x in initialise(head.parameters(), jax.random.key(seed)).items()}
    lm_head_DH = None if init == "normal" else store.target_tensor("lm_head")[draft_ids].astype(np.float32)
    return head.start(noise, sample if init == "fitted" else sample._replace(fit=None), lm_head_DH, seed)
