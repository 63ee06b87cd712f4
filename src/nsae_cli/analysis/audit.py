"""The work of `nsae audit`: what high-norm tokens do to an SAE, whoever trained it.

Its activations are made on the fly at its own hook, model and context length, or taken from a store; then everything is
measured that needs no knowledge of how it was trained, and what splicing it in costs the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nsae_cli
from nsae_cli import interrupt
from nsae_cli.analysis.audit_measurements import measure
from nsae_cli.analysis.audit_options import AuditOptions
from nsae_cli.analysis.audit_setting import Setting, find_setting
from nsae_cli.analysis.audited_rows import AuditedRows, rows_of_store, rows_of_text
from nsae_cli.analysis.behaviour import BehaviourStudy, Subject, batch_contexts
from nsae_cli.analysis.checks import refuse_non_finite, say_what_is_missing
from nsae_cli.analysis.documents import read_document
from nsae_cli.assets import embedded_note
from nsae_cli.device import choose_device
from nsae_cli.errors import ArtifactError, UsageError
from nsae_cli.interop.foreign import ForeignSae
from nsae_cli.interop.normalized import RowCentredAutoencoder, reconstructs_centred
from nsae_cli.interop.opening import open_sae, read_folder
from nsae_cli.lm.evaluated_rows import EvaluatedRows, RowRules
from nsae_cli.lm.loading import DTYPE_NAMES, load_model
from nsae_cli.lm.quiet import quiet_libraries
from nsae_cli.lm.splice import Splicer
from nsae_cli.metrics.groups import SINKS
from nsae_cli.metrics.norm_bias import NormBiasIndex, paired_difference
from nsae_cli.report.audit_verdict import audit_verdict
from nsae_cli.reporter import Reporter
from nsae_cli.sae.autoencoder import Autoencoder
from nsae_cli.store import commit
from nsae_cli.store.shards import ActivationStore, describe_changes, open_activations
from nsae_cli.store.workspace import Artifact, Kind, Workspace, check_name
from nsae_cli.training.measure import evaluation_batch, reconstruct

FORMAT_VERSION = 1
_PROBE_ROWS = 2048


@dataclass
class AuditResult:
    """The artifact, its audit.json, and whether it was there already."""

    artifact: Artifact
    document: dict[str, Any]
    already_complete: bool


def run_audit(
    reference: str | None, options: AuditOptions, workspace: Workspace, name: str | None, reporter: Reporter
) -> AuditResult:
    """Audits one SAE.

    Args:
        reference: an SAE's name in the workspace, a folder, or a hub id; None for the workspace's newest.
        options: of the audit.
        name: of the result; None for the SAE's own.

    Raises:
        UsageError: no such SAE, options that do not fit, or the name belongs to another audit.
        ArtifactError: the SAE is damaged, is computed in a way that nsae does not know, or does not fit.
        NumericalError: NaN in the SAE, the activations or the reconstructions.
        ResourceError: model, text, hub or device not available.
        Interrupted: a signal asked to stop; nothing is written.
    """
    with quiet_libraries():
        sae_name, found = _find(reference, workspace, reporter)
        compared = None if options.reference is None else _find(options.reference, workspace, reporter)
        store = _open_store(options, workspace)
        setting = find_setting(found, options, store)
        artifact_name = name or check_name(re.sub(r"[^A-Za-z0-9._\-]+", "-", sae_name).strip("-._")[:120] or "sae")
        artifact = Artifact(Kind.AUDIT, artifact_name, workspace.folder(Kind.AUDIT, artifact_name))
        wanted = {
            "sae": _identity(sae_name, found),
            "reference_sae": compared and _identity(*compared),
            "options": _options_of(options, setting, store),
        }
        if (artifact.path / Kind.AUDIT.mark).is_file():
            document = read_document(artifact, required=("sae", "rows", "options", "metrics"))
            _require_same(artifact_name, document, wanted)
            return AuditResult(artifact, document, already_complete=True)
        commit.make_folder(artifact.path)
        document = _Audit(sae_name, found, compared, options, store, setting, reporter).run(wanted)
        commit.write_json(artifact.path / Kind.AUDIT.mark, document)
        return AuditResult(artifact, document, already_complete=False)


def run_audits(
    references: Sequence[str], options: AuditOptions, workspace: Workspace, name: str | None, reporter: Reporter
) -> list[AuditResult]:
    """Audits several SAEs, as `run_audit` does each; a group in the workspace stands for its cells.

    Args:
        name: the beginning of the results' names, or the name of the only one.
    """
    every = [sae for reference in references for sae in _cells(reference, workspace)]
    several = name is not None and len(every) > 1
    return [
        run_audit(sae, options, workspace, f"{name}-{Path(sae).name}" if several else name, reporter) for sae in every
    ]


def _cells(reference: str, workspace: Workspace) -> list[str]:
    group = workspace.folder(Kind.SAE, reference)
    cells = sorted(mark.parent for mark in group.glob(f"*/{Kind.SAE.mark}"))
    return [f"{reference}/{cell.name}" for cell in cells] or [reference]


def _find(reference: str | None, workspace: Workspace, reporter: Reporter) -> tuple[str, ForeignSae]:
    """An SAE's name and the SAE."""
    if reference is None:
        newest = workspace.newest(Kind.SAE)
        reporter.note(f"using the newest saes: {newest.name}")
        return newest.name, read_folder(newest.path)
    own = workspace.folder(Kind.SAE, reference)
    if own.is_dir():
        return _name_of(own, workspace), read_folder(own)
    found = open_sae(reference)
    local = Path(reference)
    return (_name_of(local, workspace) if local.is_dir() else reference), found


