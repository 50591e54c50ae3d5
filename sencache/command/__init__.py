"""The command `sencache`: calibrate, show, compare. What a user can get wrong ends in one line and exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from sencache.command import calibrate, compare, show

EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError, torch.cuda.OutOfMemoryError)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See `{self.prog} --help`.\n")


def parser() -> Parser:
    """What can be typed."""
    top = Parser(prog="sencache", description="Sample diffusion models with a fraction of their evaluations.")
    top.add_argument("--traceback", action="store_true", help="when something fails, show where in the code")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, module in (("calibrate", calibrate), ("show", show), ("compare", compare)):
        text = str(module.__doc__)
        how = argparse.RawDescriptionHelpFormatter
        one = commands.add_parser(name, help=text.splitlines()[0], description=text, formatter_class=how)
        module.add_options(one)
        one.set_defaults(run=module.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default those of the process; returns the exit status."""
    try:
        options = parser().parse_args(arguments)
    except SystemExit as stop:  # --help, or what cannot be parsed
        return int(stop.code or 0)
    try:
        with torch.no_grad():
            options.run(options)
    except KeyboardInterrupt as stop:
        print(f"sencache: interrupted. {stop}".rstrip(), file=sys.stderr)
        return 130
    except EXPECTED as error:
        if options.traceback:
            raise
        print(f"sencache: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
