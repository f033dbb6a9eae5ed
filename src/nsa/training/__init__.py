"""Training: data (building/ makes a corpus), retrieval and puzzle mix-in, presets and the run itself (`nsa train`)."""
