"""From a dense checkpoint to a sparse one: `nsa convert`, and `nsa adapt`, which wins the quality back."""
