"""What a person reads: figures, numbers as text, and the pages that are made of them."""
