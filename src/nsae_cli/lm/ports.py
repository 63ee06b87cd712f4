"""Where a site's vector passes through a block, and hooks that read or replace it there.

A residual goes into a module (`resid_pre` into the block, `resid_mid` into what reads it before the MLP) or comes out
of one (`resid_post` of the block, `attn_out` and `mlp_out` of what adds to the stream).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nsae_cli.lm.families import Family
from nsae_cli.lm.layers import Site

_ARGUMENT = "hidden_states"


@dataclass(frozen=True)
class Port:
    """A module, and whether the vector is its input or its output."""

    module: nn.Module
    is_input: bool

    def on_pass(self, receive: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Calls `receive` with the vector whenever one passes; what it returns, if anything, goes on instead.

        The vector is the first positional argument or the one called ``hidden_states``; of an output that is a tuple,
        the first entry.
        """
        return self._on_input(receive) if self.is_input else self._on_output(receive)

    def _on_input(self, receive: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
            changed = receive(inputs[0] if inputs else options[_ARGUMENT])
            if changed is None:
                return None
            return ((changed, *inputs[1:]), options) if inputs else (inputs, {**options, _ARGUMENT: changed})

        return self.module.register_forward_pre_hook(hook, with_kwargs=True)

    def _on_output(self, receive: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            changed = receive(output[0] if isinstance(output, tuple) else output)
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return self.module.register_forward_hook(hook)


def port_of(block: nn.Module, family: Family, site: Site) -> Port:
    """Where a site's vector passes; the model must have the site (`Family.sites`)."""
    if site == "resid_pre":
        return Port(block, is_input=True)
    if site == "resid_mid":
        return Port(block.get_submodule(family.before_mlp), is_input=True)
    if site == "resid_post":
        return Port(block, is_input=False)
    return Port(block.get_submodule(family.attn_out if site == "attn_out" else family.mlp_out), is_input=False)
