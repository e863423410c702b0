"""Padded batches run through the decoder stack as one row of their real tokens.

``layout`` says where each token goes, ``attention`` keeps the rows apart, ``stack`` wraps the stack's forward, and
``check`` compares the two ways on a few short rows before the first step.
"""
