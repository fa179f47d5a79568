"""The page of a run under way: what is recorded is read as it grows, drawn in a browser, and links
can be moved by hand."""
