"""Speculative decoding, measured: target and head decode as a server would, beside the target alone."""
