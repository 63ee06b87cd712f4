"""Activation stores and the protocol by which every artifact is written.

- `commit`: write-to-temporary, fsync, rename; JSON without NaN; leftovers.
- `lock`: one process at a time writes into a folder.
- `manifest`: the store's `manifest.json`, validated.
- `shards`: writing a store, shard by shard, and reading it back with its hashes checked.
- `contexts`: which rows belong to which context, and which contexts are held out.
- `profile`: per hook, the sinks, the norm scale ñ and the norm bins.
- `batches`: rows in a shuffled order that is a pure function of (seed, epoch).
- `alter`: stores with other norms, for controls.
- `sae_folder`: saved SAEs.
- `workspace`: names and places of artifacts.
- `presence`: data files that are brought when they are first read.
- `remote`: artifacts and workspaces at URLs.
"""
