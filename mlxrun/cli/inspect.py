"""``mlxrun inspect``: a model's contents, conversions and memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from mlxrun.cli.console import Table, show, size
from mlxrun.cli.loading import located, refuse_policy
from mlxrun.cli.options import (
    MAX_COUNT,
    Command,
    ModelName,
    with_cache_types,
    with_options,
)
from mlxrun.cli.roofline import print_model, with_chips
from mlxrun.config import POLICIES, CacheConfig, Option, Range

Facts = dict[str, Any]
# Characters of a metadata value.
WIDEST = 100
_CONTEXT = Option(
    Range(1, MAX_COUNT, whole=True),
    "Tokens to plan memory for.",
    default_help="the model's context length",
    metavar="N",
)


@click.command("inspect", cls=Command)
@click.argument("model", type=ModelName())
@with_options({"context": _CONTEXT}, "Options")
@click.option(
    "--parallel",
    type=click.IntRange(1, MAX_COUNT),
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
@click.option("-v", "--verbose", is_flag=True, help="Show all facts.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def inspect_command(
    model: str,
    context: int | None,
    parallel: int,
    chips: tuple[str, ...],
    policy: str | None,
    verbose: bool,
    tensors: bool,
    as_json: bool,
    **storage: Any,
) -> None:
    """Show a model's contents and the memory it needs.

    Shows the kind of model and whether it fits into this machine's memory. -v adds metadata,
    tensors by type, the form and size of a conversion under each policy, cache types, the terms of
    the memory plan, and the bytes and operations per token. --policy, --tensors, --chip, --context,
    --parallel and cache types add their own part; --json has all. Reads headers only. MODEL may
    also be a vocabulary without weights, or of an architecture that mlxrun cannot run.

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
        cache=CacheConfig(**storage),
        chips=chips,
        policy=policy,
    )
    if not tensors:
        del facts["tensors"]
    if as_json:
        print(json.dumps({"source": model, **facts}, ensure_ascii=False))
        return
    _print_source(path.resolve().name, facts)
    _print_essentials(facts)
    if verbose:
        _print_contents(facts)
    _print_tensors(facts)
    if verbose or policy:
        _print_policies(facts["policies"], detailed=policy is not None)
    if verbose and facts["cache_types"]:
        _print_cache_types(facts["cache_types"], facts["context"])
    if plan := facts["plan"]:
        asked = context or parallel > 1 or any(storage.values())
        (_print_plan if verbose or asked else _print_verdict)(plan)
    if facts["work"] and (verbose or chips):
        show("")
        print_model(facts["work"])
    if not verbose:
        show("inspect -v shows everything.")


def _print_source(name: str, facts: Facts) -> None:
    if facts["format"].startswith("GGUF"):
        for file in facts["files"]:
            show(f"{file['name']}  {facts['format']}, {size(file['bytes'])}")
    else:
        nbytes = sum(kind["bytes"] for kind in facts["types"])
        show(f"{name}  {facts['format']}, {size(nbytes)} of weights")
    show("")


def _print_essentials(facts: Facts) -> None:
    if facts["problem"]:
        show(f"Cannot be run: {facts['problem']}")
        show("")
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
        rows.append(("sampling", _sampling(facts["sampling"])))
        rows += [("", problem) for problem in facts["sampling"]["problems"]]
    if model and facts["chat_template"] is not None:
        none = "none, so probably a base model; `mlxrun generate` continues text"
        rows.append(("chat template", "yes" if facts["chat_template"] else none))
    if facts["tokenizer_problem"]:
        rows.append(("tokenizer", f"cannot be used: {facts['tokenizer_problem']}"))
    if plan:
        rows.append(("runs here as", plan["held"]))
        available = "" if plan["available"] is None else f", of {size(plan['available'])} available"
        rows.append(("memory", f"{size(plan['needed'])} for {_sequences(plan)}{available}"))
    show(Table(rows=rows), "")


def _millions(count: int) -> str:
    return f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"


def _sampling(sampling: Facts) -> str:
    values = ", ".join(f"{name} {value:g}" for name, value in sampling["values"].items())
    return f"{values} ({sampling['source']}), else mlxrun's" if values else "mlxrun's own"


