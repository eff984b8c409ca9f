"""Three-axis rotary positions: angles computed on the fly from float coordinates."""
