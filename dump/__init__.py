"""Stage 1: conversations -> packed rows -> frozen target -> feature store."""
