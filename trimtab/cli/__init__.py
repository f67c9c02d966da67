"""The command line: one file a command; what goes wrong for a user is one sentence on standard error and an exit code.

Exit codes: 0 done, 1 a bug, 2 bad input, 3 budget not reached, 130 interrupted (a fit goes on with `--resume`).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from trimtab.cli import adapt, bench, claim, export, fit, merge, methods, plan, report, run, search, serve, show, train
from trimtab.core.errors import UserError

app = typer.Typer(
    name="trimtab",
    help="Give it a model and a budget; it gives back the best model that fits, with measured evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


USAGE: type[Any] = typer.BadParameter.__mro__[1]  # Typer's own class of wrong use, which has no public name


class _Stopped(Exception):
    """An interrupt or a closed pipe on its way past Typer, which would give both exit codes of its own."""


def _shielded(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def shielded(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
            sys.stdout.flush()
        except (KeyboardInterrupt, BrokenPipeError) as error:
            raise _Stopped from error
        except SystemExit as stop:
            if isinstance(stop.__context__, BrokenPipeError):  # what rich makes of it
                raise _Stopped from stop.__context__
            raise

    return shielded


for module in (fit, plan, report, run, serve, search, adapt, train, merge, methods, show, claim, export, bench):
    app.command(module.__name__.rpartition(".")[2])(_shielded(module.command))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command `trimtab`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        sys.exit(app(arguments, standalone_mode=False) or 0)
    except USAGE as error:
        if (
            not (message := error.format_message().strip()) or "\n" in message
        ):  # no arguments at all: the help is the message
            error.show()
        else:
            said = f"{message[0].lower()}{message[1:]}".rstrip(".")
            print(
                f"trimtab: {said}; `{error.ctx.command_path if error.ctx else 'trimtab'} -h` shows what there is",
                file=sys.stderr,
            )
        sys.exit(2)
    except UserError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except _Stopped as stopped:
        if isinstance(stopped.__cause__, BrokenPipeError):  # the reader has enough; what is still buffered goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        print(
            "trimtab: interrupted; a fit or merge goes on where it stopped with --resume and the same --out",
            file=sys.stderr,
        )
        sys.exit(130)
    except Exception as error:
        if os.environ.get("TRIMTAB_TRACEBACK"):
            raise
        print(
            f"trimtab: a bug: {type(error).__name__}: {error}; set TRIMTAB_TRACEBACK=1 to see where, and please "
            "report it",
            file=sys.stderr,
        )
        sys.exit(1)
