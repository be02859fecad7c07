"""What a run writes, by name, for whoever reads it: this file imports nothing.

A run's folder holds these files, and the folders of `FOLDERS`. A line of `METRICS` is one of training, or has
an `EVALUATION`, whose figures are those of train/metrics.py.
"""

EXPERIMENT, METRICS = "experiment.json", "metrics.jsonl"
FAILED = "failed.json"  # of a run of a sweep that came to nothing: why
FOLDERS = ("best", "last", "state")

EVALUATION = "evaluation"
LENGTH = "length_greedy"  # what one head is better by than another
GREEDY_BY_K, SAMPLED_BY_K = "length_greedy_by_k", "length_sampled_by_k"
AT_MOST = "sampled_at_most"  # true where what is sampled is a bound
SINCE_BEST = "evaluations_since_best"
