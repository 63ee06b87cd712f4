"""The autoencoder itself: activations, penalties, the objective, initialisation, and the model in raw units.

Nothing here reads a disk or knows a command line.
"""
