"""Evaluates autoencoders at one hook of one model on one text: row metrics, and what splicing x̂ in does to the model.

What does not depend on the autoencoder is computed once: the residuals, the sinks, and the predictions of the plain,
the zeroed and the mean-ablated model. Autoencoders share each batch's plain pass, some at a time; logits live as long
as their batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsae_cli import catalogue, interrupt
from nsae_cli.device import one_thread_if_small
from nsae_cli.lm.evaluated_rows import EvaluatedRows, RowRules
from nsae_cli.lm.families import Family
from nsae_cli.lm.splice import Splicer, replace_rows
from nsae_cli.lm.texts import ContextBatch, Text
from nsae_cli.metrics.behaviour import BehaviourAccumulator, CleanPass
from nsae_cli.metrics.context_sums import ContextSums
from nsae_cli.metrics.groups import N_GROUPS, SINKS
from nsae_cli.reporter import Reporter, Task
from nsae_cli.sae.autoencoder import Autoencoder
from nsae_cli.training.measure import RowSource

#: Autoencoders that share a pass: what an interruption can lose, against what the plain pass costs.
_TOGETHER = 16
_TOGETHER_BYTES = 2**30
#: Tokens of a forward pass, and the largest logits of one.
_BATCH_TOKENS = {"cpu": 1024, "mps": 8192, "cuda": 32768}
_LOGIT_BYTES = {"cpu": 2**28, "mps": 2**29, "cuda": 2**31}


@dataclass(frozen=True)
class Subject:
    """An autoencoder to evaluate.

    Attributes:
        name: for messages.
        sae: on the model's device.
        measure: its row metrics by scope, from rows on the CPU.
    """

    name: str
    sae: Autoencoder
    measure: Callable[[RowSource], dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one autoencoder.

    Attributes:
        metrics: row metrics by scope (all, ns, sinks, bins).
        behaviour: of `metrics.behaviour`, each number {value, low, high}.
        tensors: the sums of each context behind them, [contexts].
    """

    metrics: dict[str, Any]
    behaviour: dict[str, Any]
    tensors: dict[str, Tensor]


