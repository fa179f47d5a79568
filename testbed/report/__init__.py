"""From a loaded run to what people read: figures, one HTML page, a table on the terminal."""
