"""Schedules as pure functions of the step, so that a resumed run needs no state of theirs."""

from __future__ import annotations


def ramp(step: int, steps: int, share: float) -> float:
    """Rises linearly from about 0 to 1 over the first `share` of `steps` (0-based step)."""
    length = share * steps
    return min(1.0, (step + 1) / length) if length > 1 else 1.0


def learning_rate(step: int, steps: int, peak: float, warm_up: float, decay: float) -> float:
    """Linear warm-up over the first `warm_up` of the steps, linear decay to 0 over the last `decay`."""
    left = (steps - step) / max(1.0, decay * steps)
    return peak * ramp(step, steps, warm_up) * min(1.0, left)


#: Lines of metrics.jsonl in a run, and probes of the gradient.
LOGGED_STEPS, PROBES = 200, 20
#: A probe takes about the time of a step or two.
_MIN_PROBE_INTERVAL = 100


def log_interval(steps: int) -> int:
    """Every how many steps a line is logged: about 200 lines a run."""
    return max(1, steps // LOGGED_STEPS)


def probe_interval(steps: int) -> int:
    """Every how many steps the gradient is probed: about 20 times a run, every 100 steps at most, on logged steps."""
    interval = log_interval(steps)
    return -(-max(_MIN_PROBE_INTERVAL, steps // PROBES) // interval) * interval


def is_probed(step: int, steps: int, every: int | None) -> bool:
    """Whether the gradient is probed before `step` (0-based): before the first, every so many, before the last."""
    return every is not None and (step == 0 or (step + 1) % every == 0 or step + 1 == steps)


def is_logged(step: int, steps: int, probe_every: int | None) -> bool:
    """Whether `step` (0-based) has a line in metrics.jsonl: at the log's interval, the last, and where it is probed."""
    at_interval = (step + 1) % log_interval(steps) == 0 or step + 1 == steps
    return at_interval or is_probed(step, steps, probe_every)
