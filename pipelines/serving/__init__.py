"""Heads in running servers: serve-check (a real vLLM on a CPU, beside our own figures) and bench-server.

A file each: what can be chosen (config), vLLM's environment (environment), a server's life (keeper, server),
its counters (counters), requests (ask), our own figures of the same answers (ours), and the whole (check).
"""
