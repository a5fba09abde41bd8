"""The same results on a GPU as on the CPU, to float32; skipped where there is none."""

import pytest
import torch
from helpers import batch_of, small_method

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")


@pytest.fixture(autouse=True)
def full_precision():
    torch.use_deterministic_algorithms(False)  # max-pooling has no repeatable backward on CUDA
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("encoder", ["pointnet2_msg", "voxel_backbone8x"])
def test_losses_and_gradients_agree_with_the_cpu(encoder):
    changes = {}
    if encoder == "voxel_backbone8x":
        voxels = {"voxel_size": [0.4, 0.4, 0.4], "point_range": [0.0, -12.8, -4.0, 38.4, 12.8, 4.0]}
        changes["point_encoder"] = {"name": encoder, "sparse_backend": "torch", "num_tokens": 24, **voxels}
    batch = batch_of([1, 2])
    results = []
    for device in ("cpu", "cuda"):
        method = small_method(**changes).to(device)
        metrics = method(batch.to(device))
        metrics["loss"].backward()
        gradients = {name: p.grad.cpu() for name, p in method.named_parameters() if p.grad is not None}
        results.append(({name: float(value) for name, value in metrics.items()}, gradients))
    (cpu, cpu_gradients), (gpu, gpu_gradients) = results
    assert gpu == pytest.approx(cpu, rel=1e-3, abs=1e-4)
    for name, gradient in cpu_gradients.items():
        torch.testing.assert_close(
            gpu_gradients[name], gradient, rtol=1e-2, atol=1e-4 * float(gradient.abs().max()) + 1e-7
        )
