"""Measurements on finished artifacts: the norms of a store, what top-norm tokens do to an SAE, how SAEs compare."""
