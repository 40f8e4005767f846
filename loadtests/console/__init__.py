"""Parts of the scenario console: cost, memory, times in a browser, accessibility, hostile texts, roles and tasks."""
