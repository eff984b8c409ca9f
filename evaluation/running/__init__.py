"""Run of an evaluation: protocol, prompts, units of work, workers, and the folder of results."""
