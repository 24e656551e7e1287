"""``mlxrun inspect``: what is in a model, what conversion would do, and the memory it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from mlxrun.cli.caches import with_cache_types
from mlxrun.cli.completion import ModelName
from mlxrun.cli.console import Output, size, table
from mlxrun.cli.counts import MOST, TokenCount
from mlxrun.cli.loading import POLICIES, located, refuse_policy
from mlxrun.cli.planned import print_plan, print_verdict, sequences
from mlxrun.cli.roofline import print_model, with_chips
from mlxrun.cli.sections import Command
from mlxrun.config import CacheConfig

# Longest metadata value that is shown in full.
WIDEST = 100


@click.command("inspect", cls=Command)
@click.argument("model", type=ModelName())
@click.option(
    "--context",
    type=TokenCount(),
    metavar="N",
    help="Tokens to plan memory for.  [default: the model's context length]",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, MOST),
    default=1,
    metavar="N",
    help="Sequences at once to plan memory for.  [default: 1]",
)
@with_cache_types
@with_chips
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    help="Estimate this conversion only, type by type, and plan with it.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show everything that is known.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def inspect_command(
    model: str,
    context: int | None,
    parallel: int,
    cache_type_k: str | None,
    cache_type_v: str | None,
    chips: tuple[str, ...],
    policy: str | None,
    verbose: bool,
    tensors: bool,
    as_json: bool,
) -> None:
    """Show what is in a model and what it needs.

    Tells what the model is and whether it fits into this machine's memory. -v adds metadata,
    tensors by type, what a conversion would do under each policy and how large it would get, types
    of caches, the terms of the memory plan, and the bytes and operations of a token. --policy,
    --tensors, --chip, --context, --parallel and types of caches add their own part; --json has it
    all. Reads headers only. MODEL may also be a vocabulary without weights, or of an architecture
    that mlxrun cannot run.

    \b
    Examples:
      mlxrun inspect model.gguf
      mlxrun inspect model.gguf --policy near
      mlxrun inspect model.gguf --context 32768 --parallel 8 --cache-type-k q8 --cache-type-v q4
      mlxrun inspect model.gguf --context 4096 --parallel 8 --chip m1-pro --chip h100
    """
    from mlxrun.cli.inspection import inspect_model

    path = located(model)
    refuse_policy(path, policy)
    facts = inspect_model(
        path,
        context=context,
        parallel=parallel,
        cache=CacheConfig(cache_type_k=cache_type_k, cache_type_v=cache_type_v),
        chips=chips,
        policy=policy,
    )
    if not tensors:
        del facts["tensors"]
    if as_json:
        print(json.dumps({"source": model, **facts}, ensure_ascii=False))
    else:
        _print_source(path.resolve().name, facts)
        if verbose:
            _print_all(facts, detailed=policy is not None)
        else:
            asked = context or parallel > 1 or cache_type_k or cache_type_v
            _print_essentials(facts, policies=bool(policy), plan=bool(asked), work=bool(chips))


def _print_source(name: str, facts: Mapping[str, Any]) -> None:
    out = Output()
    if facts["format"].startswith("GGUF"):
        for file in facts["files"]:
            out.print(f"{file['name']}  {facts['format']}, {size(file['bytes'])}")
    else:
        nbytes = sum(kind["bytes"] for kind in facts["types"])
        out.print(f"{name}  {facts['format']}, {size(nbytes)} of weights")
    out.print()


def _print_essentials(facts: Mapping[str, Any], *, policies: bool, plan: bool, work: bool) -> None:
    """What most people want to know, and the parts that were asked for."""
    out = Output()
    if facts["problem"]:
        out.print(f"Cannot be run: {facts['problem']}")
        out.print()
    out.print(table("", ("", ""), _essentials(facts), header=False))
    out.print()
    _print_listed(facts)
    if policies:
        _print_policies(facts, detailed=True)
    if facts["plan"]:
        (print_plan if plan else print_verdict)(facts["plan"])
    if facts["work"] and work:
        out.print()
        print_model(facts["work"])
    out.print("inspect -v shows everything.")


def _essentials(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    metadata, model, plan = facts["metadata"], facts["model"], facts["plan"]
    if name := metadata.get("general.name"):
        rows.append(("name", str(name)))
    rows.append(("architecture", facts["architecture"]))
    if model:
        through = f", {model['runs']}" if model["runs"] else ""
        rows.append(("layers", f"{model['layers']}{through}"))
    if facts["types"]:
        weights = sum(kind["weights"] for kind in facts["types"])
        kinds = ", ".join(kind["type"] for kind in facts["types"])
        rows.append(("weights", f"{_millions(weights)}: {kinds}"))
    if model:
        rows.append(("context", f"{model['context_length']} tokens"))
        rows.append(("sampling", _sampling(facts)))
    if model and facts["chat_template"] is not None:
        none = "none, so probably a base model; `mlxrun generate` continues text"
        rows.append(("chat template", "yes" if facts["chat_template"] else none))
    if facts["tokenizer_problem"]:
        rows.append(("tokenizer", f"cannot be used: {facts['tokenizer_problem']}"))
    if plan:
        rows.append(("runs here as", plan["held"]))
        available = "" if plan["available"] is None else f", of {size(plan['available'])} available"
        rows.append(("memory", f"{size(plan['needed'])} for {sequences(plan)}{available}"))
    return rows


def _millions(count: int) -> str:
    return f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"


def _print_all(facts: Mapping[str, Any], *, detailed: bool) -> None:
    out = Output()
    metadata = [(key, _value(value)) for key, value in facts["metadata"].items()]
    out.print(table("Metadata", ("", ""), metadata, header=False))
    out.print()
    if facts["problem"]:
        out.print(f"Cannot be run: {facts['problem']}")
    else:
        model = [(name, value) for name, value in facts["model"].items() if value is not None]
        out.print(table("Model", ("", ""), model, header=False))
    out.print()
    _print_use(facts)
    _print_types(facts)
    _print_listed(facts)
    _print_policies(facts, detailed)
    _print_memory(facts)


def _print_use(facts: Mapping[str, Any]) -> None:
    """What the model's files say about how to run it."""
    out = Output()
    out.print(f"Sampling defaults: {_sampling(facts)}")
    for problem in facts["sampling"]["problems"]:
        out.print(f"Sampling defaults: {problem}")
    if facts["tokenizer_problem"]:
        out.print(f"The tokenizer cannot be used: {facts['tokenizer_problem']}")
    if facts["chat_template"] is False:
        out.print("Chat template: none, so probably a base model; `mlxrun generate` continues text")
    out.print()


