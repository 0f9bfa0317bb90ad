"""`meshwright` and `python -m meshwright`."""

import sys


def main() -> None:
    """Run the command line; an interrupt is as quiet while it is still being loaded."""
    try:
        from meshwright.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
