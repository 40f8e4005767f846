"""All code that uses Ray. No other package imports Ray."""
