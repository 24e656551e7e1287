"""One loop that turns requests into tokens, and its parts."""
