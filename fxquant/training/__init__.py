"""What happens to a program between calibration and finalize: schedules, parameter groups, statistics, processes."""
