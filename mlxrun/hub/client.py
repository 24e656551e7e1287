"""huggingface_hub without progress bars and telemetry, with retries for a busy hub."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

T = TypeVar("T")

_BARS = "huggingface_hub"
_NO_TELEMETRY = constants.HF_HUB_DISABLE_TELEMETRY  # as the user has it
_BUSY = (429, 502, 503, 504)
_PAUSES = (1.0, 2.0, 4.0)  # seconds before a retry without Retry-After
_LONGEST_PAUSE = 30.0


@contextmanager
def unobtrusive() -> Iterator[None]:
    """Disable huggingface_hub's progress bars and telemetry.

    For the user agent of its telemetry huggingface_hub fetches a list of known callers from the
    endpoint and keeps whatever JSON comes: a mirror or portal that answers ``[]`` breaks every
    later request of the process.
    """
    allowed = constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    visible = allowed and not are_progress_bars_disabled(_BARS)
    if visible:
        disable_progress_bars(_BARS)
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = _NO_TELEMETRY
        if visible:
            enable_progress_bars(_BARS)


def patiently(ask: Callable[[], T]) -> T:
    """The answer to a request, with retries while the hub is busy."""
    for pause in _PAUSES:
        try:
            return ask()
        except HfHubHTTPError as error:
            wait = _asked_pause(error) or pause
            if error.response.status_code not in _BUSY or wait > _LONGEST_PAUSE:
                raise
        time.sleep(wait)
    return ask()


def _asked_pause(error: HfHubHTTPError) -> float:
    """Seconds of ``Retry-After``; 0 if there is none or it is a date."""
    text = str(error.response.headers.get("Retry-After", ""))
    return float(text) if text.isascii() and text.isdigit() else 0.0
