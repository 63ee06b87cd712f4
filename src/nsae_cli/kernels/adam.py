"""Adam over an SAE's parameters: torch's own fused operation where the device has one."""

from __future__ import annotations

import torch
from torch.optim.adam import adam

from nsae_cli.kernels.types import Weights, in_memory_order

_FUSED_ON = ("cpu", "cuda", "mps")
#: Every so many steps, moments below _NOTHING become 0. A silent feature's moments decay for ever; as denormals they
#: would make a CPU's Adam nine times slower. Falling from _NOTHING to a denormal takes 175 steps of the faster moment.
_SWEEP_STEPS = 100
#: A moment this small moves a weight by less than lr·1e-22.
_NOTHING = 1e-30


#: Decay rates of the moments.
BETAS = (0.9, 0.999)


class Adam:
    """State and step of Adam, without weight decay: the numbers of `torch.optim.Adam(…, fused=True)`.

    It calls the function behind that class, since constructing the class imports torch's compiler (seconds), and since
    a plain state is easier to save exactly.

    Args:
        weights: the parameters, updated in place.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
    """

    def __init__(self, weights: Weights, betas: tuple[float, float] = BETAS, eps: float = 1e-8) -> None:
        self._weights = weights
        self._betas, self._eps = betas, eps
        self._fused = weights.b_enc.device.type in _FUSED_ON
        self._moments = {"exp_avg": weights.zeros_like(), "exp_avg_sq": weights.zeros_like()}
        self._taken = 0
        self._steps = {name: torch.zeros((), device=tensor.device) for name, tensor in weights.named().items()}

    def step(self, gradients: Weights, lr: float) -> None:
        """One update with these gradients."""
        self._apply(gradients.named(), lr)
        self._count()

    def step_biases(
        self, b_enc: torch.Tensor, b_dec: torch.Tensor, lr: float, log_threshold: torch.Tensor | None = None
    ) -> None:
        """One update of biases and thresholds with these gradients, by a caller that updates W_enc and W_dec itself."""
        thresholds = {} if log_threshold is None else {"log_threshold": log_threshold}
        self._apply({"b_enc": b_enc, "b_dec": b_dec} | thresholds, lr)
        for name in ("W_enc", "W_dec"):
            self._steps[name] += 1
        self._count()

    def moments(self) -> tuple[Weights, Weights]:
        """First and second moments, laid out as the weights are: to be updated in place after `step_biases`."""
        return self._moments["exp_avg"], self._moments["exp_avg_sq"]

    def numbers(self, lr: float) -> tuple[float, float, float, float, float, float]:
        """1 − β₁, β₂, 1 − β₂, ε, lr/(1 − β₁^t) and 1/√(1 − β₂^t) of the present step t."""
        (first, second), steps = self._betas, self._taken
        return 1 - first, second, 1 - second, self._eps, lr / (1 - first**steps), (1 - second**steps) ** -0.5

    @torch.no_grad()
    def _apply(self, gradients: dict[str, torch.Tensor], lr: float) -> None:
        weights, names = self._weights.named(), list(gradients)
        first, second = (moment.named() for moment in self.moments())
        adam(
            [in_memory_order(weights[name]) for name in names],
            [in_memory_order(gradients[name]) for name in names],
            [in_memory_order(first[name]) for name in names],
            [in_memory_order(second[name]) for name in names],
            [],
            [self._steps[name] for name in names],
            foreach=False,
            fused=self._fused,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=lr,
            weight_decay=0.0,
            eps=self._eps,
            maximize=False,
        )
        for name in names:
            # Fused Adam writes without counting the version up, by which others see that weights have changed.
            torch.autograd.graph.increment_version(weights[name])

    def _count(self) -> None:
        self._taken += 1
        if self._taken % _SWEEP_STEPS == 0:
            for moment in self._moments.values():
                for tensor in moment.tensors():
                    torch.hardshrink(tensor, _NOTHING, out=tensor)

    @torch.no_grad()
    def forget(self, features: torch.Tensor) -> None:
        """Moments of 0 for all that belongs to these features, int64 [K]. The number of steps stays everybody's."""
        for moment in self.moments():
            moment.W_enc.index_fill_(1, features, 0)
            moment.W_dec.index_fill_(0, features, 0)
            for per_feature in (moment.b_enc, moment.log_threshold):
                if per_feature is not None:
                    per_feature.index_fill_(0, features, 0)

    def state(self) -> dict[str, torch.Tensor]:
        """Moments and number of steps, by name; the tensors themselves, in the order of their memory."""
        moments = {f"{kind}/{name}": t for kind, moment in self._moments.items() for name, t in moment.named().items()}
        return {key: in_memory_order(t) for key, t in moments.items()} | {"step": self._steps["b_enc"]}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from `state()`."""
        for kind, moment in self._moments.items():
            for name, tensor in moment.named().items():
                in_memory_order(tensor).copy_(state[f"{kind}/{name}"])
        self._taken = int(state["step"])
        for step in self._steps.values():
            step.fill_(self._taken)
