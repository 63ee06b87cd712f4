"""All sections of the report, in the order in which a reader needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from nsae_cli import catalogue, interrupt
from nsae_cli.doctor.check import STATES, Check, State, guarded
from nsae_cli.doctor.devices import look_at_devices
from nsae_cli.doctor.environment import look_at_environment
from nsae_cli.doctor.hugging_face import HubQuestion, look_at_hugging_face
from nsae_cli.doctor.installation import look_at_installation, look_at_packages
from nsae_cli.doctor.kernel_choice import look_at_kernels
from nsae_cli.doctor.machine import look_at_machine
from nsae_cli.doctor.redaction import Redactor
from nsae_cli.doctor.torch_build import look_at_torch
from nsae_cli.doctor.workspace_state import look_at_workspace
from nsae_cli.store.workspace import Workspace


@dataclass(frozen=True)
class Report:
    """Everything that was found.

    Attributes:
        sections: the checks by section, with nothing secret in them.
    """

    sections: dict[str, list[Check]]

    def checks(self) -> list[Check]:
        """All of them."""
        return [check for checks in self.sections.values() for check in checks]

    @property
    def state(self) -> State:
        """The gravest."""
        return max((check.state for check in self.checks()), key=STATES.index, default="ok")

    def document(self) -> dict[str, Any]:
        """The report ready for JSON: {state, usable, sections: {section: {check: {state, found, remedy, values}}}}."""
        return {
            "state": self.state,
            "usable": not any(check.fatal for check in self.checks()),
            "sections": {
                section: {
                    check.name: {
                        "state": check.state,
                        "found": check.found,
                        "remedy": check.remedy,
                        "values": dict(check.values),
                    }
                    for check in checks
                }
                for section, checks in self.sections.items()
            },
        }

    def require_usable(self) -> None:
        """Ends the command where nsae cannot work.

        Raises:
            ResourceError: names what stands in the way and what to do.
        """
        fatal = [(section, check) for section, checks in self.sections.items() for check in checks if check.fatal]
        if fatal:
            section, check = fatal[0]
            more = "" if len(fatal) == 1 else f" (and {len(fatal) - 1} more, see the report)"
            raise catalogue.CANNOT_WORK(
                f"nsae cannot work here: {section}, {check.name}: {check.found}; {check.remedy}{more}"
            )


def examine(workspace: Workspace) -> Report:
    """Looks at everything; takes a few seconds. What fails is a finding.

    Args:
        workspace: of this session; it need not exist.

    Raises:
        Interrupted: a signal asked to stop.
    """
    hub: list[HubQuestion | None] = []

    def ask_hub() -> Iterable[Check]:
        hub.append(HubQuestion.asked())
        return ()

    # The hub is asked first and answers while torch is imported.
    failed = guarded("hub", ask_hub)
    sections: dict[str, Callable[[], Iterable[Check]]] = {
        "nsae": look_at_installation,
        "packages": look_at_packages,
        "machine": look_at_machine,
        "torch": look_at_torch,
        "devices": look_at_devices,
        "kernels": look_at_kernels,
        "workspace": lambda: look_at_workspace(workspace),
        "hugging face": lambda: look_at_hugging_face(hub[0]) if hub else failed,
        "environment": look_at_environment,
    }
    redact = Redactor.of_this_user()
    found = {}
    for name, look in sections.items():
        interrupt.stop_if_requested("stopped")
        found[name] = [_public(check, redact) for check in guarded(name, look)]
    return Report(found)


def _public(check: Check, redact: Redactor) -> Check:
    return Check(
        check.name,
        redact.text(check.found),
        check.state,
        None if check.remedy is None else redact.text(check.remedy),
        redact.value(dict(check.values)),
        check.fatal,
    )
