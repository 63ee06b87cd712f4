"""Exit code 3: an artifact, an SAE, or a model's files are unfinished, damaged, or do not fit."""

from nsae_cli.errors import ArtifactError, Entry

# Unfinished, damaged or replaced -------------------------------------------------------------------------------------

UNFINISHED = Entry(
    "unfinished",
    ArtifactError,
    "The artifact's own JSON, which is written last, is not there: the command that makes it was ended early, or is "
    "still running.",
    "Run the same command again; it goes on where it stopped.",
)
NOT_AN_ARTIFACT = Entry(
    "not-an-artifact",
    ArtifactError,
    "The path exists but is not what the command reads: a file where a folder is expected, or a folder without the "
    "files of a store or an SAE.",
    "Name the artifact's own folder.",
)
FORMAT_VERSION = Entry(
    "format-version",
    ArtifactError,
    "The artifact was written in a format that this nsae does not read, as a rule by a newer one.",
    "Read it with the nsae that wrote it, or make it again.",
)
JSON_DAMAGED = Entry(
    "json-damaged",
    ArtifactError,
    "A JSON file is not UTF-8, not JSON, names a key twice, or holds NaN or Infinity, none of which nsae writes.",
    "Restore the file from a copy, or delete the artifact's folder and run its command again.",
)
DOCUMENT_INVALID = Entry(
    "document-invalid",
    ArtifactError,
    "A result file is JSON, but a key is missing or of another kind: it was edited or cut.",
    "Restore it from a copy, or delete the folder and run the command that the line names.",
)
RESULTS_DAMAGED = Entry(
    "results-damaged",
    ArtifactError,
    "The arrays beside a result file cannot be read, or are not of the size that the file states.",
    "Delete the folder and run the command that the line names.",
)
MANIFEST_INVALID = Entry(
    "manifest-invalid",
    ArtifactError,
    "A store's `manifest.json` lacks a key, holds a wrong value, does not add up, or names a file outside its folder "
    "(such a file is never opened).",
    "Restore the manifest from a copy, or collect the store again.",
)
PROGRESS_DAMAGED = Entry(
    "progress-damaged",
    ArtifactError,
    "The record of an unfinished store (`progress.jsonl`) has lost its first line, so that nsae cannot know which "
    "options its shards were made with.",
    "Delete the store's folder and run `nsae collect` again.",
)
CHECKPOINT_INCOMPLETE = Entry(
    "checkpoint-incomplete",
    ArtifactError,
    "A checkpoint of a training run is undamaged but lacks an item, or holds one of another shape: another version of "
    "nsae wrote it. Nothing is made up for what is missing.",
    "Delete the checkpoint's folder, `checkpoints/step-N`, and run the same command again: it goes on from the "
    "checkpoint before, or from the beginning.",
)
SHARD_MISSING = Entry(
    "shard-missing",
    ArtifactError,
    "A file that the manifest lists is not there.",
    "Run `nsae verify --repair` on the store and then the command that made it, which makes the damaged shards anew "
    "and nothing else; a store from elsewhere has to be copied again.",
)
SHARD_SIZE = Entry(
    "shard-size",
    ArtifactError,
    "A shard has more or fewer bytes than were written, as after an interrupted copy.",
    "Run `nsae verify --repair` on the store and then the command that made it, which makes the damaged shards anew "
    "and nothing else; a store from elsewhere has to be copied again.",
)
SHARD_LINK = Entry(
    "shard-link",
    ArtifactError,
    "A shard is a symbolic link. A store that came from elsewhere could point at any file, so links are not followed.",
    "Put the file itself into the folder. A link to the whole folder is fine.",
)
SHARD_UNREADABLE = Entry(
    "shard-unreadable",
    ArtifactError,
    "A shard is not a valid safetensors file.",
    "Run `nsae verify --repair` on the store and then the command that made it, which makes the damaged shards anew "
    "and nothing else; a store from elsewhere has to be copied again.",
)
SHARD_MISMATCH = Entry(
    "shard-mismatch",
    ArtifactError,
    "A shard holds other tensors, shapes or dtypes than its manifest says: it belongs to another store.",
    "Put the right file back, or delete the folder and collect again.",
)
CONTENT_CHANGED = Entry(
    "content-changed",
    ArtifactError,
    "The bytes of a tensor or a file are not those that were written (SHA-256), or a value in a JSON file is not (its "
    "checksum): a damaged disk or copy, or an edit.",
    "Run `nsae verify --repair` on what the line names; it drops what is damaged and says how to make it again.",
)
DAMAGE_FOUND = Entry(
    "damage-found",
    ArtifactError,
    "`nsae verify` has looked at every byte and found some that are not what was written. Each finding stands above.",
    "Run `nsae verify --repair`: it drops what is damaged and says how to make it again.",
)
REMOTE_DAMAGED = Entry(
    "remote-damaged",
    ArtifactError,
    "A file at a URL is not what its artifact's JSON says of it, twice in a row: it was damaged or changed there. It "
    "is not used, and does not enter the local copy.",
    "`nsae --workspace URL verify --repair NAME`, then the command that made it again.",
)
SAE_INVALID = Entry(
    "sae-invalid",
    ArtifactError,
    "The `cfg.json` of an SAE that nsae trained does not say what nsae writes there.",
    "Restore it from a copy, or train the SAE again.",
)
SAE_DAMAGED = Entry(
    "sae-damaged",
    ArtifactError,
    "The weights of an SAE that nsae trained cannot be read, or have other shapes than its `cfg.json` says.",
    "Restore the folder from a copy, or train the SAE again.",
)
STORE_CHANGED = Entry(
    "store-changed",
    ArtifactError,
    "The store has the name of the one that the SAE was trained on, but not its content.",
    "Name the right store with `--activations`; naming this one says that it is meant.",
)

