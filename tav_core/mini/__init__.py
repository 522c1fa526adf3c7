"""The small checkpoint that ships with the pack: its rendered world, its training and its measurements."""
