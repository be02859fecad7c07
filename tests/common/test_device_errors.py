"""What the runtime of the chips raises is one line with an exit code."""

import jax
import jax.numpy as jnp
import pytest

from common.device_errors import device_errors
from common.errors import EyasError


def test_memory_that_does_not_suffice_is_a_mistake_with_advice():
    line = r"^the memory of the chips .*bytes.*; use fewer rows$"
    with pytest.raises(EyasError, match=line) as found, device_errors("use fewer rows"):
        jax.block_until_ready(jnp.zeros((2**44,), jnp.uint8))
    assert found.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("UNAVAILABLE: peer closed\nmore", 42),
        ("ABORTED: x", 42),
        ("UNKNOWN: Gloo all-reduce failed: Read error: Connection closed", 42),
        ("UNKNOWN: x, a bug", None),
        ("INTERNAL: a bug", None),
    ],
)
def test_lost_chips_start_again_and_bugs_stay_bugs(text, code):
    with pytest.raises(Exception, match=r"closed|x|bug") as found, device_errors("less"):
        raise jax.errors.JaxRuntimeError(text)
    assert getattr(found.value, "exit_code", None) == code
    assert code is None or "\n" not in str(found.value)
