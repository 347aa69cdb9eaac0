"""One row to one canonical sample: every field is honoured, known as metadata, or refused."""
