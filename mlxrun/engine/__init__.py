"""The engine: one loop that turns requests into tokens, and what it is made of."""
