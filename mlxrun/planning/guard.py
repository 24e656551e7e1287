"""Before weights are read: refuse what cannot be, warn of what is tight."""

from __future__ import annotations

import sys
from pathlib import Path

from converters.gguf.reader import GGUFFile
from mlxrun.errors import ConversionError, MemoryLimitError
from mlxrun.memory import LIMIT, bound_cache, machine_memory, room
from mlxrun.planning.plan import MemoryPlan
from mlxrun.planning.source import footprint, promised

# Tokens of a conversation that a model should have room for.
USUAL = 4096


def before_loading(
    source: Path | GGUFFile, *, dtype: str | None = None, policy: str | None = None
) -> None:
    """Refuse a model whose weights alone are too many; warn on stderr of one that hardly fits.

    Also bounds the buffers that MLX keeps for reuse; see :func:`mlxrun.memory.bound_cache`.

    Args:
        source: a GGUF, or a model directory.
        dtype, policy: as :func:`mlxrun.load` takes them.

    Raises:
        MemoryLimitError: the weights alone exceed the memory of this machine.
        ParameterError: an option, or ``MLXRUN_MEMORY_LIMIT``, has no such value.
    """
    try:
        config, held = promised(source, dtype=dtype, policy=policy)
        plan = MemoryPlan(footprint(config, held), held.nbytes, room())
    except ConversionError:  # loading will tell what is wrong with the model
        return
    most = machine_memory()
    if most and plan.weights > most:
        raise MemoryLimitError(
            plan.weights,
            most,
            "to hold the weights alone",
            f"Use a smaller model or quantisation; {LIMIT}=none in the environment tries it",
        )
    trained = config.get("max_position_embeddings")
    usual = min(USUAL, trained) if isinstance(trained, int) and trained > 0 else USUAL
    if told := tight(plan, usual):
        print(f"warning: {told}", file=sys.stderr)
    bound_cache(plan.weights)


def tight(plan: MemoryPlan, context: int) -> str | None:
    """What to tell of a plan that has no room for a usual conversation; None of one that has.

    Args:
        context: tokens of such a conversation, no more than the model was trained for.
    """
    terms = plan.terms(context)
    if terms.fits:
        return None
    longest = plan.context_for()
    holds = f"a context of about {longest} tokens" if longest else "hardly any context"
    return (
        f"memory is tight: {terms.total / 1e9:.1f} GB for a context of {context} tokens, and "
        f"{room() / 1e9:.1f} GB are free; there is room for {holds}"
    )
