"""The gateway's APIs for callers. An API decodes requests, encodes chunks, and maps outcomes to statuses."""
