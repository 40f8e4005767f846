"""Parts of the scenario `hostile`: each attacks one promise of SECURITY.md or docs/failures.md and measures the harm."""
