"""Counting moved to `nsa.costs`."""

from nsa.costs.devices import peak_of
from nsa.costs.flops import flops_per_token, mean_keys, weights_per_token

__all__ = ["flops_per_token", "mean_keys", "peak_of", "weights_per_token"]
