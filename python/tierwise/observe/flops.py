"""FLOPs of a training step and the peak of known devices, for model FLOP utilisation (MFU)."""

from __future__ import annotations

# Dense bf16 FLOP/s with fp32 accumulation, without sparsity, from the vendors' data sheets. The first part found in the name wins.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 5090", 209e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name, as `torch.cuda.get_device_name()` gives it; None for a device that is not known."""
    for part, flops in _PEAK_FLOPS:
        if part in device_name:
            return flops
    return None


def training_flops_per_token(numel: int, num_layers: int, hidden_size: int, seq_len: int) -> float:
    """FLOPs that one token needs in forward and backward: `6 * numel + 6 * num_layers * hidden_size * seq_len`.

    `numel` counts the parameters that are multiplied with every token: everything but an input embedding that is not also the output
    embedding. The second term is causal attention (half of the square). Recomputation is not counted: MFU, not hardware utilisation.
    After Chowdhery et al., "PaLM" (arXiv:2204.02311), appendix B, halved for causal attention.
    """
    if min(numel, num_layers, hidden_size, seq_len) < 0:
        raise ValueError(f"sizes cannot be negative: numel={numel}, num_layers={num_layers}, hidden_size={hidden_size}, seq_len={seq_len}")
    return 6.0 * numel + 6.0 * num_layers * hidden_size * seq_len
