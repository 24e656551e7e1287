"""From logits to events: requests, sampling, the engine."""