def _sampling(facts: Mapping[str, Any]) -> str:
    """Whose the defaults of sampling are."""
    sampling = facts["sampling"]
    values = ", ".join(f"{name} {value:g}" for name, value in sampling["values"].items())
    return f"{values} ({sampling['source']}), else mlxrun's" if values else "mlxrun's own"


def _print_types(facts: Mapping[str, Any]) -> None:
    out = Output()
    if facts["types"]:
        columns = ("type", "#tensors", "#weights", "#size", "#bits a weight")
        rows = [
            (t["type"], t["tensors"], f"{t['weights']:,}", size(t["bytes"]), f"{t['bits']:.4g}")
            for t in facts["types"]
        ]
        out.print(table("Tensors by type", columns, rows))
        out.print()


def _print_listed(facts: Mapping[str, Any]) -> None:
    """Tensors one by one, and what became or would become of them."""
    out = Output()
    if facts.get("tensors"):
        entries = [(t["name"], t["type"], t["shape"], size(t["bytes"])) for t in facts["tensors"]]
        out.print(table("Tensors", ("name", "type", "shape", "#size"), entries))
        out.print()
    for skipped in facts["skipped"]:
        line = f"A conversion skips {skipped['name']} ({skipped['type']}): {skipped['reason']}"
        out.print(line)
    if facts.get("conversion"):
        report = facts["conversion"]
        counts = ", ".join(f"{count} {kind}" for kind, count in report["fidelity"].items())
        line = f"Converted from {report['source']}, policy {report['policy']}: {counts}"
        out.print(line)
        out.print()


def _print_policies(facts: Mapping[str, Any], detailed: bool) -> None:
    out = Output()
    if not facts["policies"]:
        return
    for estimate in facts["policies"] if detailed else ():
        forms = [
            (f["type"], f["form"], f["fidelity"], f["tensors"], size(f["bytes"]))
            for f in estimate["forms"]
        ]
        title = f"Forms under policy {estimate['policy']} (expected)"
        out.print(table(title, ("GGUF", "MLX", "fidelity", "#tensors", "#size"), forms))
        out.print()
    columns = ("policy", "#size", "#bits a weight", "#exact", "#rounded", "#requantized", "note")
    estimates = [_policy_row(estimate) for estimate in facts["policies"]]
    out.print(table("Conversion (expected from types; no weight was read)", columns, estimates))
    out.print()


def _policy_row(estimate: Mapping[str, Any]) -> tuple[object, ...]:
    counts = dict.fromkeys(("exact", "rounded", "requantized"), 0)
    for form in estimate["forms"]:
        counts[form["fidelity"]] += form["tensors"]
    impossible = ", ".join(estimate["impossible"])
    return (
        estimate["policy"],
        size(estimate["bytes"]),
        f"{estimate['bits']:.2f}",
        *counts.values(),
        f"refused: {impossible} cannot be converted" if impossible else "",
    )


def _print_memory(facts: Mapping[str, Any]) -> None:
    out = Output()
    memory = facts["memory"]
    if memory is None:
        return
    rows = [("cache alone", *(size(held) for held in memory["cache"].values()))]
    for policy, totals in memory["total"].items():
        rows.append((f"with weights: {policy}", *(size(total) for total in totals.values())))
    columns = ("", *(f"#{name} cache" for name in memory["cache"]))
    out.print(table(f"Memory at a context of {memory['context']} tokens", columns, rows))
    if facts["cache_types"]:
        from mlxrun.cli.cache_table import print_cache_types

        out.print()
        print_cache_types(facts["cache_types"], memory["context"])
    if facts["plan"]:
        out.print()
        print_plan(facts["plan"])
    if facts["work"]:
        out.print()
        print_model(facts["work"])


def _value(value: Any) -> str:
    """A metadata value on one line."""
    if isinstance(value, dict) and set(value) == {"length", "first"}:
        first = ", ".join(_value(entry) for entry in value["first"])
        return f"[{first}, ...] ({value['length']} entries)"
    text = f"{value:.7g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}... ({len(text)} characters)"
