"""The entry point: commands, errors, exit codes.

Imports no more than ``mlxrun --help`` needs. Exit codes: 0 done, 1 an error (one line on standard
error), 2 wrong usage, 129 the terminal was closed, 130 interrupted, 141 the reader of a pipe
closed it, 143 terminated.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import termios
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

import click

from mlxrun import __version__
from mlxrun.errors import MlxrunError

# With their short help; each is in the module of its name, or in that of HOMES.
COMMANDS = {
    "chat": "Talk with a model.",
    "generate": "Continue a text.",
    "convert": "Convert a GGUF file or a Hugging Face model to a directory.",
    "inspect": "Show a model's contents and the memory it needs.",
    "pull": "Download a model from the hub.",
    "check-batch": "Compare requests served together with each alone.",
    "perplexity": "Measure how well a model predicts a text.",
    "compare": "Measure how far model B is from model A.",
    "bench": "Measure how fast a model runs on this machine.",
    "kernels": "Show and test the kernels for GGUF blocks on this machine.",
}

HOMES = dict.fromkeys(("perplexity", "compare", "check-batch"), "eval")

HELP_OPTIONS = ["-h", "--help"]

ERROR, CLOSED_TERMINAL, INTERRUPTED, CLOSED_PIPE = 1, 129, 130, 141


class LazyGroup(click.Group):
    """A group that imports a command when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"mlxrun.cli.{HOMES.get(cmd_name, cmd_name)}")
        command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = get_close_matches(args[0], COMMANDS, n=1)
            nearest = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"No such command {args[0]!r}.{nearest}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": HELP_OPTIONS, "max_content_width": 100},
)
@click.version_option(__version__, prog_name="mlxrun", message="%(prog)s %(version)s")
def cli() -> None:
    """Run GGUF and Hugging Face language models through MLX.

    A MODEL is a .gguf file (or the first shard of a split one), a directory that 'mlxrun convert'
    or mlx-lm wrote, any Hugging Face directory of a supported family, or org/repo[:QUANT] on the
    hub, which is downloaded once.

    \b
    Examples:
      mlxrun chat
      mlxrun generate model.gguf --prompt "Once upon a time"
      mlxrun convert model.gguf -o model-mlx
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    from mlxrun.cli.console import note, noticing_interrupts

    _leave_cleanly()
    if not _debugging():
        os.environ["RUST_BACKTRACE"] = "0"  # a tokenizer that panics is one line of ours
    shown = sys.stderr is not None and sys.stderr.isatty()
    with noticing_interrupts(lambda: note("stopping ...")) if shown else nullcontext():
        code = run(args)
    sys.exit(code)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and lets no exception out."""
    _prepare_streams()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note_warning
            code = cli.main(args, prog_name="mlxrun", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except SystemExit as leaving:  # click's answer to a closed pipe
        return _unread(CLOSED_PIPE) if leaving.code == 1 else int(leaving.code or 0)
    except BrokenPipeError:
        return _unread(CLOSED_PIPE)
    except Exception as error:
        gone = isinstance(error, OSError) and error.errno == errno.EIO and _terminal_is_gone()
        return _unread(CLOSED_TERMINAL) if gone else _report(error)


def _leave_cleanly() -> None:
    """End on SIGTERM and SIGHUP as on Ctrl-C: unfinished work, such as a conversion, is undone."""

    def leave(number: int, _: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one of them
            signal.signal(number, leave)


def _prepare_streams() -> None:
    """Open closed standard streams, and replace characters that one cannot encode by ``?``."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _note_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning on one line, without its place in the code."""
    from mlxrun.cli.console import note

    note(f"warning: {message}")


def _terminal_is_gone() -> bool:
    """Whether the terminal of a standard stream has been closed."""
    for stream in range(3):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                return True
    return False


def _unread(code: int) -> int:
    """Discard the rest of the output, of which Python would complain; returns the code."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - until the end
    return code


def _debugging() -> bool:
    return os.environ.get("MLXRUN_DEBUG", "0") not in ("", "0")


def _report(error: Exception) -> int:
    from mlxrun.cli.console import complain

    if _debugging():
        traceback.print_exception(error)
    elif isinstance(error, MlxrunError):
        complain(str(error))
    elif isinstance(error, OSError) and error.strerror:  # a full disk, a directory that is gone
        complain(f"{error.strerror}: {error.filename or 'the output could not be written'}")
    else:
        complain(
            f"{type(error).__name__}: {error}; run again with MLXRUN_DEBUG=1 for the traceback"
        )
    return ERROR
