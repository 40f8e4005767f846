"""Operating-system and interpreter settings of every process, private files, and periodic work."""
