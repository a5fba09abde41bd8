"""Projection heads and contrastive losses: plain tensors in, a scalar and its accuracy out. No calibration is known here."""
