"""Live picture of a cluster in a terminal: its views, its keys, and the screen."""
