"""Triton kernels under the ops of `nsa.ops`, which say what each computes; docs/kernels.md says how.

Rows of a tile are queries x heads of one KV head's group, so that every head of the group shares the keys it loads.
No module here is imported before an op decides for Triton (`nsa.backend`).
"""
