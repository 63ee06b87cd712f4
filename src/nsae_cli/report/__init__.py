"""Results → figures and terminal tables. Computes no statistics; needs neither torch nor the artifacts' folders.

`figures` draws (matplotlib), `tables` prints (rich), `format` writes numbers. Every function takes the parsed JSON of
an artifact and, where rows are drawn, its arrays. Nothing is imported here: a command that only prints a table does
not pay for matplotlib.
"""
