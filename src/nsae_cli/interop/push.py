"""`nsae push`: SAEs that nsae trained, to the Hugging Face hub in SAELens' layout, each in a folder, with a model card.

Nothing is sent that was not looked at before, byte by byte, and everything becomes visible in one commit: files, the
completion marks, the card. The hub keeps what it got of a large file that was sent before a commit, so that a push that
broke off goes on where it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, RepositoryNotFoundError

from nsae_cli import catalogue, interrupt
from nsae_cli.errors import NsaeError, ResourceError
from nsae_cli.interop.foreign import text
from nsae_cli.interop.hub import HubReference
from nsae_cli.interop.opening import is_foreign, read_folder
from nsae_cli.lm.hub import LOG_IN, known_token, refused_token
from nsae_cli.lm.quiet import quiet_libraries
from nsae_cli.report.model_card import CardEntry, is_written_by_nsae, license_of, model_card
from nsae_cli.reporter import Reporter
from nsae_cli.store.commit import read_json
from nsae_cli.store.findings import damage_of
from nsae_cli.store.sae_folder import CONFIG, DATA_FILES, RUN
from nsae_cli.store.workspace import Artifact, Kind, Workspace
from nsae_cli.training.plan import GROUP

CARD = "README.md"
_TIMEOUT_SECONDS = 10
#: Licences as the hub writes them: mit, apache-2.0, cc-by-4.0.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.\-]{0,59}")


@dataclass(frozen=True)
class PushedSae:
    """An SAE with its place in the repository and the files that go there."""

    artifact: Artifact
    folder: str
    run: dict[str, Any]
    files: dict[str, Path]

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(path.stat().st_size for path in self.files.values())

    def entry(self) -> CardEntry:
        """What the card says of it."""
        return CardEntry(self.folder, self.run, _corpus(read_json(self.artifact.path / CONFIG)))


@dataclass(frozen=True)
class HubState:
    """What the hub has of the repository already.

    Attributes:
        exists, private: of the repository; None where the hub was not asked or did not answer.
        commit: its newest; None for none.
        files: names of its files.
        card: its README.md; None for none.
        others: SAEs of nsae in it that the push leaves alone.
    """

    exists: bool | None = None
    private: bool | None = None
    commit: str | None = None
    files: frozenset[str] = frozenset()
    card: str | None = None
    others: tuple[CardEntry, ...] = ()


@dataclass(frozen=True)
class PushPlan:
    """A push before anything is sent.

    Attributes:
        repository: ``org/repo``.
        saes: what is sent.
        public: whether a repository that is made is public.
        state: what is there already.
        card: the model card; None where the repository has one that nsae did not write.
    """

    repository: str
    saes: tuple[PushedSae, ...]
    public: bool
    state: HubState
    card: str | None = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """For people and programs: destination, files, bytes."""
        card = self.card.encode() if self.card is not None else b""
        folders = [
            {
                "sae": sae.artifact.name,
                "folder": sae.folder,
                "files": sorted(sae.files),
                "bytes": sae.size,
                "replaces": any(f"{sae.folder}/{name}" in self.state.files for name in sae.files),
            }
            for sae in self.saes
        ]
        return {
            "repository": self.repository,
            "exists": self.state.exists,
            "private": not self.public if self.state.private is None else self.state.private,
            "folders": folders,
            "card": None if self.card is None else {"file": CARD, "bytes": len(card)},
            "files": sum(len(sae.files) for sae in self.saes) + (self.card is not None),
            "bytes": sum(sae.size for sae in self.saes) + len(card),
        }


@dataclass(frozen=True)
class Pushed:
    """What came of it: where the SAEs are, the commit, and whether all of it was there before."""

    url: str
    commit: str
    already_there: bool


def plan_push(
    reference: str,
    destination: str,
    workspace: Workspace,
    *,
    public: bool,
    license_: str | None,
    must_ask: bool,
    reporter: Reporter,
) -> PushPlan:
    """Checks the SAEs, every byte of them, and what they would meet on the hub.

    Args:
        reference: an SAE or a group, by its name in the workspace or its path.
        destination: ``org/repo[:folder]`` or ``hf://org/repo[/folder]``.
        public: make a new repository public.
        license_: for the card; None takes that of a card that is there.
        must_ask: whether it is an error if the hub cannot be asked what it has, which needs a token.
        reporter: for progress.

    Raises:
        UsageError: no such SAE, no such kind of destination, or the repository is public and `public` was not said.
        ArtifactError: not complete, damaged, or not an SAE of nsae.
        ResourceError: no token, or the hub does not answer, and `must_ask`.
    """
    where = _destination(destination)
    if license_ is not None and not _LICENSE.fullmatch(license_):
        raise catalogue.OPTION_VALUE(f"--license {license_[:60]!r}: expected an identifier such as mit or apache-2.0")
    saes = _place(_complete(reference, workspace), where)
    with reporter.task("checking", len(saes), "SAEs") as task:
        for sae in saes:
            interrupt.stop_if_requested("stopped; nothing was uploaded")
            _require_whole(sae.artifact)
            task.advance(1)
    try:
        state = _look(where.repository, {sae.folder for sae in saes})
    except ResourceError as error:
        if must_ask:
            raise
        reporter.warn(f"the hub was not asked what it has: {error}")
        state = HubState()
    _require_visibility(where.repository, state, public)
    entries = sorted([*(sae.entry() for sae in saes), *state.others], key=lambda entry: entry.folder)
    own_card = state.card is None or is_written_by_nsae(state.card)
    kept_license = license_ or license_of(state.card or "")
    card = model_card(where.repository, entries, kept_license) if own_card else None
    return PushPlan(where.repository, saes, public, state, card)


def send(plan: PushPlan, reporter: Reporter) -> Pushed:
    """Uploads what `plan_push` has planned, in one commit.

    Raises:
        ResourceError: the hub refuses it, or breaks off. The repository is as it was before.
        Interrupted: a signal asked to stop; likewise.
    """
    api = HfApi(token=_require_token(plan.repository))
    additions = {
        sae.folder: [CommitOperationAdd(f"{sae.folder}/{name}", str(path)) for name, path in sae.files.items()]
        for sae in plan.saes
    }
    every = [addition for files in additions.values() for addition in files]
    if plan.card is not None:
        every.append(CommitOperationAdd(CARD, plan.card.encode()))
    with quiet_libraries(), _answers(plan.repository):
        if not plan.state.exists:
            api.create_repo(plan.repository, private=not plan.public, exist_ok=True)
        with reporter.task("uploading", sum(sae.size for sae in plan.saes), "bytes") as task:
            for sae in plan.saes:
                _poll()
                api.preupload_lfs_files(plan.repository, additions[sae.folder])
                task.advance(sae.size, of=sae.folder)
        _poll()
        names = ", ".join(sae.folder for sae in plan.saes)
        message = f"Upload {names}" if len(names) <= 60 else f"Upload {len(plan.saes)} SAEs"
        made = api.create_commit(plan.repository, every, commit_message=f"{message} with nsae")
        listed = api.model_info(plan.repository, revision=made.oid)
        missing = {one.path_in_repo for one in every} - {one.rfilename for one in listed.siblings or ()}
    if missing:
        raise catalogue.UPLOAD_FAILED(
            f"{plan.repository}: the hub has left out {len(missing)} files, such as {min(missing)}; look at the "
            f"repository's .gitignore, then run the same command again"
        )
    return Pushed(f"{api.endpoint}/{plan.repository}", made.oid, made.oid == plan.state.commit)


def _poll() -> None:
    interrupt.stop_if_requested("stopped before the commit, so that the repository is unchanged; run it again to go on")


# What is sent --------------------------------------------------------------------------------------------------------


def _destination(given: str) -> HubReference:
    where = HubReference.of_argument(given)
    if where.revision is not None:
        raise catalogue.OPTION_VALUE(f"REPO {given[:80]!r}: a push goes to the main branch; leave the revision out")
    return where


def _complete(reference: str, workspace: Workspace) -> list[Artifact]:
    """The SAEs that a reference stands for, all cells of a group being there."""
    for folder in (workspace.folder(Kind.SAE, reference), Path(reference)):
        if is_foreign(folder):
            raise catalogue.NOT_TRAINED_HERE(
                f"{reference} is another package's SAE; `nsae push` sends what `nsae train` made, `hf upload` anything"
            )
    found = workspace.find(Kind.SAE, reference)
    group = found[0].path.parent / GROUP
    if found[0].path.name != Path(reference).name:
        cells = read_json(group).get("cells") if group.is_file() else None
        missing = sorted(set(cells or ()) - {artifact.path.name for artifact in found})
        if missing:
            raise catalogue.UNFINISHED(
                f"{reference}: {len(missing)} of its {len(cells or ())} SAEs are not finished, such as {missing[0]}; "
                f"run the same `nsae train` again, or name one that is, as {found[0].name}"
            )
    return found


def _place(artifacts: Sequence[Artifact], where: HubReference) -> tuple[PushedSae, ...]:
    """Each SAE's folder: the one that was asked for, or the SAE's own name; cells of a group below it."""
    saes = []
    for artifact in artifacts:
        run = read_json(artifact.path / RUN)
        folder = artifact.path.resolve().name if len(artifacts) > 1 or not where.folder else ""
        # The mark comes last, as on disk.
        names = [name for name in DATA_FILES if (artifact.path / name).is_file()]
        files = {name: artifact.path / name for name in (*names, RUN)}
        saes.append(PushedSae(artifact, "/".join(part for part in (where.folder, folder) if part), run, files))
    return tuple(saes)


def _require_whole(artifact: Artifact) -> None:
    """Refuses an SAE of which a byte is not what was written.

    Raises:
        ArtifactError: damaged.
        NumericalError: a weight is not finite.
    """
    finding = damage_of(artifact.path, RUN, lambda: interrupt.stop_if_requested("stopped; nothing was uploaded"))
    if finding is not None:
        raise catalogue.DAMAGE_FOUND(
            f"{artifact.name}: {finding}; nothing was uploaded, run `nsae verify --repair {artifact.name}`"
        )
    read_folder(artifact.path)


def _corpus(config: Any) -> str | None:
    metadata = config.get("metadata") if isinstance(config, dict) else None
    return text(metadata.get("dataset_path")) if isinstance(metadata, dict) else None


# The hub -------------------------------------------------------------------------------------------------------------


def _require_token(repository: str) -> str:
    token = known_token()
    if token is None:
        raise catalogue.HUB_LOGIN(f"{repository}: pushing needs a token of the Hugging Face hub; {LOG_IN}")
    return token


def _look(repository: str, ours: set[str]) -> HubState:
    """Asks the hub, with the token, what the repository holds."""
    api = HfApi(token=_require_token(repository))
    with quiet_libraries(), _answers(repository, uploading=False):
        api.whoami()
        try:
            found = api.model_info(repository, timeout=_TIMEOUT_SECONDS)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return HubState(exists=False)
        files = frozenset(one.rfilename for one in found.siblings or ())
        marks = sorted(name for name in files if name.endswith(f"/{RUN}"))
        others = [name.removesuffix(f"/{RUN}") for name in marks if name.removesuffix(f"/{RUN}") not in ours]
        card = _fetch(repository, found.sha, CARD).read_text(encoding="utf-8") if CARD in files else None
        entries = []
        if card is None or is_written_by_nsae(card):
            for folder in others:
                run = _read(repository, found.sha, f"{folder}/{RUN}")
                config = _read(repository, found.sha, f"{folder}/{CONFIG}") if f"{folder}/{CONFIG}" in files else None
                if isinstance(run, dict) and {"hook", "d_in", "d_sae"} <= set(run):
                    entries.append(CardEntry(folder, run, _corpus(config)))
    return HubState(True, bool(found.private), found.sha, files, card, tuple(entries))


def _fetch(repository: str, revision: str | None, name: str) -> Path:
    return Path(hf_hub_download(repository, name, revision=revision))


def _read(repository: str, revision: str | None, name: str) -> Any:
    try:
        return read_json(_fetch(repository, revision, name))
    except NsaeError:
        return None  # what somebody else put there; the card says nothing of it


def _require_visibility(repository: str, state: HubState, public: bool) -> None:
    if state.private is None or state.private is not public:
        return
    if state.private:
        raise catalogue.REFUSED_COMBINATION(
            f"--public: {repository} is there and private; make it public on its settings page, or leave --public out"
        )
    raise catalogue.REFUSED_COMBINATION(
        f"{repository} is public, so that anybody could see what is uploaded; give --public if that is meant"
    )


@contextmanager
def _answers(repository: str, *, uploading: bool = True) -> Iterator[None]:
    """Turns the hub's refusals and broken connections into one sentence each; no answer is quoted.

    Raises:
        ResourceError: whatever the hub's client raises.
    """
    try:
        yield
    except NsaeError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _explained(repository, error, uploading) from error


def _explained(repository: str, error: BaseException, uploading: bool) -> ResourceError:
    answer: BaseException | None = error
    while answer is not None and not isinstance(answer, HfHubHTTPError):
        answer = answer.__cause__
    status = answer.response.status_code if isinstance(answer, HfHubHTTPError) else None
    if isinstance(answer, GatedRepoError):
        return catalogue.HUB_GATED(f"{repository}: access is restricted; agree on its page, then {LOG_IN}")
    if status == 401 and not isinstance(answer, RepositoryNotFoundError):
        return refused_token(repository)
    if isinstance(answer, RepositoryNotFoundError):
        return catalogue.HUB_REFUSED(
            f"{repository}: the hub has no such repository that this token can write to; check the name and the token"
        )
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        why = {403: "the token may not write there", 413: "too large"}.get(status, f"HTTP {status}")
        return catalogue.HUB_REFUSED(
            f"{repository}: the hub refuses it ({why}); use a token that may write to it, or another repository"
        )
    why = f"HTTP {status}" if status is not None else "no connection"
    if not uploading:
        return catalogue.HUB_UNREACHABLE(
            f"{repository}: the Hugging Face hub does not answer ({why}); nothing was uploaded, run it again later"
        )
    return catalogue.UPLOAD_FAILED(
        f"{repository}: the upload broke off ({why}), the repository is unchanged; run the same command again"
    )
