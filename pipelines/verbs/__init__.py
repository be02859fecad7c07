"""The verbs of `eyas`, each a thin layer over a stage's `run(config)`.

Their options are those of the stages' configurations. Heavy modules are imported inside the commands, so that
`eyas --help` is instant.
"""
