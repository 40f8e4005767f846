"""Parts of the scenario `faults`."""
