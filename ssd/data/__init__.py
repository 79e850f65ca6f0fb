"""Public problem sets, and the sets that are made of them: no problem and no duplicate of one stands in two."""
