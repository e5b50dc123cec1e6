"""Results -> sections of prose, tables and figures -> terminal, Markdown and HTML; without torch."""
