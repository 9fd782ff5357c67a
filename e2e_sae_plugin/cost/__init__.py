"""What a run will cost: arithmetic, memory, time, and which settings change them."""
