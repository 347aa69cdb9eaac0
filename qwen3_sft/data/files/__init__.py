"""Files of any kind, opened and read by their ending."""
