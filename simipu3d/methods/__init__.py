"""Pre-training methods: encoders, matching and contrast put together. One file a method.

A method is an `nn.Module` registered in `METHODS` with its own configuration model. It is built as
`cls(config, point_columns=...)` from the blocks it names in `BLOCKS` and called with a `Batch`; it returns named losses
and metrics as scalars, of which `loss` is the one to minimise. `branches()` says which optimizer serves which parameter.
"""

from simipu3d.methods import simipu

__all__ = ["simipu"]
