"""The layer: projections, rotary positions, compression and gates around `nsa.functional`."""
