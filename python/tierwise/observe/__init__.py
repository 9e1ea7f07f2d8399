"""What a training run says about itself: metrics per step, progress on a terminal, FLOP utilisation, memory peaks. Needs no torch."""

from tierwise.observe.flops import peak_flops, training_flops_per_token
from tierwise.observe.memory import MemoryUse, peak_rss_bytes, plain_adamw_bytes, reset_peak_rss
from tierwise.observe.metrics import MetricsLogger, StepMeter, StepMetrics
from tierwise.observe.reporter import StepReporter, format_step

__all__ = [
    "MemoryUse",
    "MetricsLogger",
    "StepMeter",
    "StepMetrics",
    "StepReporter",
    "format_step",
    "peak_flops",
    "peak_rss_bytes",
    "plain_adamw_bytes",
    "reset_peak_rss",
    "training_flops_per_token",
]
