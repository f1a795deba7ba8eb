"""From `hybridpar run` to a running job: hosts, placement, the launcher's line, its start and its end."""
