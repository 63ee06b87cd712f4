"""Exit code 6: another process writes where this one would."""

from nsae_cli.errors import BusyError, Entry

FOLDER_BUSY = Entry(
    "folder-busy",
    BusyError,
    "Another process is writing into the folder: the line says which, on which machine and since when. A lock that a "
    "killed process of this machine has left is taken over without being asked; of a process on another machine nsae "
    "cannot tell whether it still runs.",
    "Wait until it has ended, or stop it. If a process on another machine is gone for sure, give "
    "`nsae --break-lock` before the command.",
)
