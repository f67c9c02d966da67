"""The command line: one file a command; what goes wrong for a user is one sentence on standard error and an exit code.

Exit codes: 0 done, 1 a bug, 2 bad input, 3 budget not reached, 130 interrupted (a fit goes on with `--resume`).
"""

from __future__ import annotations

import os
import sys

import typer

from trimtab.cli import claim, export, fit, methods, plan, report, run, show
from trimtab.core.errors import UserError

app = typer.Typer(
    name="trimtab",
    help="Give it a model and a budget; it gives back the best model that fits, with measured evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (fit, plan, report, run, methods, show, claim, export):
    app.command(module.__name__.rpartition(".")[2])(module.command)


def main() -> None:
    """Entry point of the command `trimtab`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("trimtab: interrupted; a fit goes on where it stopped with --resume and the same --out", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("TRIMTAB_TRACEBACK"):
            raise
        print(f"trimtab: a bug: {type(error).__name__}: {error}; set TRIMTAB_TRACEBACK=1 to see where, and please report it", file=sys.stderr)
        sys.exit(1)