# Parts that do not fit each other ------------------------------------------------------------------------------------

HOOK_MISMATCH = Entry(
    "hook-mismatch",
    ArtifactError,
    "An SAE reads another place of the model than the store holds, than the SAE it is compared with reads, or than "
    "the model has.",
    "Give the activations, the SAE or the model that belong together.",
)
WIDTH_MISMATCH = Entry(
    "width-mismatch",
    ArtifactError,
    "An SAE reads vectors of another width than the model or the store has.",
    "Give the model that the SAE was trained on (`--model`), or activations of it.",
)
MODEL_MISMATCH = Entry(
    "model-mismatch",
    ArtifactError,
    "The model is not the one that the SAE or the store was made with: another name, or other weights under its name.",
    "Give the right `--model`; where the line offers it, say that the two are the same.",
)
TOKENS_OF_ANOTHER_MODEL = Entry(
    "tokens-of-another-model",
    ArtifactError,
    "The store holds token numbers that the model does not have: it was tokenized for another one.",
    "Give the `--model` that the store was collected from.",
)
TEXT_CUT = Entry(
    "text-cut",
    ArtifactError,
    "A context of the store does not begin at its first position, as after rows were filtered out, so the model cannot "
    "run over it again.",
    "Name a text with `--corpus`.",
)
NOTHING_TO_MEASURE = Entry(
    "nothing-to-measure",
    ArtifactError,
    "The activations hold no rows, so that there is nothing to measure.",
    "Collect the activations again, from more text.",
)
HOOK_UNSUPPORTED = Entry(
    "hook-unsupported",
    ArtifactError,
    "The SAE reads a place inside attention or an MLP, as `attn.hook_z`.",
    "nsae measures SAEs of the residual stream and of what attention or MLP add to it; take such a one.",
)
NOT_TRAINED_HERE = Entry(
    "not-trained-here",
    ArtifactError,
    "The command needs what `nsae train` records of an SAE, its options or held-out rows, and this one was made by "
    "another package.",
    "Take SAEs that `nsae train` made; `nsae audit` measures any, and `nsae audit --reference` compares any two.",
)

# SAEs of other packages ----------------------------------------------------------------------------------------------

PICKLE = Entry(
    "pickle",
    ArtifactError,
    "Weights that are only there as a pickle (`.pt`, `.bin`, …). Reading one can run any code, so nsae never does.",
    "Convert it to safetensors where you trust it, as the line shows.",
)
FOREIGN_CONFIG = Entry(
    "foreign-config",
    ArtifactError,
    "The configuration beside an SAE of another package is not that package's, or a value in it makes no sense.",
    "Get the files again from their source.",
)
FOREIGN_ARCHITECTURE = Entry(
    "foreign-architecture",
    ArtifactError,
    "The SAE computes something that nsae does not, as a transcoder or an unknown activation. nsae refuses rather than "
    "measuring another function.",
    "Take an SAE of one of the kinds that the line lists.",
)
FOREIGN_SCALE = Entry(
    "foreign-scale",
    ArtifactError,
    "The SAE works on scaled activations, and its files do not say by how much.",
    "Add the factor to its configuration as the line says, or ask those who trained it.",
)
FOREIGN_TENSORS = Entry(
    "foreign-tensors",
    ArtifactError,
    "The weights of an SAE of another package are damaged, or a tensor is missing, unknown, or of another shape or "
    "dtype than its configuration implies.",
    "Get the files again from their source.",
)

# Models --------------------------------------------------------------------------------------------------------------

MODEL_INCOMPLETE = Entry(
    "model-incomplete",
    ArtifactError,
    "The model's folder or repository has no `config.json` or no safetensors weights.",
    "Give a folder in the Hugging Face layout, as `save_pretrained(DIR)` writes it.",
)
MODEL_CONFIG = Entry(
    "model-config",
    ArtifactError,
    "The model's `config.json` is not JSON, or a value in it cannot be used.",
    "Save the model again with `save_pretrained(DIR)`.",
)
MODEL_WEIGHTS = Entry(
    "model-weights",
    ArtifactError,
    "The model's weights are damaged, or are not those that its `config.json` describes. Missing weights would be "
    "drawn at random, so nsae stops.",
    "Get the model again, or save it again with `save_pretrained(DIR)`.",
)
TOKENIZER = Entry(
    "tokenizer",
    ArtifactError,
    "The model has no usable tokenizer: none is there, it has no fast form or no beginning-of-text token, or it makes "
    "tokens that the model does not have.",
    "Save the model's own tokenizer beside it: `AutoTokenizer.from_pretrained(ID).save_pretrained(DIR)`.",
)

# Several processes ---------------------------------------------------------------------------------------------------

RANKS_SEE_OTHERS = Entry(
    "ranks-see-others",
    ArtifactError,
    "Processes that train one SAE together do not see the same files: another store under the same name, or a "
    "checkpoint that only some of them find, as where a network disk lags behind.",
    "Give all of them the same file system, and run the command again once it shows the same everywhere.",
)
