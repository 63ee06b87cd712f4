"""From a language model and a corpus to activations: everything of `nsae collect` below the command line.

Read in this order:

- `config`: the options of collect, as given and as resolved.
- `families`: where a model family keeps its blocks and embeddings.
- `hub`, `loading`, `tokenizing`: a model and its tokenizer, by embedded name, folder or hub id.
- `layers`: `--layers` and hook names.
- `corpus`: documents, one by one.
- `packing`: documents → contexts, every token accounted for.
- `harvest`: contexts → residual vectors and their norms, the forward stopped after the deepest wanted layer.
- `plan`: rows, bytes and free space before the weights are loaded.
- `collect`: all of it, resumable.
- `windows`, `live`: `nsae train --from-model`, the same rows into memory instead, a window at a time.
- `probe`: is the sink carried by the first token or by the first position?
- `quiet`: keeps the libraries' own log lines and progress bars off the terminal.
"""
