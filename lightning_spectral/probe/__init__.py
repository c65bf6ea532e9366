"""The measuring engine: what is measured, when, and how windows become records. Knows no Lightning."""
