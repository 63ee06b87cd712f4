"""One audit: what high-norm tokens do to an SAE, whoever trained it.

Its activations are made on the fly at its own hook, model and context length, or taken from a store; then everything is
measured that needs no knowledge of how it was trained, and what splicing it in costs the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import nsae_cli
from nsae_cli import catalogue, interrupt
from nsae_cli.analysis.audit_measurements import measure
from nsae_cli.analysis.audit_options import AuditOptions
from nsae_cli.analysis.audit_setting import Setting
from nsae_cli.analysis.audited_rows import AuditedRows, rows_of_store, rows_of_text
from nsae_cli.analysis.behaviour import BehaviourStudy, Subject, batch_contexts
from nsae_cli.analysis.checks import say_what_is_missing
from nsae_cli.assets import embedded_note
from nsae_cli.device import choose_device
from nsae_cli.interop.foreign import ForeignSae
from nsae_cli.interop.normalized import RowCentredAutoencoder, reconstructs_centred
from nsae_cli.lm.evaluated_rows import EvaluatedRows, RowRules
from nsae_cli.lm.loading import DTYPE_NAMES, load_model
from nsae_cli.lm.splice import Splicer
from nsae_cli.metrics.groups import SINKS
from nsae_cli.metrics.norm_bias import NormBiasIndex, paired_difference
from nsae_cli.report.audit_verdict import audit_verdict
from nsae_cli.reporter import Reporter
from nsae_cli.sae.autoencoder import Autoencoder
from nsae_cli.store.shards import ActivationStore
from nsae_cli.training.measure import evaluation_batch, reconstruct

FORMAT_VERSION = 1
_PROBE_ROWS = 2048


class Audit:
    """One audit, all inputs checked.

    Args:
        name: the SAE's, for messages and the document.
        found: the SAE.
        compared: name and SAE that nbi is compared with; None for none.
        options: of the audit.
        store: the activations to measure on; None to run the model on a text.
        setting: hook, model and text.
        reporter: for progress and warnings.

    Raises:
        ArtifactError: the SAE to compare with reads something else.
    """

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
            raise catalogue.WIDTH_MISMATCH(
                f"--reference {name} reads vectors of width {sae.sae.d_in}, {self._name} of "
                f"{self._found.sae.d_in}; give an SAE of the same hook"
            )
        if sae.hook is not None and sae.hook != self._setting.hook:
            raise catalogue.HOOK_MISMATCH(
                f"--reference {name} reads {sae.hook}, {self._name} reads {self._setting.hook}; "
                f"give an SAE of the same hook"
            )

    def run(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Measures everything.

        Args:
            wanted: what identifies the audit: `sae`, `reference_sae` and `options` of audit.json.

        Returns:
            audit.json.

        Raises:
            UsageError: there are no rows.
            ArtifactError: the SAE, or all rows, cannot be measured.
            NumericalError: NaN in the activations or the reconstructions.
            Interrupted: a signal asked to stop.
        """
        rows, study = self._rows()
        if not len(rows.norm):
            raise catalogue.NO_ROWS("there is no row to measure; give more --tokens, or another --activations")
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
