"""What a rotation should cost, on paper: tables of measured times, and schedules played through."""
