"""The entry point: `eyas`, or `python -m pipelines`. A signal is one line also while the rest is imported."""

import sys
import traceback

from common import stopping
from pipelines import arenas, streams


def main() -> None:
    """Runs the command line."""
    if "dump" in sys.argv[1:]:
        arenas.share()
    stopping.end_at_once()
    streams.secure()
    from common import pod
    from pipelines.cli import main as command

    code = 1
    try:
        command()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    pod.leave(code)


if __name__ == "__main__":
    main()
