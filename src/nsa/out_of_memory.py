"""Whether an error says that memory did not suffice."""

SAID_BY_TORCH = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Python's and CUDA's allocators have types for it; the driver and torch's allocator on a CPU use words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without torch
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID_BY_TORCH)