def batch_contexts(device: torch.device, longest: int, vocabulary: int) -> int:
    """Contexts of a forward pass: as many as a device does well, with logits of a bounded size."""
    by_logits = _LOGIT_BYTES[device.type] // (4 * longest * vocabulary)
    return max(1, min(_BATCH_TOKENS[device.type] // longest, by_logits))


class BehaviourStudy:
    """One model, hook and text, ready to evaluate autoencoders.

    Args:
        model: a causal language model with its head, in evaluation mode.
        family: where it keeps its parts.
        hook: where to splice.
        text: the contexts; none longer than the model can read.
        rules: which rows are sinks and the bins' edges; None to fit them on these rows.
        bins: measure splices at single norm bins and at the sinks too, eleven more passes for each autoencoder.
        batch_size: contexts per forward pass.
        reporter: for progress.

    Raises:
        ArtifactError: the model has no such hook, or every row is zero.
        NumericalError: a residual is not finite.
        Interrupted: a signal asked to stop.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        hook: str,
        text: Text,
        rules: RowRules | None,
        *,
        bins: bool,
        batch_size: int,
        reporter: Reporter,
    ) -> None:
        self._splicer = Splicer(model, family, hook)
        self._hook, self._text, self._bins, self._reporter = hook, text, bins, reporter
        self._device = self._splicer.device
        with reporter.task(f"reading {hook}", len(text.contexts), "contexts") as task:

            def advance(contexts: int) -> None:
                interrupt.stop_if_requested("stopped; nothing was written, run the same command again")
                task.advance(contexts)

            self.rows = EvaluatedRows(self._splicer, text, batch_size, advance=advance)
        self.rules = rules or self.rows.fitted_rules()
        self.sink_counts = self.rows.judge(self.rules)
        self.mean_ns = self.rows.mean_ns()
        # What every autoencoder has in common.
        self._common = BehaviourAccumulator(len(text.contexts), bins=False)
        self._common_done: set[int] = set()

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return self.rows.d_in

    def evaluate(self, subjects: Iterable[Subject]) -> Iterator[Evaluation]:
        """Evaluates autoencoders, in order, some of them in one pass; they are taken from the iterable when needed.

        Raises:
            ArtifactError: an autoencoder of another width.
            NumericalError: values that are not finite.
            Interrupted: a signal asked to stop.
        """
        chunk: list[Subject] = []
        size = 0
        for subject in subjects:
            size += 8 * subject.sae.d_in * subject.sae.d_sae
            if chunk and (len(chunk) == _TOGETHER or size > _TOGETHER_BYTES):
                yield from self._evaluate_chunk(chunk)
                chunk, size = [], 8 * subject.sae.d_in * subject.sae.d_sae
            chunk.append(subject)
        if chunk:
            yield from self._evaluate_chunk(chunk)

    def _evaluate_chunk(self, subjects: Sequence[Subject]) -> Iterator[Evaluation]:
        for subject in subjects:
            if subject.sae.d_in != self.d_in:
                raise catalogue.WIDTH_MISMATCH(
                    f"{subject.name} reads vectors of width {subject.sae.d_in}, the model's {self._hook} has width "
                    f"{self.d_in}; the SAE belongs to another model, give that one with --model"
                )
        contexts = len(self._text.contexts)
        behaviours = [BehaviourAccumulator(contexts, bins=self._bins) for _ in subjects]
        sums = [ContextSums(contexts, self.mean_ns) for _ in subjects]
        widest = max(subject.sae.d_sae for subject in subjects)
        product = max(len(norms) for norms in map(self.rows.norms, range(len(self.rows)))) * self.d_in * widest
        name = subjects[0].name if len(subjects) == 1 else f"{subjects[0].name} and {len(subjects) - 1} more"
        with (
            torch.inference_mode(),
            one_thread_if_small(product, self._device),
            self._reporter.task(f"splicing {name}", self._text.tokens * len(subjects), "rows") as task,
        ):
            for block, batch in enumerate(self.rows.batches):
                self._splice_batch(block, batch, subjects, behaviours, sums, task)
        for subject, behaviour, context_sums in zip(subjects, behaviours, sums, strict=True):
            with torch.no_grad(), one_thread_if_small(product, self._device):
                metrics = subject.measure(self._rows_until_stopped)
            yield Evaluation(metrics, behaviour.compute(), self._tensors(behaviour, context_sums))

    def _rows_until_stopped(self, batch_size: int) -> Iterator[Any]:
        for part in self.rows.rows(batch_size):
            self._stop_if_requested()
            yield part

    @staticmethod
    def _stop_if_requested() -> None:
        interrupt.stop_if_requested("stopped; finished evaluations are saved, the same command goes on with the others")

    def _splice_batch(
        self,
        block: int,
        batch: ContextBatch,
        subjects: Sequence[Subject],
        behaviours: Sequence[BehaviourAccumulator],
        sums: Sequence[ContextSums],
        task: Task,
    ) -> None:
        spliced = _Batch(self._splicer, self.rows, block, batch)
        if block not in self._common_done:
            self._common.update(batch.place, spliced.common(self.mean_ns))
            self._common_done.add(block)
        common = {name: values[batch.place] for name, values in self._common.sums.items()}
        for subject, behaviour, context_sums in zip(subjects, behaviours, sums, strict=True):
            self._stop_if_requested()
            behaviour.update(batch.place, common)
            acts, x_hat = subject.sae.reconstruct(spliced.x)
            if not bool(x_hat.isfinite().all()):
                raise catalogue.RECONSTRUCTION_NOT_FINITE(
                    f"{subject.name}: its reconstruction of context {self._text.numbers[batch.first]} and following "
                    f"holds NaN or infinity; give the model and hook that it belongs to"
                )
            context_sums.update(
                self.rows.contexts(block), spliced.x, x_hat, (acts > 0).sum(dim=1), spliced.taken.to(x_hat.device)
            )
            del acts
            self._splice_subject(subject, behaviour, spliced, x_hat)
            task.advance(sum(batch.lengths))

    def _splice_subject(
        self, subject: Subject, behaviour: BehaviourAccumulator, spliced: _Batch, x_hat: Tensor
    ) -> None:
        place, clean = spliced.batch.place, spliced.clean
        values = spliced.placed(x_hat)
        ce, kl = clean.compare(spliced.logits(spliced.mask, values))
        ce_ns = ce
        if bool((spliced.groups == SINKS).any()):
            ce_ns = clean.cross_entropy(spliced.logits(spliced.mask & (spliced.groups != SINKS), values))
        if not bool((ce.isfinite() & kl.isfinite() & ce_ns.isfinite()).all()):
            raise catalogue.RECONSTRUCTION_NOT_FINITE(
                f"{subject.name}: with it spliced in at {self._hook} the model's logits are not finite; "
                f"try --model-dtype fp32"
            )
        behaviour.update(place, {"ce_with_sae": ce, "ce_ns": ce_ns, "kl": kl})
        if not self._bins:
            return
        for group in range(N_GROUPS):
            of_group = spliced.groups == group
            there = bool(of_group.any())
            ce_group = clean.cross_entropy(spliced.logits(of_group, values)) if there else clean.ce
            behaviour.update_group(place, group, ce_group, of_group.sum(dim=1).cpu())

    def _tensors(self, behaviour: BehaviourAccumulator, context_sums: ContextSums) -> dict[str, Tensor]:
        tensors = {"context": torch.tensor(self._text.numbers, dtype=torch.int64), **behaviour.sums}
        tensors |= context_sums.tensors()
        if behaviour.ce_groups is not None and behaviour.rows_groups is not None:
            tensors |= {"ce_groups": behaviour.ce_groups, "rows_groups": behaviour.rows_groups}
        return tensors


class _Batch:
    """One batch's residual, plain predictions and spliced passes.

    Attributes:
        x: its rows [rows, d_in], float32.
        mask: rows that are no pads, bool [context, position].
        groups: norm bin or sink group, −1 at pads, int64 [context, position].
        taken: ns rows that are not zero, bool [rows].
        clean: the model's own predictions.
    """

    def __init__(self, splicer: Splicer, rows: EvaluatedRows, block: int, batch: ContextBatch) -> None:
        self._splicer, self.batch = splicer, batch
        self._residual = rows.residual(block)
        device = self._residual.device
        self.mask = batch.mask.to(device)
        self.x = self._residual[self.mask].float()
        self.groups = torch.full(batch.token_ids.shape, -1, device=device)
        self.groups[self.mask] = rows.groups(block).to(device)
        self.taken = (rows.groups(block) != SINKS) & ~rows.zero(block)
        self.clean = CleanPass(splicer.logits(batch.token_ids, self._residual), batch.token_ids, batch.lengths)
        if not bool(self.clean.ce.isfinite().all()):
            raise catalogue.MODEL_NOT_FINITE(
                "the model's own logits are not finite; try --model-dtype fp32, or check its weights"
            )

    def logits(self, mask: Tensor, values: Tensor) -> Tensor:
        """Logits with `values` [context, position, d_in] or [d_in] at the rows that `mask` marks."""
        return self._splicer.logits(self.batch.token_ids, replace_rows(self._residual, mask, values))

    def placed(self, x_hat: Tensor) -> Tensor:
        """Rows [rows, d_in] at their places: [context, position, d_in], in the model's dtype."""
        values = torch.zeros_like(self._residual)
        values[self.mask] = x_hat.to(values.dtype)
        return values

    def common(self, mean_ns: Tensor) -> dict[str, Tensor]:
        """Sums that do not depend on an autoencoder: predicted tokens, and CE of the plain and the ablated model."""
        zeros, mean = (values.to(self._residual) for values in (torch.zeros_like(mean_ns), mean_ns))
        return {
            "predicted": self.clean.predicted,
            "ce_clean": self.clean.ce,
            "ce_zero": self.clean.cross_entropy(self.logits(self.mask, zeros)),
            "ce_mean": self.clean.cross_entropy(self.logits(self.mask, mean)),
        }
