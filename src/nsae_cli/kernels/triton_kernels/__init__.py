"""Triton kernels of the sparse step, float32; `triton_ops` launches them. B rows, d = d_in, F = d_sae, E entries.

All weights are [F, d] in memory, row-major: a feature's weights are contiguous. d is covered by one block, padded to a
power of two with masks. Sums over d are taken in the order of Triton's reductions, sums over entries in the entries'
order: both depend on the shapes only, so every kernel here gives the same bits each time.
"""
