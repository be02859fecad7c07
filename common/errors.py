"""The exceptions for what a user can put right."""


class EyasError(ValueError):
    """A mistake in what the user gave: says what was found, what was expected and what to do.

    The command line prints its text as one line and exits with 2; a library caller sees a ValueError.
    """


class MachineError(EyasError):
    """The machine failed, a full disk say: the command line exits with 1."""
