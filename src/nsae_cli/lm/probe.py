"""Is the sink at position 0 carried by the token that stands there, or by the position's embedding?

The same contexts are run again with another first token, and with another position's embedding at position 0; each
change leaves the other cause in place. What remains of the sink says which of the two it needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsae_cli import interrupt
from nsae_cli.errors import Interrupted
from nsae_cli.lm.families import Family, position_embedding_of
from nsae_cli.lm.harvest import ResidualReader
from nsae_cli.lm.layers import Site, hook_name

#: Position 0 counts as a sink where its median norm exceeds this many medians elsewhere (sink rule 1).
SINK_RATIO = 3.0
#: A change removes the sink where less than this share of its excess over the ordinary norm remains.
KEPT_SHARE = 0.5

_TOKEN_DRAWS = 4
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class ProbeSubject:
    """The model under test.

    Attributes:
        model: in evaluation mode.
        family: where it keeps its parts.
        separator: id of the beginning-of-text token.
        ordinary_tokens: ids to draw other first tokens from; none of them special. int64 [n].
    """

    model: nn.Module
    family: Family
    separator: int
    ordinary_tokens: Tensor


def probe_sinks(
    subject: ProbeSubject, contexts: Tensor, layers: Sequence[int], site: Site, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Position 0's norm under each change, and what follows from it.

    Args:
        subject: the model.
        contexts: token ids of whole contexts as they were collected, int64 [contexts, positions ≥ 2].
        layers: 0-based.
        site: where to read.
        seed: of the other first tokens.

    Returns:
        For each hook, ready for JSON: for ``as_is``, ``bos`` (the beginning-of-text token first), ``other_token``
        (several random ordinary tokens) and ``other_position`` (embeddings of several other positions) the median norms
        ``position0`` and ``elsewhere`` and their ``ratio``; ``kept_other_token`` and ``kept_other_position``, the share
        of the excess (ratio - 1) that the change leaves; and ``verdict``: ``position`` or ``token`` (only changing that
        one removes the sink), ``both`` (either change removes it), ``neither`` (it survives both), null where there is
        no sink as it is.

    Raises:
        Interrupted: a signal asked to stop.
    """
    runner = _NormRunner(subject, tuple(layers), site)
    generator = torch.Generator().manual_seed(seed)
    draws = [
        subject.ordinary_tokens[torch.randint(len(subject.ordinary_tokens), (len(contexts),), generator=generator)]
        for _ in range(_TOKEN_DRAWS)
    ]
    size = contexts.shape[1]
    others = sorted({max(1, size // 4), max(1, size // 2), size - 1})
    conditions = {
        "as_is": runner.norms(contexts),
        "bos": runner.norms(_with_first(contexts, torch.tensor(subject.separator))),
        "other_token": torch.cat([runner.norms(_with_first(contexts, draw)) for draw in draws], dim=1),
        "other_position": torch.cat([runner.norms_with_position(contexts, other) for other in others], dim=1),
    }
    return {
        hook_name(layer, site): _judge({name: norms[index] for name, norms in conditions.items()})
        for index, layer in enumerate(runner.layers)
    }


def _with_first(contexts: Tensor, first: Tensor) -> Tensor:
    changed = contexts.clone()
    changed[:, 0] = first
    return changed


def _judge(norms: dict[str, Tensor]) -> dict[str, Any]:
    """One hook's numbers and verdict from its norms [contexts, positions] in each condition."""
    result: dict[str, Any] = {}
    for name, values in norms.items():
        position0, elsewhere = float(values[:, 0].median()), float(values[:, 1:].median())
        result[name] = {"position0": position0, "elsewhere": elsewhere, "ratio": position0 / elsewhere}
    ratio = result["as_is"]["ratio"]
    is_sink = ratio > SINK_RATIO
    kept = {
        change: (result[change]["ratio"] - 1) / (ratio - 1) if is_sink else None
        for change in ("other_token", "other_position")
    }
    result |= {f"kept_{change}": share for change, share in kept.items()}
    result["verdict"] = _verdict(kept["other_token"], kept["other_position"])
    return result


def _verdict(kept_other_token: float | None, kept_other_position: float | None) -> str | None:
    if kept_other_token is None or kept_other_position is None:
        return None
    needs_token = kept_other_token < KEPT_SHARE
    needs_position = kept_other_position < KEPT_SHARE
    if needs_token and needs_position:
        return "both"
    if needs_token or needs_position:
        return "token" if needs_token else "position"
    return "neither"


class _NormRunner:
    """Runs contexts and keeps nothing but the norms."""

    def __init__(self, subject: ProbeSubject, layers: tuple[int, ...], site: Site) -> None:
        self.layers = sorted(layers)
        self._reader = ResidualReader(subject.model, subject.family, site, layers)
        base: nn.Module = subject.model.base_model  # type: ignore[assignment]  # every transformers model has it
        self._positions = position_embedding_of(base, subject.family)
        self._first_position = subject.family.first_position

    def norms(self, contexts: Tensor) -> Tensor:
        """‖x‖₂, float32 [layer, context, position], on the CPU."""
        parts: list[Tensor] = []
        for batch in contexts.split(max(1, _BATCH_TOKENS // contexts.shape[1])):
            signum = interrupt.stop_requested()
            if signum is not None:
                raise Interrupted(signum, "stopped while probing; run the same command again")
            found: list[Tensor] = []
            self._reader.run(
                batch.to(self._positions.weight.device),
                lambda _layer, x, found=found: found.append(  # type: ignore[misc]
                    torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).cpu()
                ),
            )
            parts.append(torch.stack(found))
        return torch.cat(parts, dim=1)

    def norms_with_position(self, contexts: Tensor, other: int) -> Tensor:
        """The same with position `other`'s embedding at position 0; positions from 1 on keep theirs."""
        with self._first_position_replaced(other):
            return self.norms(contexts)

    @contextlib.contextmanager
    def _first_position_replaced(self, other: int) -> Iterator[None]:
        # The table is changed rather than the position ids: ids that do not rise would change the attention mask.
        weight = self._positions.weight
        zero = self._first_position
        with torch.no_grad():
            first = weight[zero].clone()
            weight[zero] = weight[zero + other]
        try:
            yield
        finally:
            with torch.no_grad():
                weight[zero] = first
