"""What both stages share: the feature store, files, mesh and sharding, layers, progress.

Names of arrays end in their dimensions. Everywhere: B rows of a batch, R rows of a store, T positions,
n = B * T; H hidden size, A aux states; N query heads, J key/value heads, G = N // J, d head_dim of queries
and keys, e of values; V the target's vocabulary, D the draft's; K TTT steps, C live indices, M targets.
A file adds its own letters at its top.
"""
