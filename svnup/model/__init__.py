"""Models: what is known of them before loading, how they are loaded, run block by block, and saved."""
