"""``python -m torchlinop demo``: what the package does, on a small model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torchlinop.examples import digits


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Parameters
    ----------
    arguments
        Of the command line; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m torchlinop", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help=(digits.__doc__ or "").splitlines()[0])
    demo.add_argument("--output", default="spectrum.png", help="name of the picture")
    digits.main(parser.parse_args(arguments).output)


if __name__ == "__main__":
    main()
