"""Which features have been silent over the last training tokens."""

from __future__ import annotations

import torch
from torch import Tensor

DEFAULT_WINDOW_TOKENS = 262_144


class FiredWindow:
    """When each feature last fired, in training tokens.

    A batch is the unit of time: a feature that fired in a batch counts as alive until the whole batch has left the
    window, so the window reaches back between `window_tokens` and one batch more.

    Args:
        d_sae: number of features.
        window_tokens: length of the window.
        device: where `fired` will come from.
    """

    def __init__(
        self, d_sae: int, window_tokens: int = DEFAULT_WINDOW_TOKENS, device: torch.device | str = "cpu"
    ) -> None:
        self.window_tokens = window_tokens
        self._seen = 0
        # Tokens seen at the end of the batch in which the feature last fired; 0 if it never did.
        self._last_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update(self, fired: Tensor, tokens: int) -> None:
        """Adds a batch of `tokens` rows; fired: bool [d_sae], the features with f > 0 on at least one of them."""
        self._seen += tokens
        self._last_fired.masked_fill_(fired, self._seen)

    def revive(self, features: Tensor) -> None:
        """Takes these features, int64 [K], as having fired in the newest batch: they were given new weights."""
        self._last_fired.index_fill_(0, features, self._seen)

    def dead(self) -> Tensor:
        """Features silent over the last min(window, seen) tokens: bool [d_sae]."""
        return self._seen - self._last_fired >= min(self.window_tokens, self._seen)

    def silent(self) -> Tensor:
        """Features silent over the last `window_tokens` tokens, all of which were seen: bool [d_sae]."""
        return self._seen - self._last_fired >= self.window_tokens

    def dead_fraction(self) -> float | None:
        """Share of the features that are silent over the last min(window, seen) tokens; None before any token."""
        return self.dead().double().mean().item() if self._seen else None

    def state(self) -> dict[str, Tensor]:
        """A copy on the host, to be stored in a checkpoint."""
        return {"last_fired": self._last_fired.cpu().clone(), "seen": torch.tensor(self._seen)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from what `state()` gave; the window's length may be another."""
        self._last_fired.copy_(state["last_fired"])
        self._seen = int(state["seen"])
