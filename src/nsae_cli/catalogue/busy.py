"""Exit code 6: somebody else is writing there."""

from nsae_cli.errors import BusyError, Entry

BUSY = Entry(
    "busy",
    BusyError,
    "Another command is writing the artifact, or one on another machine has begun to and was not seen to end. Two "
    "writers would spoil each other's files. The lock of a process on this machine that has died is simply taken over.",
    "Wait until the other command has ended, or stop it. Where a machine went down, say so with `nsae --break-lock "
    "COMMAND`.",
)