def _name_of(folder: Path, workspace: Workspace) -> str:
    """A name without a path: in the workspace NAME or NAME/CELL, elsewhere the folder's own."""
    base, resolved = (workspace.root / Kind.SAE.folder).resolve(), folder.resolve()
    return resolved.relative_to(base).as_posix() if base in resolved.parents else resolved.name


def _open_store(options: AuditOptions, workspace: Workspace) -> ActivationStore | None:
    if options.activations is None:
        return None
    [artifact] = workspace.find(Kind.ACTIVATIONS, options.activations)
    return open_activations(artifact.path)


def _options_of(options: AuditOptions, setting: Setting, store: ActivationStore | None) -> dict[str, Any]:
    """What determines the result beside the SAEs; names and hashes instead of paths."""
    own = {key: getattr(options, key) for key in ("tokens", "top", "behaviour", "bins", "centre")}
    return {
        **setting.identity,
        "activations": store and {"name": store.name, "manifest_sha256": store.manifest_sha256},
        "hook": setting.hook,
        **own,
    }


def _identity(name: str, found: ForeignSae) -> dict[str, str]:
    return {"name": name, "weights_sha256": commit.file_sha256(found.weights_file)}


def _require_same(name: str, document: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses to take another audit for this one, naming what differs."""
    for key, label in (("sae", "SAE"), ("reference_sae", "--reference")):
        old, new = document.get(key) or {}, wanted[key] or {}
        if any(old.get(part) != new.get(part) for part in ("name", "weights_sha256")):
            before, now = old.get("name", "none"), new.get("name", "none")
            change = f"{before} -> {now}" if before != now else f"{now} has changed since"
            raise UsageError(f"--name {name} holds another audit ({label} {change}); choose another --name")
    if document["options"] != wanted["options"]:
        changes = describe_changes(document["options"], wanted["options"])
        raise UsageError(f"--name {name} holds another audit ({changes}); choose another --name")


class _Audit:
    """One audit, all inputs checked."""

    def __init__(
        self,
        name: str,
        found: ForeignSae,
        compared: tuple[str, ForeignSae] | None,
        options: AuditOptions,
        store: ActivationStore | None,
        setting: Setting,
        reporter: Reporter,
    ) -> None:
        self._name, self._found, self._compared, self._options = name, found, compared, options
        self._store, self._setting, self._reporter = store, setting, reporter
        self._sae: Autoencoder = found.sae
        self._warnings = [*setting.warnings]
        if compared is not None:
            self._check_reference(compared)

    def _check_reference(self, compared: tuple[str, ForeignSae]) -> None:
        name, sae = compared
        if sae.sae.d_in != self._found.sae.d_in:
            raise ArtifactError(
                f"--reference {name} reads vectors of width {sae.sae.d_in}, {self._name} of {self._found.sae.d_in}"
            )
        if sae.hook is not None and sae.hook != self._setting.hook:
            raise ArtifactError(f"--reference {name} reads {sae.hook}, {self._name} reads {self._setting.hook}")

    def run(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Measures everything; returns audit.json."""
        rows, study = self._rows()
        if not len(rows.norm):
            raise UsageError("there is no row to measure; give more --tokens, or another --activations")
        self._choose_centring(rows)
        for warning in self._warnings:
            self._reporter.warn(warning)
        measured = measure(
            self._sae, self._name, rows, self._options.top, self._setting.special_token_ids, self._reporter
        )
        document = {
            "format_version": FORMAT_VERSION,
            "sae": {
                **wanted["sae"],
                "format": self._found.format,
                "architecture": self._found.architecture,
                "notes": list(self._found.notes),
                "trained": {
                    key: getattr(self._found, key)
                    for key in ("model", "hook", "context_size", "prepend_bos", "dataset")
                },
            },
            "reference_sae": wanted["reference_sae"],
            "versions": {"nsae": nsae_cli.__version__, "torch": torch.__version__},
            "options": wanted["options"],
            "model": self._setting.model,
            "embedded_note": embedded_note(self._setting.model),
            "hook": self._setting.hook,
            "d_in": self._sae.d_in,
            "d_sae": self._sae.d_sae,
            "centred": isinstance(self._sae, RowCentredAutoencoder),
            "rows": {**self._setting.describe(), "contexts": rows.contexts, "rows": len(rows.norm)},
            "sinks": rows.sinks,
            "edges": None if rows.rules.edges is None else list(rows.rules.edges),
            "norm_scale": rows.rules.norm_scale,
            "top": self._options.top,
            "metrics": measured.metrics,
            "groups": measured.groups,
            "kinds": measured.kinds,
            "nbi_rel": self._relative(measured.index, rows),
            "behaviour": None if study is None else self._behaviour(study),
            "warnings": self._warnings,
        }
        return {**document, "verdict": audit_verdict(document)}

    # Rows ------------------------------------------------------------------------------------------------------------

    def _rows(self) -> tuple[AuditedRows, BehaviourStudy | None]:
        """The rows to measure, and the model ready for splicing on them (a store: on its held-out contexts)."""
        run, hook, limit = self._found.run, self._setting.hook, self._options.row_limit
        if self._store is not None:
            refuse_non_finite(self._store, hook)
            say_what_is_missing(self._store, self._reporter)
            rows = rows_of_store(self._store, hook, run, limit)
            return rows, self._study(rows.rules) if self._setting.text is not None else None
        rules = None if run is None else RowRules.of_run(run)
        if self._options.behaviour:
            study = self._study(rules)
            return rows_of_text(study.rows, study.sink_counts), study
        info, text = self._setting.info, self._setting.text
        assert info is not None
        assert text is not None
        device, reason = choose_device(self._options.device)
        self._reporter.note(f"device {reason}")
        splicer = Splicer(load_model(info, device, DTYPE_NAMES[self._setting.dtype(device)]), info.family, hook)
        with self._reporter.task(f"reading {hook}", len(text.contexts), "contexts") as task:

            def advance(contexts: int) -> None:
                interrupt.stop_if_requested("stopped; nothing was written, run the same command again")
                task.advance(contexts)

            evaluated = EvaluatedRows(splicer, text, batch_contexts(device, text.longest, 1), advance=advance)
        counts = evaluated.judge(rules or evaluated.fitted_rules())
        return rows_of_text(evaluated, counts), None

    def _study(self, rules: RowRules | None) -> BehaviourStudy:
        info, text = self._setting.info, self._setting.text
        assert info is not None
        assert text is not None
        device, reason = choose_device(self._options.device)
        dtype = self._setting.dtype(device)
        self._reporter.note(f"device {reason}, {dtype}")
        return BehaviourStudy(
            load_model(info, device, DTYPE_NAMES[dtype], with_head=True),
            info.family,
            self._setting.hook,
            text,
            rules,
            bins=self._options.bins,
            batch_size=batch_contexts(device, text.longest, info.vocab_size),
            reporter=self._reporter,
        )

    # Measurements ----------------------------------------------------------------------------------------------------

    def _choose_centring(self, rows: AuditedRows) -> None:
        """Centres each row where the SAE was trained on centred activations: as asked, as it says, or as it behaves."""
        centre = self._options.centre
        if centre is None:
            centre = self._found.centred_weights is True
            first = next(rows.source(_PROBE_ROWS))[0]
            ordinary = first.x[first.group != SINKS].float()
            centre = centre or (self._found.run is None and reconstructs_centred(self._sae, ordinary))
        if centre:
            self._sae = RowCentredAutoencoder(self._sae)
            self._warnings.append(
                "it was trained on activations without their mean over d_in (TransformerLens' centred weights): nsae "
                "takes it out before encoding and puts it back after decoding; FVU can differ a little from one "
                "measured in centred activations; --no-centre gives it the plain ones"
            )

    def _relative(self, index: NormBiasIndex, rows: AuditedRows) -> dict[str, Any] | None:
        """nbi minus that of the reference SAE on the same rows."""
        if self._compared is None:
            return None
        name, reference = self._compared
        other = NormBiasIndex()
        batch_size = evaluation_batch(reference.sae.d_sae)
        with self._reporter.task(f"measuring {name}", len(rows.norm), "rows") as task:
            for part, contexts in rows.source(batch_size):
                interrupt.stop_if_requested("stopped; nothing was written, run the same command again")
                batch = reconstruct(reference.sae, part, contexts)
                other.update(contexts, part.norm, batch.rho, batch.non_sinks)
                task.advance(len(part.norm))
        ids, moments = index.context_moments()
        other_ids, other_moments = other.context_moments()
        return {"reference": name, **paired_difference(moments, ids, other_moments, other_ids)}

    def _behaviour(self, study: BehaviourStudy) -> dict[str, Any]:
        on_device = _OnDevice(self._sae)
        [evaluation] = study.evaluate([Subject(self._name, on_device, lambda rows: {})])
        text = self._setting.text
        assert text is not None
        return {**evaluation.behaviour, "contexts": len(text.contexts), "tokens": text.tokens}


@dataclass(frozen=True)
class _OnDevice:
    """An autoencoder on the CPU that takes and gives rows on any device."""

    inner: Autoencoder

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.inner.d_in

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.inner.d_sae

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """acts and x̂ on the device of x."""
        acts, x_hat = self.inner.reconstruct(x.float().cpu())
        return acts.to(x.device), x_hat.to(x.device)
