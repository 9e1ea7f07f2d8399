"""`tierwise calibrate`: measures this machine and writes a hardware file for the simulator."""

from tierwise.calibration.measure import Options, calibrate

__all__ = ["Options", "calibrate"]
