"""What a run will do, worked out before any process group exists."""
