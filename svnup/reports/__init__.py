"""Results as tables, figures, HTML pages and W&B runs; the library does not import this package."""
