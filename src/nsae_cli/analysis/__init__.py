"""Measurements on finished artifacts: the norms of a store, and what top-norm tokens do to an SAE."""
