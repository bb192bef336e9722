"""Results as tables, figures, pages and W&B runs; nothing in the library imports this room."""
