"""The page ``docs/cli.md``, made of the help texts.

``python -m mlxrun.cli.reference > docs/cli.md`` writes it; a test keeps it up to date.
"""

from __future__ import annotations

import click

from mlxrun.cli.main import COMMANDS, HELP_OPTIONS, cli

WIDTH = 100

_INTRODUCTION = """\
# The command line

<!-- Made by `python -m mlxrun.cli.reference > docs/cli.md` from the help texts: edit those. -->

Results go to standard output; notes, errors and progress go to standard error. Progress bars and
color appear on a terminal only, and no color if `NO_COLOR` is set.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | an error; one line on standard error says what, where and what to do |
| 2 | wrong usage |
| 129 | the terminal was closed |
| 130 | interrupted by Ctrl-C |
| 141 | the reader of a pipe has closed it |
| 143 | terminated |

`-v` prints every choice made for a model, and the options that change it. On the CPU a GGUF's
matrices stay the blocks of the mapped file; `MLXRUN_PRODUCTS` is the default of `--products`. Other
quantized weights, and those of directories, become plain float32 if that takes up to half of the
free memory; `MLXRUN_PLAIN_SHARE` sets another share, from 0 (they stay packed) to 1.

Sampling options that are left out are the model's own, where its `generation_config.json` or its
GGUF's `general.sampling.*` names them, and else mlxrun's. `mlxrun inspect`, `-v` and `/set` in a
chat show them.

`MLXRUN_DEBUG=1` shows the traceback of an error. `MLXRUN_BLAS` names the BLAS library for MLX on
Linux; `0` switches the search for one off. `MLXRUN_HISTORY=off` stores no typed messages in the
history file.

## Completion in a shell

Commands, options, types of caches and models: a MODEL is completed from the Hugging Face cache, and
from `.gguf` files and model directories in the current folder (or the one that is typed).

| shell | line | in |
|---|---|---|
| bash (4.4 or newer) | `eval "$(_MLXRUN_COMPLETE=bash_source mlxrun)"` | `~/.bashrc` |
| zsh | `eval "$(_MLXRUN_COMPLETE=zsh_source mlxrun)"` | `~/.zshrc` |
| fish | `_MLXRUN_COMPLETE=fish_source mlxrun \\| source` | `~/.config/fish/config.fish` |
"""


def render() -> str:
    """The whole page, Markdown."""
    root = _context(cli, "mlxrun", None)
    parts = [_INTRODUCTION, _section("mlxrun", cli.get_help(root))]
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        context = _context(command, name, root)
        parts.append(_section(f"mlxrun {name}", command.get_help(context)))
    return "\n".join(parts)


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    return click.Context(
        command,
        parent=parent,
        info_name=name,
        max_content_width=WIDTH,
        terminal_width=WIDTH,
        help_option_names=HELP_OPTIONS,
    )


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    print(render(), end="")
