"""The targets' own networks, written once more: their names, order of layers and layouts, nothing of ours.

They exist to check exported files where the target itself is not installed. They are slow, plain, and read a weight
exactly where the target would.
"""
