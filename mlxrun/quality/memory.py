"""Whether what is to be scored or compared fits into memory, all of it at once."""

from __future__ import annotations

from collections.abc import Sequence

from mlxrun.errors import MemoryLimitError
from mlxrun.memory.plan import MemoryPlan
from mlxrun.quality.reading import rows_at_once

# Arrays as large as some rows of float32 logits that are there at once while tokens are scored, and
# while two models are compared. Measured on the CPU: 3 and 13.3.
_SCORED, _COMPARED = 4, 14


def check_memory(plans: Sequence[MemoryPlan], context: int, vocab_size: int = 0) -> None:
    """Refuse what there is no memory for.

    Args:
        plans: of each form of a model that is in memory at once; where it has another's weights,
            with weights of 0.
        context: tokens of a window.
        vocab_size: logits of a token; 0 where it is not known yet.

    Raises:
        MemoryLimitError: the forms take more than there is.
    """
    terms = [plan.terms(context) for plan in plans]
    copies = _SCORED if len(plans) == 1 else _COMPARED
    logits = copies * 4 * vocab_size * rows_at_once(vocab_size)
    needed = sum(each.peak for each in terms) + max(each.reserve for each in terms) + logits
    limit = terms[0].limit
    if limit and needed > limit:
        what = "scoring the text" if len(plans) == 1 else "comparing the two, both in memory,"
        hint = "Use a smaller context (context=N, --context N), or smaller forms of the models"
        raise MemoryLimitError(needed, limit, what, hint)
