"""Samples -> training rows -> TRL's SFTTrainer -> checkpoints."""
