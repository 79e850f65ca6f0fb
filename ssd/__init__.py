"""Simple self-distillation on competition math: the nouns of the experiment."""
