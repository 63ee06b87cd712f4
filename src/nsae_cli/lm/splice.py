"""A causal language model's logits with other values in its residual stream.

The forward pass can begin at the hook: for its duration the list of blocks is `[_Emit, *blocks behind the hook]`, and
`_Emit` returns the residual that it was given, whatever comes in. The model's own `forward` does everything else
(masks, final LayerNorm, head), so nothing of the architecture is repeated here, and a residual that is put back
unchanged gives the bits of the plain pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nsae_cli import catalogue
from nsae_cli.lm.families import Family, blocks_of
from nsae_cli.lm.harvest import ResidualReader, memory_errors
from nsae_cli.lm.layers import Site, hook_name, parse_hook


class _Emit(nn.Module):
    """Stands for the blocks before the hook: what comes out is the residual at the hook."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        self._residual = residual

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        return self._residual


class Splicer:
    """Reads and replaces the residual stream of a model at one hook.

    Args:
        model: a causal language model with its head, in evaluation mode.
        family: where it keeps its blocks.
        hook: ``blocks.{layer}.hook_resid_pre`` or ``…_post``, the last block's before the final LayerNorm.

    Raises:
        ArtifactError: the model has no such hook.
    """

    def __init__(self, model: nn.Module, family: Family, hook: str) -> None:
        self._model, self._family, self.hook = model, family, hook
        self._base: nn.Module = model.base_model  # type: ignore[assignment]  # every transformers model has it
        blocks = blocks_of(self._base, family)
        layer, site = require_hook(hook, len(blocks), "the model")
        self._reader = ResidualReader(model, family, site, [layer])
        self._behind = list(blocks)[layer if site == "resid_pre" else layer + 1 :]

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self._model.parameters()).device

    def residual(self, token_ids: Tensor) -> Tensor:
        """The residual at the hook in a plain pass that ends there: [batch, position, d_model], the model's dtype.

        Args:
            token_ids: int64 [batch, position]. Shorter contexts are padded at the end, where the causal mask keeps pads
                from reaching any other position.

        Raises:
            ResourceError: out of memory.
        """
        taken: list[Tensor] = []
        with memory_errors(self.device):
            self._reader.run(token_ids.to(self.device), lambda _, residual: taken.append(residual.clone()))
        return taken[0]

    def logits(self, token_ids: Tensor, residual: Tensor) -> Tensor:
        """Logits [batch, position, vocabulary] of a pass in which the hook's residual is `residual`.

        Args:
            token_ids: int64 [batch, position]; only their shape matters.
            residual: [batch, position, d_model], cast to the model's dtype.

        Raises:
            ResourceError: out of memory.
        """
        dtype = next(self._model.parameters()).dtype
        emitted = _Emit(residual.to(self.device, dtype))
        with torch.inference_mode(), self._blocks([emitted, *self._behind]), memory_errors(self.device):
            logits: Tensor = self._model(input_ids=token_ids.to(self.device), use_cache=False).logits
        return logits

    @contextlib.contextmanager
    def _blocks(self, blocks: list[nn.Module]) -> Iterator[None]:
        original = blocks_of(self._base, self._family)
        self._base.set_submodule(self._family.blocks, nn.ModuleList(blocks))
        try:
            yield
        finally:
            self._base.set_submodule(self._family.blocks, original)


def require_hook(hook: str, n_layers: int, model: str) -> tuple[int, Site]:
    """Layer and site of a hook that a model has.

    Args:
        hook: the hook's name.
        n_layers: blocks of the model.
        model: its name, for messages.

    Raises:
        ArtifactError: not a residual-stream hook, or a layer that the model lacks.
    """
    parsed = parse_hook(hook)
    if parsed is None:
        raise catalogue.HOOK_MISMATCH(
            f"hook {hook!r}: nsae splices at {hook_name(0, 'resid_pre')} to "
            f"{hook_name(n_layers - 1, 'resid_post')} of {model} only; give an SAE that reads there"
        )
    layer, site = parsed
    if layer >= n_layers:
        raise catalogue.HOOK_MISMATCH(
            f"hook {hook}: {model} has layers 0-{n_layers - 1}; the SAE belongs to another model, give that one"
        )
    return layer, site


def replace_rows(residual: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """A copy of the residual in which the rows that `mask` marks are replaced.

    Args:
        residual: [batch, position, d_model].
        mask: bool [batch, position].
        values: [batch, position, d_model] or [d_model], cast to the residual's dtype.
    """
    return torch.where(mask.unsqueeze(-1), values.to(residual.dtype), residual)
