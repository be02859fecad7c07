"""Stage 2: feature store -> EAGLE3 head -> checkpoint, evaluation, export."""
