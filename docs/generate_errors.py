"""Writes docs/errors.md from the catalogue of errors (nsae_cli.catalogue) and the lines that raise them.

Usage: make docs, or python docs/generate_errors.py
"""

from __future__ import annotations

from pathlib import Path

from error_messages import messages
from nsae_cli import catalogue, errors
from nsae_cli.cli.failures import EXIT_CODES

PAGE = Path(__file__).with_name("errors.md")

#: Parts of the page: exit code, heading, introduction; the entries of the code's type follow.
_PARTS: list[tuple[type[errors.NsaeError], str, str]] = [
    (
        errors.UsageError,
        "the command cannot be carried out as given",
        "An option, a value, a name, a combination or an input that cannot be used. Nothing was started or changed.",
    ),
    (
        errors.ArtifactError,
        "an artifact is unfinished, damaged or does not fit",
        "Damage is found by the SHA-256 of what is read, before a number is made of it. What is damaged is never "
        "repaired or replaced silently.",
    ),
    (
        errors.ResourceError,
        "disk, permission, memory, device or network",
        "Something outside nsae. What was complete stays complete: run the same command again once the cause is gone.",
    ),
    (
        errors.NumericalError,
        "values that are not finite or do not fit a dtype",
        "nsae stops before it stores such a value, trains on it or takes an optimizer step with it.",
    ),
    (errors.BusyError, "another process is at work there", "One command at a time writes into an artifact's folder."),
]
_MEANINGS = {
    0: "done, or the artifact was already complete",
    1: "a bug in nsae",
    130: "ended by Ctrl-C (SIGINT); what was done is saved",
    143: "ended by SIGTERM; what was done is saved",
}


_HEAD = """\
# Errors

Every failure of `nsae` ends with one line on stderr that starts with `nsae: ` and says what is wrong, in which file or
option, and what to do. Look for its words on this page to read more: braces stand for values. Where a command has
several problems, all are reported at once: in one line, or above it where they are many. Under `nsae run`, the stage's
file and line stand before the message.

`nsae --debug COMMAND` also prints the traceback and the name under which the error stands here.

<!-- Made by docs/generate_errors.py from src/nsae_cli/catalogue and the lines that raise its entries: `make docs`. -->
"""
_BUG = """\
## Exit code 1: a bug in nsae

Something happened that nsae did not foresee. The line names the error and the file with its traceback, `error.log` in
the workspace; no file of an artifact is left half-written.

**What to do:** Report it with that file. What was complete before is safe, and the same command may be run again.

- `` a bug in nsae ({error}: {message}); report it with {log} ``
- `` a bug in nsae ({error}: {message}); report it with the output of the same command under --debug ``
"""
_INTERRUPTED = """\
## Exit codes 130 and 143: ended by a signal

Ctrl-C (130) or SIGTERM (143), as a cluster sends it before it takes the machine away. The step in hand is finished and
saved; a second signal ends the process at once, and the last checkpoint stays.

**What to do:** Run the same command again; it goes on from there.
"""


def page() -> str:
    """The text of docs/errors.md."""
    raised = messages()
    parts = [_HEAD, exit_codes()]
    parts.append(_BUG)
    for kind, heading, introduction in _PARTS:
        entries = {name: entry for name, entry in catalogue.ENTRIES.items() if entry.kind is kind}
        if entries:
            parts.append(f"## Exit code {EXIT_CODES[kind]}: {heading}\n\n{introduction}\n")
        for name, entry in entries.items():
            parts.append(f"### {entry.name}\n\n{entry.cause}\n\n**What to do:** {entry.remedy}\n")
            parts.append(_listed([message.template for message in raised if message.entry == name]))
    parts.append(_INTERRUPTED)
    parts.append(_listed([message.template for message in raised if message.entry == "Interrupted"]))
    return "\n".join(parts)


def exit_codes() -> str:
    """The table of exit codes, for docs/cli.md too."""
    rows = [(str(code), meaning) for code, meaning in _MEANINGS.items()]
    rows += [(str(EXIT_CODES[kind]), heading) for kind, heading, _ in _PARTS]
    lines = [f"| {code} | {meaning} |" for code, meaning in sorted(rows, key=lambda row: int(row[0]))]
    return "\n".join(["| Exit code | Meaning |", "|---|---|", *lines, ""])


def _listed(templates: list[str]) -> str:
    """The messages, each once, as code that may hold backticks."""
    return "".join(f"- `` {template} ``\n" for template in dict.fromkeys(templates))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(catalogue.ENTRIES)} entries, {len(messages())} messages")
