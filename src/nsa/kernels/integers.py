"""Whole numbers on the host. Triton's own of these names are made for kernels, and take microseconds a call outside."""


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()
