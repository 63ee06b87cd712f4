"""One question to the Hugging Face hub before anything is downloaded: is it there, and which commit is meant?

The hub client retries a dead connection for half a minute per file. Asking once, without retries, makes a machine
without network fail at once, and lets it work from the local cache where the files are there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nsae_cli import catalogue
from nsae_cli.errors import ResourceError

_TIMEOUT_SECONDS = 10
_TOKEN = re.compile(r"[!-~]+")
LOG_IN = "run `hf auth login`"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True)
class HubRepository:
    """What the hub knows of a repository.

    Attributes:
        reachable: False where the hub did not answer: only the local cache can serve.
        commit: the commit that the revision stands for; None where not reachable.
        files: the repository's file names; None where not reachable.
    """

    reachable: bool
    commit: str | None = None
    files: tuple[str, ...] | None = None


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` can be an id on the hub: ``name`` or ``owner/name``."""
    return _HUB_ID.fullmatch(name) is not None


def ask_hub(
    kind: Literal["model", "dataset"], name: str, revision: str | None, remedy: str, option: str | None = None
) -> HubRepository:
    """Asks the hub for a model or data set.

    Args:
        kind: what `name` is.
        name: hub id.
        revision: branch, tag or commit; None for the default branch.
        remedy: what to type instead, for messages.
        option: how messages call what was asked for; None for the option that names such a repository.

    Raises:
        ResourceError: the hub answered that there is no such repository or revision, that access is restricted, or
            that it does not know the token.
    """
    option = option or ("--model" if kind == "model" else "--corpus")
    known_token()
    try:
        api = HfApi()
        ask = api.model_info if kind == "model" else api.dataset_info
        found = ask(name, revision=revision, timeout=_TIMEOUT_SECONDS)
    except RevisionNotFoundError as error:
        raise catalogue.HUB_REVISION(
            f"{option} {name}: the hub has no revision {revision!r} of it; check --revision"
        ) from error
    except GatedRepoError as error:
        raise catalogue.HUB_GATED(f"{option} {name}: access is restricted; run `hf auth login`, or {remedy}") from error
    except RepositoryNotFoundError as error:
        raise catalogue.HUB_NOT_FOUND(
            f"{option} {name}: the hub has no such {kind}, or it is private; {remedy}"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise refused_token(f"{option} {name}") from error
        return HubRepository(reachable=False)
    except (HTTPError, OSError):  # no connection, no answer in time, a server error, HF_HUB_OFFLINE
        return HubRepository(reachable=False)
    return HubRepository(
        reachable=True,
        commit=found.sha,
        files=tuple(sibling.rfilename for sibling in found.siblings or ()),
    )


def known_token() -> str | None:
    """The token of the hub that this machine has; None for none. It goes nowhere but into requests to the hub.

    Raises:
        ResourceError: it holds characters that no token has. The client would quote it in what it says of that.
    """
    token = get_token()
    if token is not None and not _TOKEN.fullmatch(token):
        raise catalogue.HUB_LOGIN(f"the token of the Hugging Face hub on this machine is not a token; {LOG_IN}")
    return token


def refused_token(what: str) -> ResourceError:
    """What to raise where the hub answers that it does not know the token."""
    return catalogue.HUB_LOGIN(f"{what}: the Hugging Face hub does not know the token of this machine; {LOG_IN}")
