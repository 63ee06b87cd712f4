"""Exit code 4: disk, permission, memory, device, network: what lies outside nsae and its artifacts."""

from nsae_cli.errors import Entry, ResourceError

# Disk and files ------------------------------------------------------------------------------------------------------

DISK_FULL = Entry(
    "disk-full",
    ResourceError,
    "The disk, or the user's share of it, filled up while something was written. What was complete before is kept; the "
    "half-written file is removed.",
    "Free space and run the same command again; it goes on where it stopped.",
)
DISK_TOO_SMALL = Entry(
    "disk-too-small",
    ResourceError,
    "The store that was asked for does not fit on the disk; nsae reckons that before it loads the model.",
    "Lower `--tokens`, store fewer `--layers`, or choose a `--workspace` on another disk.",
)
FILE_SIZE_LIMIT = Entry(
    "file-size-limit",
    ResourceError,
    "A file would have become larger than the shell or the file system allows (`ulimit -f`).",
    "Raise the limit and run the same command again.",
)
NO_PERMISSION = Entry(
    "no-permission",
    ResourceError,
    "A file or folder may not be read or written by this user, or lies on a read-only file system.",
    "Choose a writable folder with `--workspace`, or change the permissions.",
)
FOLDER_MISSING = Entry(
    "folder-missing",
    ResourceError,
    "A file or folder does not exist, has vanished while the command ran, or a file stands where a folder is needed.",
    "Check the path, and `--workspace`.",
)
WRITE_FAILED = Entry(
    "write-failed",
    ResourceError,
    "The operating system reported an error while a file was written (an input/output error, a broken network disk).",
    "Check the disk and run the same command again; nothing half-written stands under a final name.",
)
READ_FAILED = Entry(
    "read-failed",
    ResourceError,
    "The operating system could not read a file that exists.",
    "Check the path and its permissions, and the disk.",
)
STDOUT_FAILED = Entry(
    "stdout-failed",
    ResourceError,
    "The result could not be printed, as where stdout is a file on a full disk. What the command made is complete.",
    "Run the same command again with another place for its output; it answers from what is there.",
)
SYSTEM_ERROR = Entry(
    "system-error",
    ResourceError,
    "Another complaint of the operating system, such as too many open files.",
    "Check what the line names, and the limits of the shell (`ulimit -a`).",
)

# Places named by a URL ------------------------------------------------------------------------------------------------

REMOTE_FAILED = Entry(
    "remote-failed",
    ResourceError,
    "A place named by a URL (`s3://`, `gs://`, …) does not answer, refuses access, or failed several times in a row. "
    "What was uploaded before is complete.",
    "Check the URL, your rights there and the network, and run the same command again: it goes on from what is there.",
)
REMOTE_PACKAGE = Entry(
    "remote-package",
    ResourceError,
    "The package with which fsspec opens URLs of this kind is not installed; nsae brings none of them along.",
    "Install the package that the line names.",
)

# Memory and devices --------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = Entry(
    "out-of-memory",
    ResourceError,
    "The memory of the machine or the GPU does not hold the model, a batch of contexts or the training step. nsae "
    "never halves a batch by itself, since that would change the result; checkpoints are kept.",
    "Lower the option that the line names and run again, or use a device with more memory.",
)
DEVICE_MISSING = Entry(
    "device-missing",
    ResourceError,
    "`--device` names a device that torch does not find on this machine.",
    "Use `--device cpu` or one that the line lists, or install a torch that knows the device.",
)

# Several processes ---------------------------------------------------------------------------------------------------

RANKS_NOT_MET = Entry(
    "ranks-not-met",
    ResourceError,
    "A launcher has started several processes that are to train one SAE, and they could not meet: the address is not "
    "set or not reachable, the port is taken, or one of them never came.",
    "Start with `torchrun`, which sets the address; check `MASTER_ADDR`, `MASTER_PORT` and the firewall between the "
    "machines; look at the output of the process that is missing.",
)
RANK_LOST = Entry(
    "rank-lost",
    ResourceError,
    "One of several processes that train an SAE together was killed, has crashed or hangs; the line names it. The "
    "others end too, since no step can be taken without it.",
    "Look at that process's own output and at its machine's memory, then run the same command again: it goes on from "
    "the last checkpoint, with as many processes or with others.",
)

# Hub and models ------------------------------------------------------------------------------------------------------

HUB_UNREACHABLE = Entry(
    "hub-unreachable",
    ResourceError,
    "The Hugging Face hub does not answer (no network, `HF_HUB_OFFLINE=1`), and the local cache does not have the "
    "files.",
    "Connect and run again, or give a local folder; the models `mini` and `mini-sink` and the corpus `builtin` need no "
    "network.",
)
HUB_NOT_FOUND = Entry(
    "hub-not-found",
    ResourceError,
    "There is no local folder of that name, and the hub has no such repository, or it is private.",
    "Check the spelling; for a private repository run `hf auth login` first.",
)
HUB_GATED = Entry(
    "hub-gated",
    ResourceError,
    "The repository asks for an agreement or a login before it hands out files.",
    "Agree on its page, then run `hf auth login`.",
)
HUB_REVISION = Entry(
    "hub-revision",
    ResourceError,
    "The repository has no branch, tag or commit of that name.",
    "Check `--revision`.",
)
DOWNLOAD_FAILED = Entry(
    "download-failed",
    ResourceError,
    "The hub answered at first, and then a file could not be downloaded or opened.",
    "Run the same command again; what was downloaded is kept.",
)
HUB_LOGIN = Entry(
    "hub-login",
    ResourceError,
    "The Hugging Face hub needs a token and this machine has none, or the hub does not know the one that it has. nsae "
    "never prints or logs a token.",
    "Run `hf auth login`, or set `HF_TOKEN`, which takes precedence.",
)
HUB_REFUSED = Entry(
    "hub-refused",
    ResourceError,
    "The hub knows the token and refuses what was asked for: the token may only read, is of another organisation, or a "
    "quota is used up.",
    "Make a token that may write to the repository, or push to another one.",
)
UPLOAD_FAILED = Entry(
    "upload-failed",
    ResourceError,
    "The connection to the hub broke during an upload, or the hub did not take a file. The repository is as it was "
    "before: everything becomes visible in one commit, at the end.",
    "Run the same command again; large files that the hub has already are not sent again.",
)
MODEL_FOLDER_MISSING = Entry(
    "model-folder-missing",
    ResourceError,
    "The artifact was made with a model in a local folder. Artifacts hold no paths, so its place is not known.",
    "Say where it is with `--model DIR`.",
)
LAUNCHER_MISSING = Entry(
    "launcher-missing",
    ResourceError,
    "`nsae run --launcher submitit` finds no submitit in this installation, or no SLURM on this machine.",
    "Install `submitit`, and run it where `sbatch` and `srun` are: on a login node.",
)
JOB_FAILED = Entry(
    "job-failed",
    ResourceError,
    "A job of `nsae run --launcher submitit` could not be submitted, or it ended without its result. The line has what "
    "nsae said in the job; the others' results stay.",
    "Look into the log that the line names, and run the same command again: only what is missing is submitted.",
)
CANNOT_WORK = Entry(
    "cannot-work",
    ResourceError,
    "`nsae doctor` found something without which no command can do its work; its report, above the line, has all "
    "findings.",
    "Do what the line says, and ask `nsae doctor` again.",
)