def _print_contents(facts: Facts) -> None:
    metadata = [(key, _value(value)) for key, value in facts["metadata"].items()]
    show(Table("Metadata", rows=metadata), "")
    if facts["model"]:
        model = [(name, str(value)) for name, value in facts["model"].items() if value is not None]
        show(Table("Model", rows=model), "")
    if facts["types"]:
        show(Table.of("Tensors by type", facts["types"]), "")


def _print_tensors(facts: Facts) -> None:
    """Tensors one by one, if they are listed, and the result of their conversion."""
    if tensors := facts.get("tensors"):
        rows = [tensor | {"shape": str(tensor["shape"])} for tensor in tensors]
        show(Table.of("Tensors", rows), "")
    for skipped in facts["skipped"]:
        show(f"A conversion skips {skipped['name']} ({skipped['type']}): {skipped['reason']}")
    if report := facts.get("conversion"):
        counts = ", ".join(f"{count} {kind}" for kind, count in report["fidelity"].items())
        show(f"Converted from {report['source']}, policy {report['policy']}: {counts}", "")


def _print_policies(policies: Sequence[Facts], *, detailed: bool) -> None:
    """The expected result of a conversion under each policy."""
    for estimate in policies if detailed else ():
        title = f"Forms under policy {estimate['policy']} (expected)"
        show(Table.of(title, estimate["forms"]), "")
    if policies:
        rows = [row | {"note": _refusal(row["impossible"])} for row in policies]
        show(Table.of("Conversion (expected from types; no weight was read)", rows), "")


def _refusal(types: Sequence[str]) -> str:
    return f"refused: {', '.join(types)} cannot be converted" if types else ""


def _print_cache_types(kinds: Sequence[Facts], context: int) -> None:
    rows = [
        {key: kind[key] for key in ("type", "keys", "values")}
        | {
            "bits per number": kind["bits"],
            f"#{context} tokens": kind["context"] and size(kind["context"]),
        }
        for kind in kinds
    ]
    show(Table.of("Cache types, in bytes per token", rows))
    show("Any type of keys goes with any of values (--cache-type-k, --cache-type-v).", "")


def _value(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"length", "first"}:
        first = ", ".join(_value(entry) for entry in value["first"])
        return f"[{first}, ...] ({value['length']} entries)"
    text = f"{value:.7g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}... ({len(text)} characters)"


def _sequences(plan: Facts) -> str:
    count = plan["parallel"]
    return f"{'one sequence' if count == 1 else f'{count} sequences'} of {plan['context']} tokens"


def _print_plan(plan: Facts) -> None:
    parallel = plan["parallel"]
    caches = plan["sequence"] * parallel
    each = f", {parallel} x {size(plan['sequence'])}" if parallel > 1 else ""
    rows = [
        (f"weights ({plan['held']})", size(plan["weights"])),
        (f"+ keys and values{each}", size(caches)),
        ("+ scratch of a pass", size(plan["scratch"])),
        ("+ reserve", size(plan["reserve"])),
        ("= needed", size(plan["needed"])),
        ("+ prefix cache, at most", size(plan["kept"])),
        ("= total", size(plan["total"])),
    ]
    if plan["available"] is not None:
        rows.append(("available", size(plan["available"])))
    show(f"Memory plan: {_sequences(plan)}")
    show(Table("", ("", "#"), rows))
    _print_verdict(plan)


def _print_verdict(plan: Facts) -> None:
    """Whether it fits, and the largest context and number of sequences that do."""
    context, trained = plan["context"], plan["trained_context"]
    if plan["available"] is not None:
        show(_verdict(plan))
    if context > trained:
        show(f"The model was trained for {trained} tokens, not for {context}.")


def _verdict(plan: Facts) -> str:
    from mlxrun.memory.plan import LONGEST

    sequences = "one sequence" if plan["parallel"] == 1 else f"{plan['parallel']} sequences"
    longest, most = plan["largest_context"], plan["largest_parallel"]
    whole = ", the model's context" if longest == plan["trained_context"] else ""
    up_to = f"of up to {longest} tokens{whole}"
    at_once = "any number" if most >= LONGEST else f"up to {most}" if most else "none"
    verdict = "It fits." if plan["fits"] else "It does not fit."
    if not longest and not most:
        return verdict
    if not longest:
        fewer = f"there is for {at_once} of {plan['context']} tokens"
        return f"{verdict} There is no room for {sequences}, however short; {fewer}."
    room = f"There is room for {sequences} {up_to}, and for {at_once} of {plan['context']} tokens."
    return f"{verdict} {room}"
