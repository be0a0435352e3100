"""Entry point of ``python -m benchmarks NAME``."""

from __future__ import annotations

import argparse
import sys

import nalayer  # noqa: F401  (first: checks which package 'kernels' is)
from benchmarks import equivalence, figures


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="name", required=True)
    for module in (equivalence, figures):
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").partition("\n")[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    options = parser.parse_args(arguments)
    module = {"equivalence": equivalence, "figures": figures}[options.name]
    return module.run(options, parser)


if __name__ == "__main__":
    sys.exit(main())
