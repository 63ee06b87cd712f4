"""SAEs of other libraries, read into what nsae measures; nsae's own, for other libraries; and the Hugging Face hub.

`opening.open_sae` finds out what a folder or a hub repository holds and reads it, each layout in a module of its own.
`exporting.export` writes SAEs as others read them (`export_formats`), `saelens.register` makes SAELens open tanh-relu.
`hub` finds SAEs on the hub, `pull` gets them into the workspace, `push` uploads them. Nothing here unpickles: only
safetensors and JSON are read.
"""
