"""What a training step costs: workloads, schedules, timers, memory, reports."""
