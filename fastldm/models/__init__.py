"""The networks; attribute names equal the keys of checkpoints in the diffusers layout."""
