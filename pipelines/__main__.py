"""The entry point: `eyas`, or `python -m pipelines`. Ctrl-C is one line also while the rest is imported."""

import sys
import traceback


def main() -> None:
    """Runs the command line."""
    try:
        from common import pod
        from pipelines.cli import main as command
    except KeyboardInterrupt:
        sys.stderr.write("Error: stopped; the same command continues\n")
        sys.exit(130)
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
