"""Parts of the load-test scenario `console`, which tests the console's pages: cost, memory, times in a browser,
accessibility, hostile texts, roles and tasks."""
