"""How far is a depth map from the truth? The scale-invariant loss on logarithms."""

from torch import Tensor

TINY = 1e-12
"""Below this the root's gradient would be infinite: a perfect prediction gets none."""


def sig_loss(
    prediction: Tensor,
    truth: Tensor,
    *,
    mean_weight: float = 0.15,
    log_offset: float = 1e-3,
    max_depth: float | None = None,
    scale_only: bool = False,
) -> Tensor:
    """sqrt(Var(g) + mean_weight mean(g)^2) with g = ln(prediction + log_offset) - ln(truth + log_offset).

    Equal to sqrt(mean(g^2) - (1 - mean_weight) mean(g)^2) but for the variance, which divides by one less than the number
    of pixels. All pixels of all images count alike.

    Args:
        prediction: (...) metres, positive.
        truth: (...) metres, 0 where unknown.
        mean_weight: how much the common scale counts.
        log_offset: metres.
        max_depth: deeper truth is left out, metres; None leaves none out.
        scale_only: the warm-up: sqrt(mean_weight mean(g)^2).

    Returns:
        Scalar; 0 with a gradient of 0 where no truth is known.

    Source: Eigen et al., arXiv:1406.2283, equation 4; SigLoss of zhyever/Monocular-Depth-Estimation-Toolbox.
    """
    known = truth > 0
    if max_depth is not None:
        known &= truth <= max_depth
    if not known.any():
        return prediction.sum() * 0
    # float32 also under mixed precision: the variance is a difference of large sums.
    g = (prediction[known].float() + log_offset).log() - (truth[known].float() + log_offset).log()
    spread = g.new_zeros(()) if scale_only or len(g) < 2 else g.var()
    return (spread + mean_weight * g.mean().square()).clamp_min(TINY).sqrt()
