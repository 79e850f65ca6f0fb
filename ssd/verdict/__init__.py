"""The arms side by side, and the verdict that the analysis plan reads from them."""
