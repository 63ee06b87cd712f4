"""Keeps log lines, warnings and progress bars of transformers, huggingface_hub and datasets off the terminal.

What they have to say and matters is raised as an error by the caller; nsae's own progress is the reporter's.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

_LOGGERS = ("transformers", "huggingface_hub", "datasets", "httpx", "httpx2", "fsspec", "urllib3")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence while the context is open; earlier settings return afterwards."""
    import transformers.utils.logging as transformers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hub_bars = not are_progress_bars_disabled()
    transformers_bars = transformers_logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        disable_progress_bars()
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if hub_bars:
            enable_progress_bars()
        if transformers_bars:
            transformers_logging.enable_progress_bar()
