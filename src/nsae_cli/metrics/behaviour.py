"""What an autoencoder does to the language model: its next-token predictions with x̂ in place of x.

"Spliced" at some rows: the residual at the hook is x̂ there and x elsewhere. Σ runs over the predicted tokens, the
tokens of every context but its first; CE is −log of the probability that the model gives to such a token.

    ce_clean            mean CE of the model as it is
    ce_with_sae         mean CE, spliced at every row
    ce_zero, ce_mean    mean CE with every row 0, with every row the mean of x over the evaluated ns rows
    delta_ce_all        ce_with_sae − ce_clean, in nats; delta_ce is the same number
    delta_ce_ns         mean CE, spliced at the ns rows only, − ce_clean
    kl                  mean KL(clean ‖ spliced at every row) of the predicted distributions
    ce_recovered_zero   (ce_zero − ce_with_sae) / (ce_zero − ce_clean)
    ce_recovered_mean   (ce_mean − ce_with_sae) / (ce_mean − ce_clean)
    delta_ce of a group (mean CE, spliced at the rows of that group only, − ce_clean) · predicted tokens ÷ these rows
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nsae_cli.metrics.bootstrap import RESAMPLES, SEED, intervals
from nsae_cli.metrics.groups import N_BINS, N_GROUPS, SINKS

#: Sums over each context's predicted tokens.
COLUMNS = ("predicted", "ce_clean", "ce_with_sae", "ce_ns", "ce_zero", "ce_mean", "kl")


class CleanPass:
    """The clean predictions of one batch, which spliced ones are compared with.

    It holds log-probabilities as large as the batch's logits, and is to be dropped with the batch.

    Args:
        logits: of the model as it is, [batch, position, vocabulary].
        token_ids: int64 [batch, position].
        lengths: tokens of each context, the rest is padding.
    """

    def __init__(self, logits: Tensor, token_ids: Tensor, lengths: list[int]) -> None:
        self._targets = [ids[1:length].to(logits.device) for ids, length in zip(token_ids, lengths, strict=True)]
        self._log_probs = [_log_probs(row, len(targets)) for row, targets in zip(logits, self._targets, strict=True)]
        self.ce = self._sums(self._log_probs)

    @property
    def predicted(self) -> Tensor:
        """Predicted tokens of each context, float64 [batch]."""
        return torch.tensor([len(targets) for targets in self._targets], dtype=torch.float64)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """ΣCE of each context under other logits of the same shape: float64 [batch]."""
        return self._sums(_log_probs(row, len(targets)) for row, targets in zip(logits, self._targets, strict=True))

    def compare(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """ΣCE and ΣKL(clean ‖ these) of each context: float64 [batch] both."""
        ce, kl = [], []
        for row, targets, clean in zip(logits, self._targets, self._log_probs, strict=True):
            # One context at a time, which bounds what is held beside the logits.
            spliced = _log_probs(row, len(targets))
            ce.append(_ce(spliced, targets))
            kl.append(torch.linalg.vecdot(clean.exp(), clean - spliced).double().sum())
        return torch.stack(ce).cpu(), torch.stack(kl).cpu()

    def _sums(self, log_probs: Any) -> Tensor:
        sums = [_ce(part, targets) for part, targets in zip(log_probs, self._targets, strict=True)]
        return torch.stack(sums).cpu()


def _log_probs(logits: Tensor, predicted: int) -> Tensor:
    """float32 [predicted, vocabulary] of one context's logits [position, vocabulary]."""
    return torch.log_softmax(logits[:predicted].float(), dim=-1)


def _ce(log_probs: Tensor, targets: Tensor) -> Tensor:
    return -log_probs.gather(1, targets.unsqueeze(1)).double().sum()


class BehaviourAccumulator:
    """Sums per context, from which every number of this module follows.

    Args:
        contexts: how many there are.
        bins: whether splices at single groups are counted too.
    """

    def __init__(self, contexts: int, *, bins: bool) -> None:
        self.sums = {name: torch.zeros(contexts, dtype=torch.float64) for name in COLUMNS}
        self.ce_groups = torch.zeros(contexts, N_GROUPS, dtype=torch.float64) if bins else None
        self.rows_groups = torch.zeros(contexts, N_GROUPS, dtype=torch.float64) if bins else None

    def update(self, contexts: slice, sums: Mapping[str, Tensor]) -> None:
        """Sets the sums of some contexts: float64 [batch] by the names of `COLUMNS`."""
        for name, values in sums.items():
            self.sums[name][contexts] = values

    def update_group(self, contexts: slice, group: int, ce: Tensor, rows: Tensor) -> None:
        """Sets ΣCE of some contexts, spliced at the rows of one group only, and how many those are: [batch] both."""
        assert self.ce_groups is not None, "made without bins"
        assert self.rows_groups is not None
        self.ce_groups[contexts, group] = ce
        self.rows_groups[contexts, group] = rows.double()

    def compute(self, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, Any]:
        """Every number of this module, each {value, low, high}; `bins` and `sinks` are None without bins."""
        sums = self.sums
        clean = sums["ce_clean"]
        # Differences are taken per context: a splice that changes nothing has differences of exactly 0.
        columns = dict(sums) | {
            "delta_all": sums["ce_with_sae"] - clean,
            "delta_ns": sums["ce_ns"] - clean,
            "delta_zero": sums["ce_zero"] - clean,
            "delta_mean": sums["ce_mean"] - clean,
        }
        if self.ce_groups is not None and self.rows_groups is not None:
            for group in range(N_GROUPS):
                columns[f"delta_{group}"] = self.ce_groups[:, group] - clean
                columns[f"rows_{group}"] = self.rows_groups[:, group]
        measured = intervals(columns, _statistics, resamples, seed)
        groups: list[dict[str, Any]] = []
        if self.rows_groups is not None:
            rows = self.rows_groups.sum(dim=0).long().tolist()
            groups = [{"rows": rows[g], "delta_ce": measured.pop(f"group_{g}")} for g in range(N_GROUPS)]
        return {
            **measured,
            "delta_ce": measured["delta_ce_all"],
            "bins": groups[:N_BINS] or None,
            "sinks": groups[SINKS] if groups else None,
        }


def _statistics(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    predicted = sums["predicted"]
    values = {name: sums[name] / predicted for name in ("ce_clean", "ce_with_sae", "ce_zero", "ce_mean", "kl")}
    values |= {
        "delta_ce_all": sums["delta_all"] / predicted,
        "delta_ce_ns": sums["delta_ns"] / predicted,
        "ce_recovered_zero": (sums["delta_zero"] - sums["delta_all"]) / sums["delta_zero"],
        "ce_recovered_mean": (sums["delta_mean"] - sums["delta_all"]) / sums["delta_mean"],
    }
    for group in range(N_GROUPS):
        if f"delta_{group}" in sums:
            values[f"group_{group}"] = sums[f"delta_{group}"] / sums[f"rows_{group}"]
    return values
