"""Exit code 2: the command cannot be carried out as given."""

from nsae_cli.errors import Entry, UsageError

# The command line ----------------------------------------------------------------------------------------------------

COMMAND_LINE = Entry(
    "command-line",
    UsageError,
    "A command or an option that does not exist, an option without its value, an argument too many or one that is "
    "missing, or a session option (`--json`, `--workspace`, …) after the command.",
    "Compare with `nsae COMMAND --help`, which the line names; session options stand before the command.",
)
OPTION_VALUE = Entry(
    "option-value",
    UsageError,
    "The value of an option is not of the expected kind, not among the known choices or out of range. Every such "
    "problem of a command is reported at once.",
    "Give a value as the line expects it.",
)
OPTION_DOES_NOT_FIT = Entry(
    "option-does-not-fit",
    UsageError,
    "An option is possible as such, but not with this model, this text or the other options: a context longer than the "
    "model reads, fewer tokens than one context, a batch larger than what holds it, a site or a chat template that the "
    "model lacks.",
    "Stay within the limit that the line names.",
)
OPTION_MISSING = Entry(
    "option-missing",
    UsageError,
    "An option without a default that fits here was left out: how many rows a corpus makes is not known before it is "
    "read, so training from a live model must be told how long to train.",
    "Give the option that the line names.",
)
OPTION_WITHOUT_EFFECT = Entry(
    "option-without-effect",
    UsageError,
    "An option was given where it can do nothing, as a revision for a model that is not on the hub.",
    "Leave the option out, or change what makes it idle.",
)
REFUSED_COMBINATION = Entry(
    "refused-combination",
    UsageError,
    "Options that contradict each other or that no SAE can have together: two ways to set the same thing, an option of "
    "another activation, an objective without a minimum (relu, free decoder, plain l1).",
    "Leave one of them out, or take the combination that the line offers.",
)
KERNEL_MISSING = Entry(
    "kernel-missing",
    UsageError,
    "A sparse training step or the certified encoder was asked for where it cannot run: no compiled loops in this "
    "installation, no triton on CUDA, another kind of device, or no measurement to choose by.",
    "Leave the option out (nsae then takes what there is), or install what the line names.",
)

RANKS_DIFFER = Entry(
    "ranks-differ",
    UsageError,
    "Processes that are to train one SAE together were started with different options, versions or numbers of threads. "
    "They would not compute the same numbers.",
    "Start all of them with the same command, from the same installation.",
)

# Names and artifacts -------------------------------------------------------------------------------------------------

URL_UNKNOWN = Entry(
    "url-unknown",
    UsageError,
    "A URL of a kind that no package opens, or that is none.",
    "Use `s3://bucket/folder`, `gs://bucket/folder`, `hf://datasets/name/repository/folder` or another protocol of "
    "fsspec.",
)
URL_READ_ONLY = Entry(
    "url-read-only",
    UsageError,
    "The workspace is at a URL to which nsae writes nothing: over http, or in a repository of the Hugging Face hub, "
    "where each file would be a commit.",
    "Choose another `--workspace`, and name what is at the URL as an input.",
)
NAME_INVALID = Entry(
    "name-invalid",
    UsageError,
    "A `--name` that cannot be a folder's name everywhere.",
    "Use letters, digits, `.`, `_` and `-`, at most 120, the first of them a letter, a digit or `_`.",
)
NAME_TAKEN = Entry(
    "name-taken",
    UsageError,
    "`--name` stands for something else already: another measurement, other inputs, or an artifact of another origin.",
    "Choose another `--name`; without one, nsae makes a name that no other command has.",
)
OPTIONS_CHANGED = Entry(
    "options-changed",
    UsageError,
    "An artifact of this name was made or begun with other options that change the result; the line names them, old -> "
    "new. nsae never mixes the two.",
    "Give the old options to go on with it, or another `--name` for the new ones.",
)
OUTPUT_IS_INPUT = Entry(
    "output-is-input",
    UsageError,
    "The result would replace what it is made from.",
    "Choose another `--name`.",
)
SAME_OUTPUT = Entry(
    "same-output",
    UsageError,
    "Two of the inputs would write their results under one name.",
    "Run the command for each of them, with a `--name` each.",
)
NOT_FOUND = Entry(
    "not-found",
    UsageError,
    "Nothing of that name is in the workspace, and there is no such path.",
    "Take one of the names that the line lists (`nsae list` shows more of each), a path, or another `--workspace`.",
)
WORKSPACE_EMPTY = Entry(
    "workspace-empty",
    UsageError,
    "A command without a named input takes the newest complete artifact that fits, and the workspace has none.",
    "Run the command that the line names first, or choose the right `--workspace`.",
)
SAE_NOT_FOUND = Entry(
    "sae-not-found",
    UsageError,
    "What was given as an SAE is no name in the workspace, no folder and no id on the hub, or the repository holds no "
    "SAE under that folder.",
    "Check the name; on the hub an SAE is `org/repo` or `org/repo:folder`.",
)
SEVERAL_SAES = Entry(
    "several-saes",
    UsageError,
    "A folder or repository holds several SAEs and the command reads one.",
    "Name one of them as the line shows.",
)
ANALYSIS_MISSING = Entry(
    "analysis-missing",
    UsageError,
    "What is to be shown has not been measured: an SAE without a top-norm analysis, or no evaluation of that name.",
    "Run `nsae analyze-top-norms` or `nsae eval` first.",
)
STORE_OF_SAE_MISSING = Entry(
    "store-of-sae-missing",
    UsageError,
    "An SAE is to be measured on the activations that it was trained on, and they are not in the workspace, or it was "
    "trained on a live model and there never was a store.",
    "Name a store with `--activations` (or, for `eval`, a text with `--corpus`).",
)
SOURCE_UNKNOWN = Entry(
    "source-unknown",
    UsageError,
    "An SAE or a store of another tool does not record which model or hook it belongs to.",
    "Say it with `--model` or `--hook`.",
)
BASELINE_UNKNOWN = Entry(
    "baseline-unknown",
    UsageError,
    "`compare --baseline` names no arm of the comparison.",
    "Take one of the arms that the line lists.",
)
COMPARED_TWICE = Entry(
    "compared-twice",
    UsageError,
    "Two SAEs of a comparison stand for the same method, sparsity, seed and data, so that pairs are not defined.",
    "Leave one of the two out.",
)
ALPHA_SOURCE = Entry(
    "alpha-source",
    UsageError,
    "`--alpha-from` finds no SAE that was trained in the same way, or several whose α differ.",
    "Name the SAE that is meant, as GROUP/CELL, or give `--alpha`.",
)
PLOT_INPUT = Entry(
    "plot-input",
    UsageError,
    "A figure that cannot be drawn from these inputs: too many for one figure, several where one is drawn, or SAEs "
    "without the quantity.",
    "Name fewer or other artifacts.",
)

