"""The exceptions for what a user can put right."""

from common.texts import without_secrets


class EyasError(ValueError):
    """A mistake in what the user gave: says what was found, what was expected and what to do.

    The command line prints its text as one line and exits with 2; a library caller sees a ValueError. Secrets
    in web addresses are left out of it.
    """

    exit_code = 2

    def __init__(self, text: str) -> None:
        super().__init__(without_secrets(text))


class DamagedError(EyasError):
    """What is stored is missing, or is not what was written."""


class MachineError(EyasError):
    """The machine failed, a full disk say: the command line exits with 1."""

    exit_code = 1


class RestartError(MachineError):
    """What may pass by itself, a pre-empted machine say: the same command continues.

    Job runners (XPK) start a job again on exit code 42 and not on 1 or 2.
    """

    exit_code = 42
