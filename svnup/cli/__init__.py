"""The three commands: thin, they parse what was typed and say what came of it."""
