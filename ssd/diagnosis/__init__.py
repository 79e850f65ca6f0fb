"""Locks and forks: what training changed at every position of the same texts, and what that is worth."""
