"""huggingface_hub as mlxrun wants it: silent, asking for models only, patient with a busy hub."""

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
_PAUSES = (1.0, 2.0, 4.0)  # seconds before another try, where the hub does not say
_LONGEST_PAUSE = 30.0  # a hub that asks for more is better tried another time


@contextmanager
def unobtrusive() -> Iterator[None]:
    """huggingface_hub without bars of its own, and asked for nothing but the model.

    The caller has ``progress``, and pipes have none. To say in its user agent who calls,
    huggingface_hub fetches a list of known callers from the endpoint, believes whatever JSON comes
    and keeps it: a mirror or portal that answers ``[]`` breaks every later request of the process.
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
    """The answer to a request; a hub that is busy is asked again, when it says or a little later.

    Raises:
        HfHubHTTPError: refused, or busy for too long.
    """
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
    """Seconds that ``Retry-After`` asks for; 0 where it does not, or names a date."""
    text = str(error.response.headers.get("Retry-After", ""))
    return float(text) if text.isascii() and text.isdigit() else 0.0
