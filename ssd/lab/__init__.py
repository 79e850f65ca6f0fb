"""A world with a known answer: generated problems and a small model that solves them at forks and locks."""
