"""``mlxrun check-batch``: does a model give each request the tokens that it gets alone?"""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from mlxrun.cli.adapters import Adapters
from mlxrun.cli.completion import ModelName
from mlxrun.cli.console import Bar, Output, table
from mlxrun.cli.counts import TokenCount
from mlxrun.cli.loading import load_model, with_loading
from mlxrun.cli.sections import Command


@click.command("check-batch", cls=Command)
@click.argument("model", type=ModelName())
@click.option(
    "--requests", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How many."
)
@click.option(
    "--tokens",
    type=TokenCount(1, 100_000),
    metavar="N",
    default=64,
    show_default=True,
    help="The most tokens that a request draws.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 1024),
    default=20,
    show_default=True,
    help="The most requests that are served at once.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and lengths.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_loading
def check_batch_command(
    model: str,
    requests: int,
    tokens: int,
    parallel: int,
    seed: int,
    as_json: bool,
    dtype: str | None,
    policy: str | None,
    products: str | None,
    adapter: Adapters,
    wired: bool,
    verbose: bool,
) -> None:
    """Compare requests served together with each alone.

    Random prompts of 4 to 300 tokens are continued one at a time, then together: by default in one
    forward pass for all, whose rounding may decide between tokens that are nearly as likely, and
    deterministic, which computes each sequence by itself. Nothing is taken over from prompts that
    were read before. Ends with exit code 1 if the deterministic way ever differs.

    \b
    Examples:
      mlxrun check-batch model.gguf
      mlxrun check-batch model.gguf --requests 100 --parallel 32 --json
    """
    from mlxrun.checking import check_batch

    llm = load_model(
        model,
        dtype=dtype,
        policy=policy,
        products=products,
        adapter=adapter,
        wired=wired,
        verbose=verbose,
    )
    with Bar("Serving", count="requests") as bar:
        ways = check_batch(
            llm, requests=requests, tokens=tokens, parallel=parallel, seed=seed, progress=bar
        )
    if as_json:
        print(json.dumps({"model": model, "ways": [asdict(way) for way in ways]}))
    else:
        columns = ("way", "#equal", "#differences a token", "#tokens/s", "#x one at a time")
        rows = [
            (
                way.name,
                f"{way.equal} of {way.requests}",
                f"{(way.requests - way.equal) / max(1, way.same):.2g}",
                f"{way.tokens / way.seconds:.0f}",
                f"{way.alone / way.seconds:.2f}",
            )
            for way in ways
        ]
        Output().print(table("", columns, rows))
    if any(way.equal < way.requests for way in ways if "deterministic" in way.name):
        click.get_current_context().exit(1)
