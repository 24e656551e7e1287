"""``mlxrun perplexity``: how well a model predicts a text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from mlxrun.cli.adapters import Adapters
from mlxrun.cli.caches import with_cache_types
from mlxrun.cli.completion import ModelName
from mlxrun.cli.console import Output, json_of, table
from mlxrun.cli.loading import load_model, with_loading
from mlxrun.cli.scoring import read_on, read_text, scored, shown, with_windows
from mlxrun.cli.sections import Command
from mlxrun.config import CacheConfig, CacheTypeOptions, names_of


@click.command("perplexity", cls=Command)
@click.argument("model", type=ModelName())
@click.argument("file")
@with_windows
@with_cache_types
@with_loading
def perplexity_command(
    model: str,
    file: str,
    as_json: bool,
    dtype: str | None,
    policy: str | None,
    products: str | None,
    adapter: Adapters,
    wired: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Measure how well a model predicts a text.

    Perplexity is exp of the mean negative log-likelihood of the text's tokens: 1 is certainty, and
    less is better; texts and vocabularies of their own have perplexities of their own. FILE is
    UTF-8 text, - standard input. It is read in windows, as llama.cpp's llama-perplexity does, and
    with the same context and the same weights gives the same figure. Every token of a window meets
    the others as the cache stores them, so that --cache-type-k and --cache-type-v have their full
    effect. The standard error takes tokens as independent. Ctrl-C ends early and prints what was
    measured by then.

    \b
    Examples:
      mlxrun perplexity model.gguf wiki.test.raw
      mlxrun perplexity model.gguf wiki.test.raw --context 2048 --chunks 20
      mlxrun perplexity model.gguf wiki.test.raw --cache-type-k q8 --cache-type-v q4
    """
    from mlxrun.quality.measure import Scoring

    text = read_text(file)
    llm = load_model(
        model,
        dtype=dtype,
        policy=policy,
        products=products,
        adapter=adapter,
        wired=wired,
        verbose=verbose,
        cache_types=(options["cache_type_k"], options["cache_type_v"]),
    )
    types = {name: options.pop(name) for name in names_of(CacheTypeOptions)}
    scoring = Scoring(llm, text, cache=CacheConfig(**types), **options)
    interrupted = read_on(scoring, "Reading", "perplexity")
    result = scoring.result()
    if as_json:
        about = {"model": model, "file": file, "interrupted": interrupted}
        print(json_of(about | asdict(result)))
    else:
        rows = [
            ("perplexity", shown(result.perplexity)),
            ("nats a token", shown(result.surprise)),
            ("scored", scored(result)),
        ]
        Output().print(table("", ("", ""), rows, header=False))
    if interrupted:
        raise click.Abort
