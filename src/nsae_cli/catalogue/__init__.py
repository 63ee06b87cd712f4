"""Every class of failure that a user can meet: when it happens and what to do. docs/errors.md is made from it.

`usage` (exit code 2), `artifacts` (3), `environment` (4), `numbers` (5) and `busy` (6) hold the entries; this module
has them all, to be raised as ``raise catalogue.DISK_FULL("…")``. The message names the file or option, the value and
the remedy; the entry says what is common to all messages of its class. Names are stable: scripts and documents may
refer to them.
"""

from typing import Any

from nsae_cli.catalogue.artifacts import *  # noqa: F403 - entries, whose list would only be written twice
from nsae_cli.catalogue.busy import *  # noqa: F403
from nsae_cli.catalogue.environment import *  # noqa: F403
from nsae_cli.catalogue.numbers import *  # noqa: F403
from nsae_cli.catalogue.usage import *  # noqa: F403
from nsae_cli.errors import Entry

#: Every entry under the name of its constant.
ENTRIES: dict[str, Entry[Any]] = {name: value for name, value in list(globals().items()) if isinstance(value, Entry)}
