"""A tiny model and real conversations made on the spot; `build` is the entrance."""
