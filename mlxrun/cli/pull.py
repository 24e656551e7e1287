"""``mlxrun pull``: a model from the hub, ahead of its use."""

from __future__ import annotations

import click

from mlxrun.cli.console import Bar, note, visible


@click.command("pull")
@click.argument("source", metavar="ORG/REPO[:QUANT]")
def pull_command(source: str) -> None:
    """Download a model from the hub.

    Prints its size, its footprint in this machine's memory, and its path. Any command takes the
    same name and downloads missing files; an interrupted download resumes.

    \b
    Example:
      mlxrun pull org/repo:Q4_K_M
    """
    from mlxrun.hub import pull

    with Bar("Downloading", delay=0) as bar:
        path = pull(source, progress=bar, notify=note)
    print(visible(str(path)))
