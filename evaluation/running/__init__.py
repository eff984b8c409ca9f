"""Running an evaluation: what is asked for, units of work, workers, launchers, videos that are made or found."""
