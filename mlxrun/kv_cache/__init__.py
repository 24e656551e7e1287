"""Key/value caches: one object per layer."""
