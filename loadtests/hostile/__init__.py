"""Parts of the scenario `hostile`: each attacks a promise of SECURITY.md or docs/failures.md and measures the harm."""
