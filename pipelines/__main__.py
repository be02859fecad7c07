"""The entry point: `eyas`, or `python -m pipelines`. Ctrl-C is one line also while the rest is imported."""

import sys


def main() -> None:
    """Runs the command line."""
    try:
        from pipelines.cli import main as command
    except KeyboardInterrupt:
        sys.stderr.write("Error: stopped; the same command continues\n")
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
