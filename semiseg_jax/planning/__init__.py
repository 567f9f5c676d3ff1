"""What a run will need, from its compiled programs: memory, arithmetic, traffic, time."""
