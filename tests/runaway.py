"""Templates that run away, rendered where a test can leave them behind."""

from __future__ import annotations

import threading
from collections.abc import Callable

from patience import PATIENCE

from mlxrun.errors import TemplateError


def refusal(render: Callable[[str], str], source: str) -> TemplateError:
    """The error of a template, from a thread that can be abandoned."""
    caught: list[BaseException] = []

    def work() -> None:
        try:
            render(source)
        except BaseException as reason:
            caught.append(reason)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert caught and isinstance(caught[0], TemplateError), caught
    return caught[0]
