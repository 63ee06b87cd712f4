"""What ``nsae run --slurm KEY=VALUE`` sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from nsae_cli import catalogue
from nsae_cli.values import validate_options

_CLOCK = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


class SlurmOptions(BaseModel):
    """Keys of ``--slurm``; others go to sbatch as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    cluster: Literal["slurm", "local", "debug"] = Field("slurm", description="where jobs run; local: on this machine")
    folder: Path | None = Field(None, description="of scripts and logs; must be on a disk that all nodes see")
    time: int = Field(240, ge=1, description="minutes, or H:M:S, D-H:M:S")
    gpus: int | None = Field(None, ge=0, description="per job")
    cpus: int | None = Field(None, ge=1, description="per job")
    mem: str | None = Field(None, pattern=r"^\d+[KMGTkmgt]?$", description="such as 64G")
    partition: str | None = Field(None, min_length=1)
    account: str | None = Field(None, min_length=1)
    qos: str | None = Field(None, min_length=1)
    constraint: str | None = Field(None, min_length=1)
    parallel: int = Field(256, ge=1, description="jobs of a stage that run at the same time")
    grace: int = Field(120, ge=1, description="seconds before its end at which a job is told to save")
    requeues: int = Field(100, ge=0, description="how often a job that ran out of time is submitted again")

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, value: Any) -> Any:
        if isinstance(value, str) and (clock := _CLOCK.fullmatch(value)) is not None:
            days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
            return max(1, (days * 24 + hours) * 60 + minutes + (seconds > 0))
        return value

    def slurm_parameters(self, name: str) -> dict[str, Any]:
        """As submitit's SlurmExecutor takes them."""
        known = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "gpus_per_node": self.gpus,
            "cpus_per_task": self.cpus,
            "mem": self.mem,
        }
        others = {key.replace("_", "-"): value for key, value in (self.model_extra or {}).items()}
        return {
            **{key: value for key, value in known.items() if value is not None},
            "job_name": name,
            "time": self.time,
            "signal_delay_s": self.grace,
            "array_parallelism": self.parallel,
            "additional_parameters": {"requeue": True, **others},
        }

    def local_parameters(self) -> dict[str, Any]:
        """As submitit's LocalExecutor takes them."""
        return {"timeout_min": self.time, "gpus_per_node": self.gpus or 0, "signal_delay_s": self.grace}


def parse_slurm_options(given: Sequence[str]) -> SlurmOptions:
    """Checks what ``--slurm`` was given.

    Raises:
        UsageError: no KEY=VALUE, a key twice, a bad value.
    """
    values: dict[str, str] = {}
    for text in given:
        key, sign, value = text.partition("=")
        key = key.strip().lower().replace("-", "_")
        if not sign or not re.fullmatch(r"[a-z][a-z0-9_]*", key) or not value.strip():
            raise catalogue.OPTION_VALUE(f"--slurm {text[:60]}: expected KEY=VALUE, such as partition=gpu or mem=64G")
        if key in values:
            raise catalogue.OPTION_VALUE(f"--slurm {key}: given twice; give it once")
        values[key] = value.strip()
    return validate_options(SlurmOptions, values)
