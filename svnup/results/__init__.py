"""What a run leaves, as typed rows; finding, comparing and tracing them."""
