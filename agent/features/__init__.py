"""What a feature may do and does: lifecycle, conditions, and the guard before the bus."""
