"""Stands here so that pytest puts this folder on the import path: helpers such as `hand_store` are shared."""
