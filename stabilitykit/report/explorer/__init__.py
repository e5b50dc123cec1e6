"""The explorer: every record of a sweep in the page, at a click, with nothing to fetch."""
