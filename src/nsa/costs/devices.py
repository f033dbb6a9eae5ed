"""What GPUs do at most, from the makers' data sheets."""

import re

# bf16 with fp32 sums, dense, in 1e12 a second; the first name that fits.
PEAKS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
    "L40S": 362, "L4": 121, "A10": 125, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip

# Memory bandwidth in 1e9 bytes a second and memory in GiB.
GPUS = {
    "A100-40GB": (1555, 40), "A100-80GB": (2039, 80), "H100-PCIe": (2039, 80), "H100": (3350, 80),
    "H200": (4800, 141), "B200": (8000, 180), "A10": (600, 24), "L4": (300, 24), "L40S": (864, 48),
    "RTX 3090": (936, 24), "RTX 4090": (1008, 24), "RTX 5090": (1792, 32),
}  # fmt: skip


def peak_of(device_name: str) -> float | None:
    """Operations a second that the GPU of this name does at most; None for one that is not listed."""
    found = (peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name))
    return next((peak * 1e12 for peak in found), None)
