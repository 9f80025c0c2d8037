"""The live core: what other processes see of a run, and what they ask of it. Knows no Lightning."""
