"""`nsae doctor`."""

from __future__ import annotations

import typer

from nsae_cli.cli.session import session_of


def command(context: typer.Context) -> None:
    """Look at this installation and this machine.

    Versions, processor, memory, GPUs, kernels, workspace, the Hugging Face hub and its cache, and environment variables
    that change results. Each is ok, a note or a problem, with what to do about it. Secrets, the home folder and the
    user's name are left out, so that the text can be pasted into a public issue. Exit code 4 where nsae cannot work.
    """
    from nsae_cli.doctor.examine import examine
    from nsae_cli.report.doctor_table import doctor_table

    session = session_of(context)
    report = examine(session.workspace)
    document = report.document()
    session.finish_measurement("doctor", document, lambda: doctor_table(document))
    report.require_usable()
