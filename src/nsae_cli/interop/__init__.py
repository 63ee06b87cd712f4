"""SAEs of other libraries, read into what nsae measures; and nsae's own, opened by SAELens.

`opening.open_sae` finds out what a folder or a hub repository holds and reads it. `saelens.register` is the other
direction. Nothing here unpickles: only safetensors and JSON are read.
"""
