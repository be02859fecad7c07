"""The target decodes by itself: which token comes next (sampling), and many answers at once (engine)."""
