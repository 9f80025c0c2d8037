"""Thin seams that hang curves, reports and checkpoints on the Trainer."""
