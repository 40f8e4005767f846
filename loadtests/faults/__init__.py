"""The parts of the scenario `faults`."""
