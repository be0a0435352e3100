"""Entry point of ``python -m benchmarks NAME``."""

from __future__ import annotations

import argparse
import shlex
import sys

import nalayer  # noqa: F401  (first: checks which package 'kernels' is)
from benchmarks import (
    accelerations,
    accuracy,
    equivalence,
    estimator,
    figures,
    first_use,
    gpu,
    gradients,
    initialisation,
    kernels,
    performance,
    report,
    scaling,
    sparsity,
    step,
    timescale,
    transition,
    versions,
)

_MODULES = (
    equivalence,
    accuracy,
    timescale,
    transition,
    initialisation,
    gradients,
    estimator,
    accelerations,
    kernels,
    step,
    first_use,
    scaling,
    sparsity,
    versions,
    gpu,
    figures,
    report,
    performance,
)


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="name", required=True)
    for module in _MODULES:
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(module=module, parser=command)
    if arguments is None:
        arguments = sys.argv[1:]
    options = parser.parse_args(arguments)
    options.command = shlex.join(["python", "-m", "benchmarks", *arguments])
    try:
        return options.module.run(options, options.parser)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
