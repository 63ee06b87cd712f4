"""A causal language model's logits with other values in its residual stream, or in what a block adds to it.

A hook (`ports`) puts the values in while the model's own `forward` does everything else (masks, final norm, head). So
nothing of the architecture is repeated here, and a residual that is put back unchanged gives the bits of the plain
pass.

At the sites of the residual stream nothing before the hook matters, and so nothing before it is computed: for the
duration of the pass the blocks there are replaced by `_Emit`, which returns what it was given, whatever comes in. They
keep their number, which decides the attention of those behind in some families.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsae_cli import catalogue
from nsae_cli.lm.families import Family, blocks_of
from nsae_cli.lm.harvest import ResidualReader, memory_errors
from nsae_cli.lm.layers import SITES, Site, hook_name, parse_hook
from nsae_cli.lm.ports import port_of


class _Emit(nn.Module):
    """Stands for a block before the hook."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        self._residual = residual

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        return self._residual


def _in_shape_of(value: Tensor, passing: Tensor) -> Tensor:
    """OPT's MLP works on rows without a batch."""
    return value.reshape(passing.shape)


class Splicer:
    """Reads and replaces the residual stream of a model, or what a block adds to it, at one hook.

    Args:
        model: a causal language model with its head, in evaluation mode.
        family: where it keeps its parts.
        hook: ``blocks.{layer}.hook_{site}``; the last block's ``resid_post`` is before the final norm.

    Raises:
        ArtifactError: the model has no such hook.
    """

    def __init__(self, model: nn.Module, family: Family, hook: str) -> None:
        self._model, self._family, self.hook = model, family, hook
        self._base: nn.Module = model.base_model  # type: ignore[assignment]  # every transformers model has it
        self._blocks = list(blocks_of(self._base, family))
        sites = family.sites(self._base.config)
        self._layer, self._site = require_hook(hook, len(self._blocks), "the model", sites)
        self._reader = ResidualReader(model, family, self._site, [self._layer])

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
        """Logits [batch, position, vocabulary] of a pass in which what passes the hook is `residual`.

        Args:
            token_ids: int64 [batch, position].
            residual: [batch, position, d_model], cast to the model's dtype.

        Raises:
            ResourceError: out of memory.
        """
        value = residual.to(self.device, next(self._model.parameters()).dtype)
        with torch.inference_mode(), self._spliced(value), memory_errors(self.device):
            logits: Tensor = self._model(input_ids=token_ids.to(self.device), use_cache=False).logits
        return logits

    @contextlib.contextmanager
    def _spliced(self, value: Tensor) -> Iterator[None]:
        """For its duration, `value` stands at the hook."""
        block = self._blocks[self._layer]
        puts: list[tuple[Site, Tensor]] = [(self._site, value)]
        emitted, replaced = value, 0
        if self._site == "resid_post":
            puts, replaced = [], self._layer + 1
        elif self._site == "resid_pre":
            replaced = self._layer
        elif self._site == "resid_mid":
            # It is read in two places, by the MLP's norm and by the sum behind the MLP, so it is put in before they
            # part: as what attention writes to a stream of zeros, which adds nothing to any bit.
            emitted, replaced = torch.zeros_like(value), self._layer
            puts = [("resid_pre", emitted), ("attn_out", value)]
        with contextlib.ExitStack() as undo:
            for site, put in puts:
                port = port_of(block, self._family, site)
                undo.callback(port.on_pass(partial(_in_shape_of, put)).remove)
            if replaced:
                undo.enter_context(self._blocks_replaced([_Emit(emitted)] * replaced + self._blocks[replaced:]))
            yield

    @contextlib.contextmanager
    def _blocks_replaced(self, blocks: list[nn.Module]) -> Iterator[None]:
        original = blocks_of(self._base, self._family)
        self._base.set_submodule(self._family.blocks, nn.ModuleList(blocks))
        try:
            yield
        finally:
            self._base.set_submodule(self._family.blocks, original)


def require_hook(hook: str, n_layers: int, model: str, sites: Sequence[Site] = SITES) -> tuple[int, Site]:
    """Layer and site of a hook that a model has.

    Args:
        hook: the hook's name.
        n_layers: blocks of the model.
        model: its name, for messages.
        sites: those that the model has.

    Raises:
        ArtifactError: no hook that nsae reads, or a layer or site that the model lacks.
    """
    parsed = parse_hook(hook)
    if parsed is None:
        raise catalogue.HOOK_MISMATCH(
            f"hook {hook!r}: nsae splices at {hook_name(0, sites[0])} to {hook_name(n_layers - 1, sites[0])} of "
            f"{model} and there at {', '.join(sites[1:])}; give an SAE that reads there"
        )
    layer, site = parsed
    if layer >= n_layers:
        raise catalogue.HOOK_MISMATCH(
            f"hook {hook}: {model} has layers 0-{n_layers - 1}; the SAE belongs to another model, give that one"
        )
    if site not in sites:
        raise catalogue.HOOK_MISMATCH(
            f"hook {hook}: {model} has {', '.join(sites)} only; the SAE belongs to another model, give that one"
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
