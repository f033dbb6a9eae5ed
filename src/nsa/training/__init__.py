"""Training: data, retrieval mix-in, presets and the run itself (`nsa train`)."""