# Layers, text and rows -----------------------------------------------------------------------------------------------

LAYER_NOT_THERE = Entry(
    "layer-not-there",
    UsageError,
    "`--layers` is not a list of layers, or names one that the model or the store does not have. Layers count from 0.",
    "Give layers within the range in the line, as `all`, `6`, `0,3` or `0-3`.",
)
CONTEXT_TOO_LONG = Entry(
    "context-too-long",
    UsageError,
    "The text is cut into contexts longer than the model can read.",
    "Give a smaller `--context`, or the `--model` that belongs to the text.",
)
CORPUS_NOT_FOUND = Entry(
    "corpus-not-found",
    UsageError,
    "`--corpus` is neither a file, nor a folder with files of a known kind, nor a data set's id.",
    "Check the path; known are `.txt`, `.jsonl` and `.parquet` files and folders of these, and ids on the hub.",
)
CORPUS_EMPTY = Entry(
    "corpus-empty",
    UsageError,
    "The corpus holds no text at all.",
    "Give another `--corpus`, or another column or `--split`.",
)
CORPUS_TOO_SHORT = Entry(
    "corpus-too-short",
    UsageError,
    "The corpus does not fill one context; with packing, the last partial context is dropped.",
    "Give a smaller `--context`, `--no-packing`, or a longer corpus.",
)
CORPUS_COLUMN = Entry(
    "corpus-column",
    UsageError,
    "The corpus has no column of that name, or it holds something else than its option says: text (`--text-column`), "
    "messages that the model's chat template takes (`--chat-column`), token ids of the model (`--tokens-column`).",
    "Name the right column with the right option; the line lists what was found.",
)
CORPUS_ENCODING = Entry(
    "corpus-encoding",
    UsageError,
    "The corpus is not UTF-8, or holds half of a surrogate pair. nsae does not guess and drops nothing silently.",
    "Convert the file to UTF-8, or mend the record that the line names.",
)
CORPUS_FORMAT = Entry(
    "corpus-format",
    UsageError,
    "A corpus file is of an unknown kind, or is not what its name says: a line of a `.jsonl` file that is no JSON "
    "object, a `.parquet` file that cannot be opened.",
    "Mend the line that is named, or save the corpus as `.txt`, `.jsonl` or `.parquet`.",
)
CORPUS_CHOICE = Entry(
    "corpus-choice",
    UsageError,
    "The data set on the hub has no such configuration or split, or needs one to be named.",
    "Check `--corpus-config` and `--split` on the data set's page.",
)
NO_ROWS = Entry(
    "no-rows",
    UsageError,
    "Nothing is left to train on or to measure: the store is empty, holds no whole context, or every row is a sink.",
    "Collect more tokens, or take other activations.",
)
NOTHING_HELD_OUT = Entry(
    "nothing-held-out",
    UsageError,
    "Every 20th context is held out for measuring, and the store has fewer than 20.",
    "Collect more with `nsae collect --tokens`, or name a text with `--corpus` where the command takes one.",
)
TEXT_NOT_IN_STORE = Entry(
    "text-not-in-store",
    UsageError,
    "The model would have to run again over the text of the activations, and the store does not hold it: no tokens and "
    "positions (a store of another tool), altered activations, or an SAE trained without a store.",
    "Name a text with `--corpus`, or a store that `nsae collect` made.",
)

# Models and configuration files --------------------------------------------------------------------------------------

MODEL_FAMILY = Entry(
    "model-family",
    UsageError,
    "nsae does not know where this kind of model keeps its residual stream, or it is no causal language model of text "
    "alone.",
    "Take a model of a known family, or add a line to the table FAMILIES in `nsae_cli/lm/families.py`.",
)
CONFIG_UNREADABLE = Entry(
    "config-unreadable",
    UsageError,
    "The file given to `nsae run` cannot be opened, is empty, too large, not UTF-8 or not YAML.",
    "Mend the line that is named; indent with spaces and write `stages:` with a list of commands.",
)
CONFIG_PROBLEMS = Entry(
    "config-problems",
    UsageError,
    "The file given to `nsae run` names a command, option, value or input that does not exist. All problems are "
    "reported at once, with their lines, and no stage is started.",
    "Correct the lines; options are written as on the command line, with `_` for `-`.",
)
