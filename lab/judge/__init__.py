"""Training and scorecard of the mini world's judge."""
